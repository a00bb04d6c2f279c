"""Moving pictures as files: GIF and WebP by Pillow, MP4 by PyAV (extra `video`)."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from ..trainer.data.files import DataError
from ..trainer.data.images import fitted

FORMATS = ("gif", "webp", "mp4")
CLOCK = 1000  # ticks a second of an MP4's time stamps
LEAST = 20  # milliseconds that a frame of a GIF stays: browsers take less for 100
Pixels = np.ndarray[Any, Any]  # (height, width, 3) of uint8


class FilmError(DataError):
    """A film that cannot be written; why, and what to do."""


def check_format(kind: str) -> None:
    """Raise FilmError for a format that is none, or whose library is not here."""
    if kind not in FORMATS:
        raise FilmError(f"format is {kind!r:.40}: give one of {', '.join(FORMATS)}")
    if kind == "mp4":
        _av()


def write_film(target: BinaryIO, kind: str, frames: Iterable[tuple[Pixels, float]]) -> int:
    """Write frames, each with the seconds that it stays, to a file that is open; how many they were.

    MP4 takes the memory of a frame, however many there are; Pillow keeps a GIF's and a WebP's until the end. An MP4's
    sides are even: a last row or column is repeated. Raises FilmError for no frames, and for frames of several sizes.
    """
    check_format(kind)
    checked = _checked(frames)
    return _write_mp4(target, checked) if kind == "mp4" else _write_images(target, kind, checked)


def _checked(frames: Iterable[tuple[Pixels, float]]) -> Iterator[tuple[Pixels, float]]:
    first: tuple[int, ...] | None = None
    for pixels, seconds in frames:
        if first is not None and pixels.shape != first:
            raise FilmError(
                f"a frame is {pixels.shape[1]} x {pixels.shape[0]} pixels and the first {first[1]} x {first[0]}: "
                "give frames of one size"
            )
        first = pixels.shape
        yield pixels, seconds
    if first is None:
        raise FilmError("there are no frames to write")


def _write_images(target: BinaryIO, kind: str, frames: Iterator[tuple[Pixels, float]]) -> int:
    images, stays = [], []
    for pixels, seconds in frames:
        images.append(Image.fromarray(pixels))
        stays.append(max(round(1000 * seconds), LEAST if kind == "gif" else 1))
    how: dict[str, Any] = {"quality": 90, "method": 2} if kind == "webp" else {"disposal": 1}
    images[0].save(target, kind, save_all=True, append_images=images[1:], duration=stays, loop=0, **how)
    return len(images)


def _av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError:
        raise FilmError("MP4 needs av: pip install 'turbodistill[video]'; or choose WebP or GIF") from None


def _write_mp4(target: BinaryIO, frames: Iterator[tuple[Pixels, float]]) -> int:
    av, count, clock = _av(), 0, 0.0
    with av.open(target, "w", format="mp4") as file:
        stream = None
        for pixels, seconds in frames:
            pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
            if stream is None:
                stream = file.add_stream("libx264", rate=Fraction(1 / max(seconds, 1e-3)).limit_denominator(CLOCK))
                stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "yuv420p"
                stream.options = {"crf": "16"}
                stream.codec_context.time_base = Fraction(1, CLOCK)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = round(clock * CLOCK), Fraction(1, CLOCK)
            file.mux(stream.encode(frame))
            clock, count = clock + seconds, count + 1
        if stream is not None:
            file.mux(stream.encode())
    return count


@dataclass(frozen=True)
class Film:
    """A film that is read: its frames a second, and its pictures (3, height, width) in [0, 1] one by one."""

    rate: float
    pictures: Iterator[Tensor]


def read_film(path: Path, size: tuple[int, int]) -> Film:
    """A video by PyAV, or a GIF or WebP by Pillow, scaled and cropped to a size (width, height), frame by frame.

    Raises FilmError for a file that is none, at once or where it breaks off.
    """
    if path.suffix.lower() in (".gif", ".webp", ".png"):
        return _read_images(path, size)
    av = _av()
    try:
        file = av.open(str(path))
        stream = file.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate)
    except (av.FFmpegError, IndexError, TypeError, OSError) as error:
        raise FilmError(f"{path} cannot be read as a video ({error!s:.200}): give another file") from None

    def pictures() -> Iterator[Tensor]:
        count = 0
        with file:
            try:
                for frame in file.decode(stream):
                    yield fitted(frame.to_image(), size)
                    count += 1
            except av.FFmpegError as error:
                raise FilmError(f"{path} breaks off after {count} frames ({error!s:.200}): repair or cut it") from None

    return Film(rate, pictures())


def _read_images(path: Path, size: tuple[int, int]) -> Film:
    try:
        image: Any = Image.open(path, formats=("GIF", "WEBP", "PNG"))
        stays = float(image.info.get("duration") or 100)
    except (OSError, ValueError, SyntaxError) as error:
        raise FilmError(f"{path} cannot be read as a film ({error!s:.200}): give another file") from None

    def pictures() -> Iterator[Tensor]:
        with image:
            for number in range(getattr(image, "n_frames", 1)):
                try:
                    image.seek(number)
                    yield fitted(image, size)
                except (OSError, ValueError, SyntaxError, EOFError) as error:
                    raise FilmError(f"{path} breaks off after {number} frames ({error!s:.200})") from None

    return Film(1000 / stays, pictures())
