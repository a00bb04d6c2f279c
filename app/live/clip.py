"""A clip of the frames that a page has seen, as a file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ...generate.film import Pixels, check_format, write_film
from ...trainer.data.images import UNREADABLE
from .messages import FORMATS, MOST_SIDE, MessageError, unpacked

LONGEST = 64 << 20  # bytes
MOST_FRAMES = 2400
MOST_SECONDS = 60.0


def clip_of(message: bytes) -> tuple[bytes, str]:
    """A message of frames -> a film's file, and its format; raises ValueError for what makes none.

    The JSON has the `format`, the frames' `times` in milliseconds, and their files' `lengths` in bytes.
    """
    about, files = unpacked(message, LONGEST)
    values: list[Any] = [about.get(name) for name in ("format", "times", "lengths")]
    kind, times, lengths = values
    check_format(str(kind))
    if not _numbers(times, MOST_SECONDS * 1000) or not _numbers(lengths, LONGEST) or len(times) != len(lengths):
        raise MessageError(
            f"times and lengths are lists of as many numbers, of at most {MOST_FRAMES} frames in {MOST_SECONDS:g} s"
        )
    if sorted(times) != times or sum(lengths) != len(files):
        raise MessageError("times rise from frame to frame, and the lengths are those of all files together")
    stays = [max(b - a, 1) / 1000 for a, b in zip(times, [*times[1:], times[-1] + 100], strict=True)]
    buffer = io.BytesIO()
    write_film(buffer, str(kind), _frames(files, [int(n) for n in lengths], stays))
    return buffer.getvalue(), str(kind)


def _numbers(values: Any, most: float) -> bool:
    return (
        isinstance(values, list)
        and 2 <= len(values) <= MOST_FRAMES
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= most for v in values)
    )


def _frames(files: bytes, lengths: list[int], stays: list[float]) -> Iterator[tuple[Pixels, float]]:
    at, first = 0, None
    for length, seconds in zip(lengths, stays, strict=True):
        try:
            image = Image.open(io.BytesIO(files[at : at + length]), formats=FORMATS)
            if max(image.size) > MOST_SIDE:
                raise MessageError(f"a frame is {image.width} x {image.height} pixels: at most {MOST_SIDE} on a side")
            image = image.convert("RGB")
        except MessageError:
            raise
        except UNREADABLE as error:
            raise MessageError(f"a frame cannot be read ({error!s:.100}): send PNG, JPEG or WebP") from None
        first = first or image.size
        yield np.array(image if image.size == first else ImageOps.fit(image, first)), seconds
        at += length
