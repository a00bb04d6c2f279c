"""Frames between pictures, or between prompts: each is made in one step, and all belong together.

A frame begins from the latents on the way from one picture to the other, is noised a little by noise that all frames
share and that turns slowly, and is denoised in one step under the prompts on the same way. So it is as sharp as a
picture, and nothing flickers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise

from torch import Tensor

from ..core.interpolate import blended
from .stream import LEAST_STRENGTH, Shot, Stream, together

MOST_BETWEEN = 1000
LEVELS = 20  # of strength: frames of one are made in one pass
# Added to the seed of the noise between pictures: a picture that was made with that seed has its noise in it already,
# and would be given it twice.
ASIDE = 2**40


@dataclass(frozen=True)
class Motion:
    """How frames are made.

    `strength` is how much is made anew in the middle between two pictures: it rises from the ends, where the picture
    itself is shown. `turn` is the angle in radians by which the noise turns from one to the next.
    """

    strength: float = 0.4
    turn: float = 0.2
    seed: int = 0
    steps: int = 1


def check_motion(motion: Motion, between: int) -> None:
    """Raise ValueError for numbers out of bounds."""
    if not 1 <= between <= MOST_BETWEEN:
        raise ValueError(f"between is {between}: give 1 to {MOST_BETWEEN} frames between two pictures")
    if not LEAST_STRENGTH <= motion.strength <= 1:
        raise ValueError(f"strength is {motion.strength:g}: give {LEAST_STRENGTH:g} to 1")
    if not 0 <= motion.turn <= math.pi:
        raise ValueError(f"turn is {motion.turn:g}: give 0 to {math.pi:.2f} radians")


def strength_at(motion: Motion, share: float) -> float:
    """The strength at 0 to 1 of the way between two pictures, in LEVELS: it rises steeply, then is flat."""
    level = math.ceil(LEVELS * math.sqrt(math.sin(math.pi * share)))
    return max(motion.strength * level / LEVELS, LEAST_STRENGTH)


def interpolate(
    stream: Stream, pictures: Iterable[Tensor], between: int, prompts: Sequence[str] = ("",), motion: Motion = Motion()
) -> Iterator[Tensor]:
    """The pictures (3, height, width) in [0, 1], and `between` frames from each to the next, in order.

    A picture that is given comes out to the pixel. `prompts` are one for all, or one for each picture (the last one
    goes on): those of a frame are mixed. However long, it takes the memory of two pictures and the frames between them.
    Raises ValueError for numbers out of bounds, pictures of another size than the model's, and fewer than two pictures.
    """
    check_motion(motion, between)
    given = _checked(stream, pictures)
    begin = list(islice(given, 2))
    if len(begin) < 2:
        raise ValueError("there are fewer than two pictures: give two or more")
    last = begin[1]
    for number, (first, last) in enumerate(pairwise(chain(begin, given))):
        yield first
        yield from _made(stream, shots_between(stream, first, last, between, prompts, motion, number))
    yield last


def morph(stream: Stream, prompts: Sequence[str], between: int, motion: Motion = Motion()) -> Iterator[Tensor]:
    """A picture of each prompt from the same noise, and `between` frames from each to the next, in order.

    The noise turns by `motion.turn` from prompt to prompt. Raises ValueError as `interpolate`.
    """
    check_motion(motion, between)
    if len(prompts) < 2:
        raise ValueError(f"there are {len(prompts)} prompts: give two or more")
    whole = between + 1

    def shots() -> Iterator[Shot]:
        for k, (prompt, following) in enumerate(pairwise(prompts)):
            for i in range(whole):
                share = i / whole
                angle = motion.turn * (k + share)
                yield Shot(prompt, motion.seed, motion.steps, towards=following, mix=share, angle=angle)
        yield Shot(prompts[-1], motion.seed, motion.steps, angle=motion.turn * (len(prompts) - 1))

    yield from _made(stream, shots())


def _checked(stream: Stream, pictures: Iterable[Tensor]) -> Iterator[Tensor]:
    width, height = stream.host.resolution
    for number, picture in enumerate(pictures, 1):
        if picture.shape != (3, height, width):
            raise ValueError(
                f"picture {number} is {picture.shape[-1]} x {picture.shape[-2]} pixels: give {width} x {height}, the "
                "size that the model works in"
            )
        yield picture


def shots_between(
    stream: Stream, first: Tensor, second: Tensor, between: int, prompts: Sequence[str], motion: Motion, number: int = 0
) -> Iterator[Shot]:
    """The shots of the frames between two pictures (3, height, width), of which the first is that of this number."""
    ends = stream.encode(first), stream.encode(second)
    texts = [prompts[min(number + i, len(prompts) - 1)] for i in (0, 1)]
    for i in range(1, between + 1):
        share = i / (between + 1)
        yield Shot(
            texts[0], motion.seed + ASIDE, motion.steps, strength_at(motion, share), None, texts[1],
            share if texts[0] != texts[1] else 0.0, motion.turn * (number + share), blended(*ends, share),
        )  # fmt: skip


def _made(stream: Stream, shots: Iterable[Shot]) -> Iterator[Tensor]:
    """The pictures of some shots in order, some at once."""
    most, waiting = together(stream.host.resolution), []
    for shot in shots:
        waiting.append(shot)
        if len(waiting) == most:
            yield from stream.make(waiting).pictures
            waiting = []
    if waiting:
        yield from stream.make(waiting).pictures
