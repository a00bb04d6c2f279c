"""Latents with their prompts and conditions, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...core.denoiser import Cond
from ...core.sampling import seeded_noise
from .files import DataError, OtherRun, checksum, write_whole

SHARD = 64  # samples in a file: what an interruption can cost


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
