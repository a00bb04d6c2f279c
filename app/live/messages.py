"""What a viewer of the Live page sends and is sent: four bytes of length, as much JSON, and a picture."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from ...generate.stream import BOUNDS, Shot
from ...trainer.config import MOST_LETTERS, MOST_SEED
from ...trainer.data.images import UNREADABLE, fitted

LONGEST = 8 << 20  # bytes of a message
FORMATS = ("PNG", "JPEG", "WEBP")  # of a picture that a page sends
MOST_SIDE = 4096  # pixels
MOST_STEPS = 8
LOSSLESS = 2**16  # pixels up to which a frame is sent as it is
LENGTH = struct.Struct(">I")
# Default, least and most.
NUMBERS = {name: (getattr(Shot, name), *bounds) for name, bounds in BOUNDS.items()}
WHOLE = {"number": (0, 0, 2**53), "seed": (0, 0, MOST_SEED - 1), "steps": (1, 1, MOST_STEPS)}
FIELDS = {"prompt", "towards", "student", *NUMBERS, *WHOLE}


class MessageError(ValueError):
    """A message that cannot be used; what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Asked:
    """One input of a viewer: `number` is its own, and comes back with the frame."""

    number: int
    student: str
    shot: Shot


def packed(about: dict[str, Any], picture: bytes = b"") -> bytes:
    """A message of these values, which JSON can have, and a picture's file."""
    text = json.dumps(about, allow_nan=False).encode()
    return LENGTH.pack(len(text)) + text + picture


def unpacked(message: bytes, most: int = LONGEST) -> tuple[dict[str, Any], bytes]:
    """The values and the picture of a message of at most so many bytes; raises MessageError for what is none."""
    if len(message) > most:
        raise MessageError(f"the message has {len(message):,} bytes: send at most {most:,}, such as a smaller picture")
    if len(message) < LENGTH.size or len(message) < LENGTH.size + (size := LENGTH.unpack_from(message)[0]):
        raise MessageError("the message ends too early: send the JSON's length in four bytes, the JSON, the picture")
    try:
        about = json.loads(message[LENGTH.size : LENGTH.size + size])
    except (ValueError, RecursionError):
        raise MessageError("the message's text is no JSON: send {...}") from None
    if not isinstance(about, dict):
        raise MessageError("the message's JSON is no object: send {...}")
    return about, message[LENGTH.size + size :]


def asked(message: bytes, resolution: tuple[int, int]) -> Asked:
    """A viewer's input, for pictures of this size (width, height); raises MessageError."""
    about, file = unpacked(message)
    if unknown := sorted(map(str, about.keys() - FIELDS)):
        raise MessageError(f"{unknown[0]:.60} is no field: known are {', '.join(sorted(FIELDS))}")
    texts = {name: _text(name, about.get(name, "")) for name in ("prompt", "towards", "student")}
    numbers = {
        name: _number(name, about.get(name, default), low, high) for name, (default, low, high) in NUMBERS.items()
    }
    whole = {name: _whole(name, about.get(name, default), low, high) for name, (default, low, high) in WHOLE.items()}
    picture = picture_of(file, resolution) if file else None
    shot = Shot(
        texts["prompt"], whole["seed"], whole["steps"], numbers["strength"], picture, texts["towards"], numbers["mix"],
        numbers["angle"],
    )  # fmt: skip
    return Asked(whole["number"], texts["student"], shot)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MOST_LETTERS:
        raise MessageError(f"{name} is {value!r:.60}: give a text of at most {MOST_LETTERS} letters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise MessageError(f"{name} has half a letter in it (a lone surrogate): type it anew") from None
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # NaN is neither
        raise MessageError(f"{name} is {value!r:.60}: give {low:g} to {high:g}")
    return float(value)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise MessageError(f"{name} is {value!r:.60}: give a whole number, {low} to {high}")
    return value


def picture_of(file: bytes, resolution: tuple[int, int]) -> Tensor:
    """A picture's file, scaled and cropped to a size -> (3, height, width) in [0, 1]; raises MessageError.

    What is transparent becomes white, as on a page.
    """
    try:
        image = Image.open(io.BytesIO(file), formats=FORMATS)
        if max(image.size) > MOST_SIDE:
            raise MessageError(
                f"the picture is {image.width} x {image.height} pixels: send at most {MOST_SIDE} on a side"
            )
        return fitted(image, resolution)
    except MessageError:
        raise
    except UNREADABLE as error:
        raise MessageError(f"the picture cannot be read ({error!s:.100}): send PNG, JPEG or WebP") from None


def file_of(picture: Tensor) -> tuple[bytes, str]:
    """A picture (3, height, width) in [0, 1] as a file, and its type: small ones as they are, large ones as JPEG."""
    pixels = picture.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if pixels.shape[0] * pixels.shape[1] <= LOSSLESS:
        image.save(buffer, "png", compress_level=1)
        return buffer.getvalue(), "image/png"
    image.save(buffer, "jpeg", quality=92)
    return buffer.getvalue(), "image/jpeg"
