"""Captioned pictures of one's own: decoded, and encoded into latents once."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ...core.rights import RIGHTS
from ..host import Host
from ..world import ALONE, World
from .affixes import NO_AFFIXES, Affixes
from .conditioning import Conditioning
from .files import DataError, log, read_tensors, reason, said_of, texts_of
from .found import BROKEN, Found, Picture, shown
from .samples import SHARD, Samples, Shard, load_samples, read_shard, write_shard

WRONG = "wrong"  # what a file says of pictures that could not be read
KEPT = "kept"  # and which of its pictures could be
# What Pillow's decoders raise; DataError is among them.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError)
# By these alone: Pillow's others run programs (EPS), or read what no picture of this name is.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JXL")
PLUGINS = {".jxl": "pillow-jxl-plugin", ".avif": "a newer Pillow (11.3)"}  # what reads them where Pillow does not
MOST_PIXELS = 2**28  # of a picture; Pillow's own bound is lower, but hosts switch it off
AT_ONCE = 8  # pictures that are encoded together


def check_pictures(pictures: Sequence[Picture]) -> None:
    """Raise DataError if one of the pictures is missing or broken, without decoding them all."""
    for picture in pictures:
        with _said_of(picture), picture.open() as file, opened(file) as image:
            image.verify()


@contextmanager
def _said_of(picture: Picture) -> Iterator[None]:
    """Within, whatever is wrong with a picture is a DataError that names it."""
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, PermissionError):
            raise DataError(f"picture {shown(picture.name)} {RIGHTS}") from None
        words = reason(error)
        if isinstance(error, UnidentifiedImageError):
            suffix = os.path.splitext(picture.name)[1].lower()
            reader = PLUGINS.get(suffix)
            missing = reader and suffix not in Image.registered_extensions()
            words = f"{suffix} needs {reader}" if missing else "it is empty or no picture"
        raise DataError(f"picture {shown(picture.name)} cannot be read ({words:.200}): replace or remove it") from None


def opened(file: BinaryIO) -> Image.Image:
    """A picture whose pixels are not read yet; raises ValueError for too many of them, and as Pillow does."""
    image = Image.open(file, formats=_formats())
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, the most is {MOST_PIXELS:,}")
    return image


@cache
def _formats() -> list[str]:
    """Those of FORMATS that the installed Pillow reads."""
    if find_spec("pillow_jxl"):
        importlib.import_module("pillow_jxl")  # which makes itself known to Pillow
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def load_picture(picture: Picture, size: tuple[int, int]) -> Tensor:
    """A picture on white, scaled and cropped about its centre to (width, height) -> (3, height, width) in [0, 1].

    Raises DataError for a file that cannot be read.
    """
    with _said_of(picture), picture.open() as file, opened(file) as image:
        return fitted(image, size)


def fitted(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture the right way up, on white, scaled and cropped to (width, height) -> (3, height, width) in [0, 1].

    Raises as Pillow does where its pixels are read here.
    """
    width, height = size
    whole = _on_white(_eight_bits(ImageOps.exif_transpose(image)))
    scale = max(width / whole.width, height / whole.height)
    scaled = whole.resize((max(width, round(whole.width * scale)), max(height, round(whole.height * scale))))
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    cropped = scaled.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 255


def shape_of(picture: Picture) -> tuple[int, int]:
    """Width and height in pixels, the right way up; raises DataError for a file that cannot be read."""
    with _said_of(picture), picture.open() as file, opened(file) as image:
        lies = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.height, image.width) if lies else (image.width, image.height)


def load_some(pictures: Sequence[Picture], size: tuple[int, int], count: int) -> list[Tensor]:
    """The first `count` of the pictures that can be read, as `load_picture`; raises DataError if none can."""
    loaded: list[Tensor] = []
    wrong: DataError | None = None
    for picture in pictures:
        if len(loaded) == count:
            break
        try:
            loaded.append(load_picture(picture, size))
        except DataError as error:
            wrong = error
    if wrong and not loaded:
        raise wrong
    return loaded


def _on_white(picture: Image.Image) -> Image.Image:
    """A picture in RGB, white where it lets something through; the largest are copied no more often than needed."""
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow cuts off what is above 255 in a picture of more bits, where it should scale."""
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.float32)
    return Image.fromarray(
        (values / (65535 if picture.mode != "I" or values.max() > 255 else 255) * 255).round().astype(np.uint8)
    )


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in [0, 1], on any device, as Pillow's RGB."""
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().contiguous()
    return Image.fromarray(pixels.numpy())


