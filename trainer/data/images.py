"""Captioned pictures of one's own, and their latents."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..host import Host
from .conditioning import Conditioning
from .files import DataError, lines_of, log, path_of, read_text, reason
from .samples import SHARD, Samples, Shard, load_samples, read_shard, write_shard

PICTURES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
CAPTIONS = (".txt", ".caption")
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow's decoders raise


def read_image_folder(folder: str | Path) -> list[tuple[Path, str]]:
    """Pictures of a folder with their captions.

    These are in a table `metadata.jsonl` or `metadata.csv` (file_name, text), or in a .txt or .caption beside each.
    Raises DataError for a folder without pictures, or a picture without a caption.
    """
    folder = Path(path_of(str(folder)))
    if not os.path.isdir(folder):  # unlike Path's, false for what no folder can be called
        raise DataError(f"image folder {folder!s:.300} does not exist: check the name")
    table = next((path for name in ("metadata.jsonl", "metadata.csv") if (path := folder / name).exists()), None)
    found = _of_table(folder, table) if table else _of_captions(folder)
    if not found:
        raise DataError(f"image folder {folder} holds no picture ({', '.join(sorted(PICTURES))})")
    empty = [path for path, text in found if not text]
    if empty:
        raise DataError(f"{len(empty)} pictures have an empty caption, the first is {empty[0]}: write what it shows")
    return found


def _of_captions(folder: Path) -> list[tuple[Path, str]]:
    """Pictures with a caption's file beside each."""
    # Names that begin with a dot are the system's: macOS leaves `._a.png` beside `a.png`.
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    captions = {p.with_suffix(""): p for p in files if p.suffix.lower() in CAPTIONS}
    paths = [p for p in files if p.suffix.lower() in PICTURES]
    missing = [p for p in paths if p.with_suffix("") not in captions]
    if missing:
        raise DataError(f"{len(missing)} pictures have no caption, the first is {missing[0]}: write it to a .txt")
    return [(p, read_text(captions[p.with_suffix("")]).strip()) for p in paths]


def _of_table(folder: Path, table: Path) -> list[tuple[Path, str]]:
    """Pictures and captions of a table's rows."""
    text = read_text(table)
    try:
        if table.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [json.loads(line) for line in lines_of(text) if line.strip()]
        pairs = [(row["file_name"], row["text"]) for row in rows]
        if not all(isinstance(value, str) for pair in pairs for value in pair):
            raise ValueError("a value is no text")
    except (ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise DataError(f"{table}: every row must have file_name and text ({error!s:.200})") from None
    return [(_below(folder, name, table), text.strip()) for name, text in pairs]


def _below(folder: Path, name: str, table: Path) -> Path:
    """The picture of a table's row; raises DataError for one that lies elsewhere."""
    path = folder / name
    try:
        if not path.exists():
            path = folder / name.replace("\\", "/")  # as Windows writes it
            path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{table} names {name[:80]!r}, which no file can be called ({error.args[-1]:.80})") from None
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):
        raise DataError(f"{table} names {name[:200]!r}, which is not in its folder: move it there")
    return path


def check_pictures(found: Sequence[tuple[Path, str]]) -> None:
    """Raise DataError if one of the pictures is missing or broken, without decoding them all."""
    for path, _ in found:
        try:
            with Image.open(path) as file:
                file.verify()
        except UNREADABLE as error:
            raise DataError(f"picture {path} cannot be read ({reason(error)}): replace or remove it") from None


def load_picture(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture on white, scaled and cropped about its centre to (width, height) -> (3, height, width) in [0, 1].

    Raises DataError for a file that cannot be read.
    """
    width, height = size
    try:
        with Image.open(path) as file:
            picture = _on_white(_eight_bits(ImageOps.exif_transpose(file)))
    except UNREADABLE as error:
        raise DataError(f"picture {path} cannot be read ({reason(error)}): replace or remove it") from None
    scale = max(width / picture.width, height / picture.height)
    scaled = picture.resize((max(width, round(picture.width * scale)), max(height, round(picture.height * scale))))
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    cropped = scaled.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 255


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
def cache_images(host: Host, folder: str | Path, cache: str | Path) -> Iterator[tuple[int, Tensor]]:
    """Encode a captioned image folder once into latents and conditioning under `cache`.

    Yields (number done so far, the newest latents (n, C, H, W)) after each shard; resumable as `make_pairs`.
    Raises DataError for a folder or picture that cannot be used.
    """
    found = read_image_folder(folder)
    stamp = [f"{p.name} {p.stat().st_size if p.exists() else 0} {text}" for p, text in found]
    device = host.denoiser.device
    about = [host.base_hash, host.text_hash, _autoencoder(host, device), host.resolution, *stamp]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    conditioning = Conditioning(host, [text for _, text in found], Path(cache), key, replace_others=True)
    for first in range(0, len(found), SHARD):
        path = Path(cache) / f"images-{first:07d}.safetensors"
        part = found[first : first + SHARD]
        texts = [text for _, text in part]
        try:
            latents = read_shard(path, key).latents if path.exists() else None
        except DataError as error:
            log.warning("%s", error)
            latents = None
        if latents is None:
            pictures = torch.stack([load_picture(p, host.resolution) for p, _ in part])
            latents = torch.cat([host.encode_images(chunk.to(device)).float().cpu() for chunk in pictures.split(8)])
            write_shard(path, Shard(latents, texts), key)
        conditioning.of(texts)
        yield first + len(part), latents


def load_images(cache: str | Path, count: int) -> Samples:
    """What `cache_images` has encoded of `count` pictures; raises DataError if it is broken."""
    return load_samples(cache, "images", count)
