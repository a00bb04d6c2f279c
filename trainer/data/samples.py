"""Latents with their prompts and conditioning: in memory, or left in their files and read a batch at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...core.denoiser import Cond
from ...core.sampling import seeded_noise
from .affixes import Affixes
from .conditioning import read_conditioning
from .files import DataError, check_rows, read_tensors, said_of, texts_of, write_tensors
from .stored import StoredCond, StoredLatents

SHARD = 64  # samples in a file: what an interruption can cost
KINDS = {"pairs": "teacher pairs", "images": "encoded pictures"}


@dataclass(frozen=True)
class Samples:
    """Latents (N, C, H, W) with their prompts and conditioning; pairs also have the seed (N,) of their noise.

    `cond` is what the student is given, `teacher_cond` what the teacher was where that is another text. Of real
    pictures `pictures(row)` reads one as its file has it, (3, height, width) in [0, 1].
    """

    latents: Tensor | StoredLatents
    cond: Cond | StoredCond
    prompts: list[str]
    seeds: Tensor | None = None
    teacher_cond: Cond | StoredCond | None = None
    pictures: Callable[[int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def noise(self, rows: Tensor) -> Tensor:
        """The unit noise (B, C, H, W) that the given pairs were made from."""
        if self.seeds is None:
            raise ValueError("pictures have no noise: only teacher pairs do")
        return seeded_noise(self.seeds[rows].tolist(), self.latents.shape[1:])

    def select(self, rows: Tensor) -> Samples:
        """The given rows; what lies in files stays there."""
        return Samples(
            self.latents.select(rows) if isinstance(self.latents, StoredLatents) else self.latents[rows],
            _select(self.cond, rows),
            [self.prompts[i] for i in rows.tolist()],
            None if self.seeds is None else self.seeds[rows],
            None if self.teacher_cond is None else _select(self.teacher_cond, rows),
        )


def _select(cond: Cond | StoredCond, rows: Tensor) -> Cond | StoredCond:
    return cond.select(rows) if isinstance(cond, StoredCond) else cond.rows(rows)


@dataclass(frozen=True)
class Shard:
    """What one file holds of samples: all but their conditioning, which `conditioning` keeps by prompt."""

    latents: Tensor  # (n, C, H, W)
    prompts: list[str]
    seeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)


def write_shard(path: Path, shard: Shard, key: str, recipe: Mapping[str, str] | None = None) -> None:
    """Write samples in half precision, whole or not at all. `key` says how they were made, `recipe` in words."""
    seeds = {} if shard.seeds is None else {"seeds": shard.seeds}
    about = {"key": key, "texts": json.dumps(shard.prompts)} | dict(recipe or {})
    write_tensors(path, {"latents": shard.latents.half()} | seeds, about)


def read_shard(path: Path, key: str | None = None) -> Shard:
    """The samples of one file, mapped; raises as `read_tensors`."""
    tensors, about = read_tensors(path, key)
    with said_of(path):
        latents, prompts, seeds = tensors["latents"], texts_of(about["texts"]), tensors.get("seeds")
        check_rows(4, len(prompts), latents)
        if seeds is not None:
            check_rows(1, len(prompts), seeds)
        return Shard(latents, prompts, seeds)


def load_samples(folder: str | Path, kind: str, limit: int | None = None) -> Samples:
    """The samples of a folder's files {kind}-*.safetensors, or the first `limit`, left where they are.

    Raises DataError if there are none or fewer, if a file is broken, or if they were not made together.
    """
    folder = Path(folder)
    paths = sorted(folder.glob(f"{kind}-*.safetensors"))
    if not paths:
        raise DataError(f"{folder} holds no {KINDS[kind]}: run again, which makes them")
    about = read_tensors(paths[0])[1]
    key, affixes = about.get("key", ""), Affixes.of_recipe(about)
    shards: list[Shard] = []
    for path in paths:
        if limit is None or sum(map(len, shards)) < limit:
            shards.append(read_shard(path, key))
    prompts = [prompt for shard in shards for prompt in shard.prompts][:limit]
    if limit is not None and len(prompts) < limit:
        raise DataError(
            f"{folder} holds {len(prompts)} of {limit} {KINDS[kind]}, others were deleted while this ran: run it "
            "again, only what is missing is made anew"
        )
    seeds = [shard.seeds for shard in shards if shard.seeds is not None]
    if len({shard.latents.shape[1:] for shard in shards}) > 1 or len(seeds) not in (0, len(shards)):
        raise DataError(f"{folder} holds {KINDS[kind]} of other kinds: delete the files that do not belong there")
    return Samples(
        StoredLatents([shard.latents for shard in shards], torch.arange(len(prompts))),
        read_conditioning(folder, key, [affixes.student(prompt) for prompt in prompts]),
        prompts,
        torch.cat(seeds)[:limit] if seeds else None,
        read_conditioning(folder, key, [affixes.teacher(p) for p in prompts]) if affixes.baked else None,
    )