def _autoencoder(host: Host, device: torch.device) -> list[float]:
    """What tells the host's autoencoder from others, wherever its weights are: its latents of shades of colours."""
    width, height = host.resolution
    shades = torch.linspace(0, 1, 3 * height * width, device=device).reshape(1, 3, height, width)
    return [round(mean, 2) for mean in host.encode_images(shades).float().mean((0, 2, 3)).tolist()]


@torch.no_grad()
def cache_images(
    host: Host,
    found: Found,
    folder: str | Path,
    broken: str = "stop",
    affixes: Affixes = NO_AFFIXES,
    world: World = ALONE,
) -> Iterator[tuple[int, Tensor]]:
    """Encode pictures once into latents and conditioning under `folder`; captions get `affixes`, as prompts do.

    Yields (number done so far, the newest latents (n, C, H, W)) after each shard; resumable as `make_pairs`. One that
    cannot be read is left out, in `found`, if `broken` is "skip"; else, or if none is left, raises DataError.
    """
    pictures, folder = found.pictures, Path(folder)
    device = host.denoiser.device
    stamps = [f"{picture.stamp} {picture.text}" for picture in pictures]
    about = [host.base_hash, host.text_hash, _autoencoder(host, device), host.resolution, *stamps]
    about += [affixes.in_recipe()] if affixes.in_recipe() else []
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    captions = [each for picture in pictures for each in affixes.both(picture.text)]
    conditioning = Conditioning(host, captions, folder, key, replace_others=True)
    done, wrong = 0, [""]
    for first in range(0, len(pictures), SHARD):
        path = folder / f"images-{first:07d}.safetensors"
        part = pictures[first : first + SHARD]
        with world.first():  # what one has encoded the others read
            latents, texts, wrong = _stored(path, key)
            if len(texts) + len(wrong) < len(part) or (wrong and broken == "stop"):
                latents, kept, wrong = _encoded(host, part, broken)
                texts = [part[i].text for i in kept]
                if texts:
                    said = {WRONG: json.dumps(wrong), KEPT: json.dumps(kept)}
                    write_shard(path, Shard(latents, texts), key, said | affixes.in_recipe())
                else:
                    path.unlink(missing_ok=True)
            if texts:
                conditioning.of([each for text in texts for each in affixes.both(text)])
        for words in wrong:
            found.leave(BROKEN, "", words)
        if texts:
            done += len(texts)
            yield first + len(part), latents
    if not done:
        raise DataError(f"none of the {len(pictures)} pictures of {found.place} can be read, the first: {wrong[0]}")


def _stored(path: Path, key: str) -> tuple[Tensor, list[str], list[str]]:
    """What a file holds already: latents, their captions, and what was said of those that could not be read."""
    if path.exists():
        try:
            shard = read_shard(path, key)
            with said_of(path):
                return shard.latents, shard.prompts, texts_of(read_tensors(path)[1].get(WRONG, "[]"))
        except DataError as error:
            log.warning("%s", error)
    return torch.empty(0), [], []


def _encoded(host: Host, part: Sequence[Picture], broken: str) -> tuple[Tensor, list[int], list[str]]:
    """Pictures as latents (n, C, H, W), which of them these are, and what is wrong with those that are left out."""
    latents, kept, wrong = [], [], []
    for first in range(0, len(part), AT_ONCE):
        loaded = []
        for i, picture in enumerate(part[first : first + AT_ONCE], first):
            try:
                loaded.append(load_picture(picture, host.resolution))
                kept.append(i)
            except DataError as error:
                if broken == "stop":
                    raise
                wrong.append(str(error))
        if loaded:
            latents.append(host.encode_images(torch.stack(loaded).to(host.denoiser.device)).float().cpu())
    return torch.cat(latents) if latents else torch.empty(0), kept, wrong


def load_images(folder: str | Path, count: int) -> Samples:
    """What `cache_images` has encoded of `count` pictures; raises DataError if it is broken."""
    return load_samples(folder, "images", count)


def with_pictures(samples: Samples, folder: str | Path, found: Found, size: tuple[int, int]) -> Samples:
    """What `load_images` gives of the pictures that are found, whose `pictures` read one again, at (width, height).

    Reading raises DataError for a file that has gone. Files from before they said which they hold give none.
    """
    folder, rows = Path(folder), []
    for first in range(0, len(found.pictures), SHARD):
        path = folder / f"images-{first:07d}.safetensors"
        if path.exists():
            about = read_tensors(path)[1]
            with said_of(path):
                part = range(min(SHARD, len(found.pictures) - first))
                kept = json.loads(about[KEPT]) if KEPT in about else [*part]
                rows += [first + part[i] for i in kept]
    if len(rows) != len(samples):  # of files from before they said which
        return samples
    return replace(samples, pictures=lambda row: load_picture(found.pictures[rows[row]], size))
