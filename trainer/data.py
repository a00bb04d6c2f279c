"""Prompts, captioned pictures, and teacher pairs that are made once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.denoiser import Cond, Guided
from ..core.sampling import TEACHER_SAMPLERS, seeded_noise, trailing_sigmas
from .config import Config
from .host import Host
from .precision import autocast

log = logging.getLogger(__name__)

SHARD = 64  # samples in a file: what an interruption can cost
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow's decoders raise


class DataError(ValueError):
    """Data that cannot be used: the message names the file and says what to do."""


class OtherRun(DataError):
    """Samples on disk that another model or other settings made: they are never overwritten."""


def read_prompts(path: str | Path) -> list[str]:
    """Lines of a text file, empty ones and those that begin with # left out.

    Raises DataError for a missing file or one without a prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"prompt file {path} does not exist: check the name")
    try:
        prompts = prompt_lines(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"prompt file {path} is no UTF-8 text: save it as plain text, one prompt a line") from None
    if not prompts:
        raise DataError(f"prompt file {path} holds no prompt: write one a line")
    return prompts


def prompt_lines(text: str) -> list[str]:
    """The lines of a text that are prompts: not empty, and not begun with #."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


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


@dataclass(frozen=True)
class Samples:
    """Latents (N, C, H, W) with their prompts and conditions; pairs also have the seed (N,) of their noise."""

    latents: Tensor
    cond: Cond
    prompts: list[str]
    seeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def noise(self, rows: Tensor) -> Tensor:
        """The unit noise (B, C, H, W) that the given pairs were made from."""
        if self.seeds is None:
            raise ValueError("pictures have no noise: only teacher pairs do")
        return seeded_noise(self.seeds[rows].tolist(), self.latents.shape[1:])

    @staticmethod
    def cat(parts: Sequence[Samples]) -> Samples:
        seeds = [p.seeds for p in parts if p.seeds is not None]
        return Samples(
            torch.cat([p.latents for p in parts]),
            Cond.cat([p.cond for p in parts]),
            [text for p in parts for text in p.prompts],
            torch.cat(seeds) if seeds else None,
        )


def write_shard(path: Path, samples: Samples, key: str) -> None:
    """Write samples with a checksum, whole or not at all. `key` says how they were made."""
    tensors = {"latents": samples.latents.half(), "context": samples.cond.context.half()}
    if samples.cond.pooled is not None:
        tensors["pooled"] = samples.cond.pooled.half()
    tensors |= {f"extra.{k}": v for k, v in samples.cond.extra.items()}
    if samples.seeds is not None:
        tensors["seeds"] = samples.seeds
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    about = {"key": key, "prompts": json.dumps(samples.prompts), "checksum": checksum(tensors)}
    write_whole(path, save(tensors, about))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file so that a crash or a full disk leaves the old one or the new one, never a half.

    Raises OSError, which says what to do.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True) if part.parent.exists() else None
        if not isinstance(error, (OSError, SafetensorError)):  # a library's own file operations fail with the latter
            raise
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path} ({reason}): free some space or choose another folder") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; raises OSError, which says what to do."""
    with whole_file(path) as part:
        part.write_bytes(content)


def checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(torch.uint8).numpy().tobytes() if tensors[name].ndim else b"")
    return digest.hexdigest()


