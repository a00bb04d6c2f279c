"""Pictures for somebody who watches: of each input as it is now, in one step, with all that did not change kept."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.decoder import Decoder
from ..core.denoiser import Cond
from ..core.interpolate import mixed, turned
from ..core.sampling import seeded_noise
from ..trainer.host import Host
from .few_step import check_steps
from .recipe import FewStepModel

KEPT = 64  # prompts, noises and pictures that are kept ready
LEAST_STRENGTH = 0.01
BOUNDS = {"strength": (LEAST_STRENGTH, 1.0), "mix": (0.0, 1.0), "angle": (-1e6, 1e6)}  # of a shot's numbers
TOGETHER = 2**18  # pixels that are made in one pass: one picture of 512 x 512, as many small ones as there are
STILL = 0.004, 0.02  # differences of two frames below which nothing has moved: of all pixels, and of the busiest tile
TILES = 8  # by which a frame is compared, in both directions
T = TypeVar("T")


@dataclass(frozen=True)
class Shot:
    """What one picture is made from.

    `mix` is the share of a second prompt, `towards`. Of a `picture` (3, height, width) in [0, 1], or of the `latents`
    (C, H, W) of one, as much is made anew as `strength` says: 1 keeps hardly anything. `angle` turns the noise of the
    seed towards that of the next one.
    """

    prompt: str
    seed: int = 0
    steps: int = 1
    strength: float = 1.0
    picture: Tensor | None = None
    towards: str = ""
    mix: float = 0.0
    angle: float = 0.0
    latents: Tensor | None = None

    @property
    def begins(self) -> bool:
        """Whether it begins from a picture."""
        return self.picture is not None or self.latents is not None


@dataclass(frozen=True)
class Frames:
    """Pictures (N, 3, height, width) in [0, 1] on the CPU, and the seconds of each stage."""

    pictures: Tensor
    stages: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())


class Kept:
    """The newest values that were made, by their keys."""

    def __init__(self, most: int = KEPT):
        self.most, self._values = most, OrderedDict[Any, Any]()

    def of(self, key: Any, make: Callable[[], T]) -> T:
        """The value of a key, made if it is not there."""
        if key not in self._values:
            self._values[key] = make()
        self._values.move_to_end(key)
        while len(self._values) > self.most:
            self._values.popitem(last=False)
        return self._values[key]


@dataclass
class Stream:
    """Makes frames on a host's model, `model`, whose weights are those that are sampled.

    What is the same as in the frames before is not computed again: texts, noise, the latents of a picture. `decoder`
    decodes in place of the host's own, such as a tiny one.
    """

    host: Host
    model: FewStepModel
    decoder: Decoder | None = None
    texts: Kept = field(default_factory=Kept)
    noises: Kept = field(default_factory=Kept)
    latents: Kept = field(default_factory=lambda: Kept(8))

    @torch.no_grad()
    def make(self, shots: Sequence[Shot]) -> Frames:
        """A picture of each; those of equal steps and strength in one pass. Raises ValueError for what cannot be."""
        for shot in shots:
            check_shot(shot, self.host.resolution)
        stages: dict[str, float] = {"text": 0.0, "encode": 0.0, "denoise": 0.0, "decode": 0.0}
        found: list[Tensor] = [torch.empty(0)] * len(shots)
        for (steps, strength), rows in _alike(shots).items():
            check_steps(self.model.recipe, steps)
            chosen = [shots[i] for i in rows]
            with _timed(stages, "text"):
                cond = Cond.cat([self._cond(shot) for shot in chosen]).to(self.host.denoiser.device)
            with _timed(stages, "encode"):
                start = self._start(chosen)
            with _timed(stages, "denoise"):
                noise = torch.stack([self._noise(shot) for shot in chosen]).to(self.host.denoiser.device)
                latents = self.model.generate(noise, cond, steps, start, strength if start is not None else 1.0)
            with _timed(stages, "decode"):
                pictures = self.decoder(latents).clamp(0, 1) if self.decoder else self.host.decode(latents)
                for i, picture in zip(rows, pictures.cpu(), strict=True):  # which waits for the device
                    found[i] = picture
        return Frames(torch.stack(found), stages)

    def _cond(self, shot: Shot) -> Cond:
        first = self._text(shot.prompt)
        return mixed(first, self._text(shot.towards), shot.mix) if shot.mix > 0 else first

    def _text(self, prompt: str) -> Cond:
        return self.texts.of(prompt, lambda: self.host.encode_text([prompt]))

    def _noise(self, shot: Shot) -> Tensor:
        """Unit noise (C, H, W)."""

        def of(seed: int) -> Tensor:
            return self.noises.of(seed, lambda: seeded_noise([seed], self.host.latent_shape, torch.device("cpu"))[0])

        return turned(of(shot.seed), of(shot.seed + 1), shot.angle) if shot.angle else of(shot.seed)

    def _start(self, shots: Sequence[Shot]) -> Tensor | None:
        """The latents (N, C, H, W) of their pictures; None where they begin from noise."""
        if not shots[0].begins:
            return None
        return torch.stack([self._latents_of(shot) for shot in shots])

    def _latents_of(self, shot: Shot) -> Tensor:
        if shot.latents is not None:
            return shot.latents.to(self.host.denoiser.device)
        assert shot.picture is not None
        return self.encode(shot.picture)

    def encode(self, picture: Tensor) -> Tensor:
        """The latents (C, H, W) of a picture (3, height, width) in [0, 1]."""
        key = (picture.shape, hash(picture.numpy().tobytes()))
        return self.latents.of(key, lambda: self.host.encode_images(picture[None])[0])


def together(resolution: tuple[int, int]) -> int:
    """How many pictures of this size (width, height) are made in one pass."""
    return max(1, TOGETHER // (resolution[0] * resolution[1]))


def check_shot(shot: Shot, resolution: tuple[int, int]) -> None:
    """Raise ValueError for numbers out of bounds, and for a picture of another size (width, height)."""
    for name, (low, high) in BOUNDS.items():
        value = getattr(shot, name)
        if not low <= value <= high:
            raise ValueError(f"{name} is {value:g}: give {low:g} to {high:g}")
    if shot.picture is not None and shot.picture.shape != (3, *resolution[::-1]):
        height, width = shot.picture.shape[-2:]
        raise ValueError(f"a picture is {width} x {height} pixels: give {resolution[0]} x {resolution[1]}")


def _alike(shots: Sequence[Shot]) -> dict[tuple[int, float], list[int]]:
    """Which shots go through the model together, by steps and strength (2 without a picture)."""
    found: dict[tuple[int, float], list[int]] = {}
    for i, shot in enumerate(shots):
        key = shot.steps, shot.strength if shot.begins else 2.0
        found.setdefault(key, []).append(i)
    return found


@contextmanager
def _timed(stages: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds within to a stage."""
    began = time.perf_counter()
    yield
    stages[name] += time.perf_counter() - began


@dataclass
class Changes:
    """Whether an input needs a new frame: a video that stands still does not (StreamDiffusion, arXiv 2312.12491).

    It looks at the mean difference, and at the busiest tile, so that a short stroke counts.
    """

    last: Shot | None = None

    def needs(self, shot: Shot) -> bool:
        """Whether a shot differs from the last one that did."""
        if self.last is not None and replace(shot, picture=None) == replace(self.last, picture=None):
            before, now = self.last.picture, shot.picture
            if before is now or (before is not None and now is not None and still(before, now)):
                return False
        self.last = shot
        return True


def still(a: Tensor, b: Tensor) -> bool:
    """Whether hardly anything differs between two frames (3, height, width) in [0, 1]."""
    if a.shape != b.shape:
        return False
    apart = (a - b).abs().mean(0)[None, None]
    return bool(apart.mean() < STILL[0]) and bool(F.adaptive_avg_pool2d(apart, TILES).max() < STILL[1])
