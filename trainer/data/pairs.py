"""Teacher pairs (noise and picture), made once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...core.denoiser import Cond, Guided
from ...core.sampling import TEACHER_SAMPLERS, seeded_noise, trailing_sigmas
from ..config import Config
from ..host import Host
from ..loop.precision import autocast
from .conditioning import Conditioning
from .files import DataError, OtherRun, log
from .samples import SHARD, Samples, Shard, load_samples, read_shard, write_shard


def pairs_key(host: Host, config: Config, prompts: Sequence[str]) -> str:
    """What decides a pair: model, sampler, guidance, size, prompts and seed."""
    made = (config.pair_sampler, config.pair_steps, config.guidance, config.seed, host.latent_shape)
    text = json.dumps([host.base_hash + host.text_hash, *made, *prompts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pairs_size(latent_shape: Sequence[int], cond: Cond, pairs: int, prompts: int) -> int:
    """Bytes on disk of teacher pairs with so many distinct prompts; `cond` is the conditioning of one."""
    tensors = [cond.context, *([] if cond.pooled is None else [cond.pooled]), *cond.extra.values()]
    each = sum(min(t.element_size(), 2) * t[0].numel() for t in tensors)
    return pairs * (2 * math.prod(latent_shape) + 8) + prompts * each


def _check_space(folder: Path, needed: int) -> None:
    """Raise DataError if what is missing of `needed` bytes does not fit on the disk of `folder`."""
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    disk = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(disk).free
    if needed - there > free:
        raise DataError(
            f"the teacher pairs take about {(needed - there) / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are "
            "free there: make room, choose another folder, or make fewer pairs"
        )


@torch.no_grad()
def make_pairs(host: Host, config: Config, prompts: Sequence[str], folder: str | Path) -> Iterator[tuple[int, Tensor]]:
    """Make `config.pairs` teacher pairs in `folder`, or what is missing of them.

    Yields (number made so far, the newest latents (n, C, H, W)) after each batch; closing the generator, or an
    error, keeps what is made, and the next call goes on. Pair k has noise seed
    `config.seed * 1_000_000 + k` and prompt k, the prompts repeating. A broken shard is made again.
    """
    if isinstance(prompts, str):
        raise DataError(f"prompts is {prompts[:80]!r}: give a list of prompts")
    if not prompts:
        raise DataError("no prompts to make teacher pairs from: give at least one")
    folder = Path(folder)
    key = pairs_key(host, config, prompts)
    sample = TEACHER_SAMPLERS[config.pair_sampler]
    schedule = host.denoiser.schedule
    sigmas = trailing_sigmas(schedule, config.pair_steps)
    device = host.denoiser.device
    uncond = host.encode_text([""]).to(device)
    used = prompts[: config.pairs]
    _check_space(folder, pairs_size(host.latent_shape, uncond, config.pairs, len(set(used))))
    conditioning = Conditioning(host, used, folder, key)
    for first in range(0, config.pairs, SHARD):
        path = folder / f"pairs-{first:07d}.safetensors"
        count = min(SHARD, config.pairs - first)
        parts = _begun(path, key)
        begun = made = sum(map(len, parts))
        numbers = range(first, first + count)
        texts = [prompts[i % len(prompts)] for i in numbers]
        cond = conditioning.of(texts)
        if made >= count:
            yield first + count, parts[0][:count]
            continue
        seeds = torch.tensor([config.seed * 1_000_000 + i for i in numbers])
        try:
            for rows in torch.arange(begun, count).split(config.batch_size):
                noise = seeded_noise(seeds[rows].tolist(), host.latent_shape, device)
                x = schedule.add_noise(torch.zeros_like(noise), noise, sigmas[:1].to(device))
                model = Guided(host.denoiser, cond.rows(rows).to(device), uncond, config.guidance)
                with autocast(config, device):
                    latents = sample(model, x, sigmas.to(device)).float().cpu()
                _check_finite(latents, {first + row: texts[row] for row in rows.tolist()})
                parts.append(latents)
                made += len(rows)
                if made < count:
                    yield first + made, parts[-1]
        finally:  # a cancelled shard keeps what is made
            if made > begun:
                write_shard(path, Shard(torch.cat(parts), texts[:made], seeds[:made]), key)
        yield first + count, parts[-1]


def _check_finite(latents: Tensor, prompts: dict[int, str]) -> None:
    """Raise DataError if one of the latents (B, C, H, W) of pairs, by number, is no picture."""
    for number, x0 in zip(prompts, latents, strict=True):
        if not x0.isfinite().all():
            raise DataError(
                f"the teacher's picture of pair {number} ({prompts[number][:80]!r}) is no picture: its numbers are NaN "
                "or infinity. Set precision to float32, lower guidance, or use another checkpoint or VAE; the pairs "
                "before it are kept"
            )


def _begun(path: Path, key: str) -> list[Tensor]:
    """The latents that a shard holds already, if any, copied so that its file can be replaced; raises OtherRun."""
    if not path.exists():
        return []
    try:
        return [read_shard(path, key).latents.float()]
    except OtherRun:
        raise
    except DataError as error:
        log.warning("%s; making it again", error)
        return []


def load_pairs(folder: str | Path, limit: int | None = None) -> Samples:
    """All pairs of a folder, or the first `limit`; raises DataError if there are none or one file is broken."""
    return load_samples(folder, "pairs", limit)