def read_shard(path: Path, key: str | None = None) -> Samples:
    """The samples of one file.

    Raises DataError if it is broken, or was made in another way than `key`.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - a safetensors file is no dict
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} is broken ({error}): delete it and run again, only its samples are made anew"
        ) from None
    if about.get("checksum") != checksum(tensors):
        raise DataError(f"{path} is corrupt (wrong checksum): delete it and run again, only its samples are made anew")
    if key is not None and about["key"] != key:
        raise OtherRun(f"{path} was made with other settings or another model: use another folder, or delete this one")
    extra = {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}
    pooled = tensors["pooled"].float() if "pooled" in tensors else None
    cond = Cond(tensors["context"].float(), pooled, extra)
    return Samples(tensors["latents"].float(), cond, json.loads(about["prompts"]), tensors.get("seeds"))


def pairs_key(host: Host, config: Config, prompts: Sequence[str]) -> str:
    """What decides a pair: model, sampler, guidance, size, prompts and seed."""
    made = (config.pair_sampler, config.pair_steps, config.guidance, config.seed, host.latent_shape)
    text = json.dumps([host.base_hash + host.text_hash, *made, *prompts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@torch.no_grad()
def make_pairs(host: Host, config: Config, prompts: Sequence[str], folder: str | Path) -> Iterator[tuple[int, Samples]]:
    """Make `config.pairs` teacher pairs in `folder`, or what is missing of them.

    Yields (number made so far, the newest samples) after each batch; closing the generator, or an
    error, keeps what is made, and the next call goes on. Pair k has noise seed
    `config.seed * 1_000_000 + k` and prompt k, the prompts repeating. A broken shard is made again.
    """
    if not prompts:
        raise DataError("no prompts to make teacher pairs from: give at least one")
    folder = Path(folder)
    key = pairs_key(host, config, prompts)
    sample = TEACHER_SAMPLERS[config.pair_sampler]
    schedule = host.denoiser.schedule
    sigmas = trailing_sigmas(schedule, config.pair_steps)
    device = host.denoiser.device
    uncond = host.encode_text([""]).to(device)
    for first in range(0, config.pairs, SHARD):
        path = folder / f"pairs-{first:07d}.safetensors"
        count = min(SHARD, config.pairs - first)
        parts = _begun(path, key)
        begun = made = sum(map(len, parts))
        if made >= count:
            yield first + count, parts[0]
            continue
        numbers = range(first + made, first + count)
        texts = [prompts[i % len(prompts)] for i in numbers]
        seeds = torch.tensor([config.seed * 1_000_000 + i for i in numbers])
        whole = host.encode_text(texts)
        try:
            for rows in torch.arange(count - begun).split(config.batch_size):
                cond = whole.rows(rows)
                noise = seeded_noise(seeds[rows].tolist(), host.latent_shape, device)
                x = schedule.add_noise(torch.zeros_like(noise), noise, sigmas[:1].to(device))
                model = Guided(host.denoiser, cond.to(device), uncond, config.guidance)
                with autocast(config, device):
                    latents = sample(model, x, sigmas.to(device)).float().cpu()
                parts.append(Samples(latents, cond.to("cpu"), [texts[i] for i in rows], seeds[rows]))
                made += len(rows)
                if made < count:
                    yield first + made, parts[-1]
        finally:  # a cancelled shard keeps what is made
            if made > begun:
                write_shard(path, Samples.cat(parts), key)
        yield first + count, parts[-1]


def _begun(path: Path, key: str) -> list[Samples]:
    """What a shard holds already: nothing, or one part; raises OtherRun."""
    if not path.exists():
        return []
    try:
        return [read_shard(path, key)]
    except OtherRun:
        raise
    except DataError as error:
        log.warning("%s; making it again", error)
        return []


def load_pairs(folder: str | Path, limit: int | None = None) -> Samples:
    """All pairs of a folder, or the first `limit`; raises DataError if there are none or one file is broken."""
    paths = sorted(Path(folder).glob("pairs-*.safetensors"))
    if not paths:
        raise DataError(f"{folder} holds no teacher pairs: make them first")
    samples = Samples.cat([read_shard(p) for p in paths])
    if limit is None or limit >= len(samples):
        return samples
    seeds = None if samples.seeds is None else samples.seeds[:limit]
    return Samples(samples.latents[:limit], samples.cond.rows(slice(limit)), samples.prompts[:limit], seeds)


@torch.no_grad()
def cache_images(host: Host, folder: str | Path, cache: str | Path) -> Iterator[tuple[int, Samples]]:
    """Encode a captioned image folder once into latents and conditions under `cache`.

    Yields (number done so far, the newest samples) after each shard; resumable as `make_pairs`.
    Raises DataError for a folder or picture that cannot be used.
    """
    found = read_image_folder(folder)
    stamp = [f"{p.name} {p.stat().st_size if p.exists() else 0} {text}" for p, text in found]
    key = hashlib.sha256(json.dumps([host.base_hash, host.resolution, *stamp]).encode()).hexdigest()[:16]
    device = host.denoiser.device
    for first in range(0, len(found), SHARD):
        path = Path(cache) / f"images-{first:07d}.safetensors"
        part = found[first : first + SHARD]
        if path.exists():
            try:
                yield first + len(part), read_shard(path, key)
                continue
            except DataError as error:
                log.warning("%s; making it again", error)
        pictures = torch.stack([load_picture(p, host.resolution) for p, _ in part])
        texts = [text for _, text in part]
        latents = torch.cat([host.encode_images(chunk.to(device)).float().cpu() for chunk in pictures.split(8)])
        samples = Samples(latents, host.encode_text(texts).to("cpu"), texts)
        write_shard(path, samples, key)
        yield first + len(part), samples
