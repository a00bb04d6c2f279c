"""Captioned pictures of one's own, and their latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..host import Host
from .conditioning import Conditioning
from .files import DataError, log
from .samples import SHARD, Samples, Shard, load_samples, read_shard, write_shard

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow's decoders raise


def read_image_folder(folder: str | Path) -> list[tuple[Path, str]]:
    """Pictures of a folder with their captions: `metadata.jsonl` ({file_name, text}) or a .txt beside each.

    Raises DataError for a folder without pictures, or a picture without a caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"image folder {folder} does not exist: check the name")
    table = folder / "metadata.jsonl"
    if table.exists():
        try:
            rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
            found = [(folder / r["file_name"], r["text"]) for r in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{table}: every line must be JSON with file_name and text ({error})") from None
    else:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
        missing = [p for p in paths if not p.with_suffix(".txt").exists()]
        if missing:
            raise DataError(f"{len(missing)} pictures have no caption, the first is {missing[0]}: write it to a .txt")
        found = [(p, _caption(p.with_suffix(".txt"))) for p in paths]
    if not found:
        raise DataError(f"image folder {folder} holds no picture ({', '.join(sorted(PICTURES))})")
    return found


def _caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise DataError(f"caption {path} is no UTF-8 text: save it as plain text") from None


def check_pictures(found: Sequence[tuple[Path, str]]) -> None:
    """Raise DataError if one of the pictures is missing or broken, without decoding them all."""
    for path, _ in found:
        try:
            with Image.open(path) as file:
                file.verify()
        except UNREADABLE as error:
            raise DataError(f"picture {path} cannot be read ({error}): replace or remove it") from None


def load_picture(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture on white, scaled and cropped about its centre to (width, height) -> (3, height, width) in [0, 1].

    Raises DataError for a file that cannot be read.
    """
    width, height = size
    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
    except UNREADABLE as error:
        raise DataError(f"picture {path} cannot be read ({error}): replace or remove it") from None
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    scale = max(width / picture.width, height / picture.height)
    scaled = picture.resize((max(width, round(picture.width * scale)), max(height, round(picture.height * scale))))
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    cropped = scaled.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 255


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in [0, 1], on any device, as Pillow's RGB."""
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().contiguous()
    return Image.fromarray(pixels.numpy())


@torch.no_grad()
def cache_images(host: Host, folder: str | Path, cache: str | Path) -> Iterator[tuple[int, Tensor]]:
    """Encode a captioned image folder once into latents and conditioning under `cache`.

    Yields (number done so far, the newest latents (n, C, H, W)) after each shard; resumable as `make_pairs`.
    Raises DataError for a folder or picture that cannot be used.
    """
    found = read_image_folder(folder)
    stamp = [f"{p.name} {p.stat().st_size if p.exists() else 0} {text}" for p, text in found]
    key = hashlib.sha256(json.dumps([host.base_hash, host.resolution, *stamp]).encode()).hexdigest()[:16]
    device = host.denoiser.device
    conditioning = Conditioning(host, [text for _, text in found], Path(cache), key, replace_others=True)
    for first in range(0, len(found), SHARD):
        path = Path(cache) / f"images-{first:07d}.safetensors"
        part = found[first : first + SHARD]
        texts = [text for _, text in part]
        try:
            latents = read_shard(path, key).latents if path.exists() else None
        except DataError as error:
            log.warning("%s; making it again", error)
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
