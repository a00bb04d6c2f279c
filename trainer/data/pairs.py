"""Teacher pairs (noise and picture), made once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ...core.denoiser import Guided
from ...core.sampling import TEACHER_SAMPLERS, seeded_noise, trailing_sigmas
from ..config import Config
from ..host import Host
from ..loop.precision import autocast
from .files import DataError, OtherRun, log
from .samples import SHARD, Samples, read_shard, write_shard


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
