"""Teacher pairs (noise and picture), made once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ...core.denoiser import Cond, Guidance, Guided
from ...core.exclusive import exclusive
from ...core.sampling import TEACHER_SAMPLERS, seeded_noise, trailing_sigmas
from ..config import Config
from ..groups import OF_GUIDANCE
from ..host import Host
from ..loop.precision import autocast
from .affixes import NAMES, Affixes
from .conditioning import Conditioning
from .files import DataError, OtherRun, log, read_tensors
from .lock import locked
from .prompts import draw_prompts
from .samples import SHARD, Samples, Shard, load_samples, read_shard, write_shard

# Of a recipe, where they are set.
ADDED = ("negative prompt", *NAMES, *(name.replace("_", " ") for name in OF_GUIDANCE))


def pairs_recipe(host: Host, config: Config, prompts: Sequence[str]) -> dict[str, str]:
    """What decides pairs, by the words in which a user knows it; `prompts` with their choices not yet drawn."""
    _, height, width = host.latent_shape
    # A host's nodes and settings change how the same weights are read.
    levels = [f"{sigma:.4g}" for sigma in trailing_sigmas(host.denoiser.schedule, 4).tolist()]
    return {
        "model": digest(json.dumps([host.base_hash, host.text_hash, host.denoiser.prediction, levels])),
        "sampler": config.pair_sampler,
        "steps": str(config.pair_steps),
        "guidance": str(config.guidance),
        "seed": str(config.seed),
        "size": f"{width} x {height} (of latents)",
        "prompts": digest(json.dumps(list(prompts))),
    } | _words(config)


def _words(config: Config) -> dict[str, str]:
    """What the settings add to the prompts; nothing where they add nothing, so that older pairs stay what they are."""
    negative = {"negative prompt": config.negative_prompt} if config.negative_prompt else {}
    given = {name.replace("_", " "): f"{getattr(config, name):g}" for name in OF_GUIDANCE if _changed(config, name)}
    return negative | given | Affixes.of(config).in_recipe()


def _changed(config: Config, name: str) -> bool:
    return getattr(config, name) != Config.__dataclass_fields__[name].default


def pairs_key(host: Host, config: Config, prompts: Sequence[str]) -> str:
    """The recipe of pairs as one short name."""
    return digest(json.dumps(pairs_recipe(host, config, prompts)))


def digest(text: str) -> str:
    """A text as a short name."""
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
    `config.seed * 1_000_000 + k` and prompt k, the prompts repeating, of {red|blue} in them one drawn; the teacher's
    has prefix and suffix, and its guidance moves away from the negative prompt. A broken shard is made again. Raises
    DataError for prompts that are none, OtherRun for pairs of another recipe, and InUse while somebody else makes pairs
    there.
    """
    texts = draw_prompts(prompts, config.pairs, config.seed)
    folder = Path(folder)
    recipe, key = pairs_recipe(host, config, prompts), pairs_key(host, config, prompts)
    sample = TEACHER_SAMPLERS[config.pair_sampler]
    schedule = host.denoiser.schedule
    sigmas = trailing_sigmas(schedule, config.pair_steps)
    device = host.denoiser.device
    uncond = host.encode_text([config.negative_prompt]).to(device)
    affixes = Affixes.of(config)
    encoded = [each for text in texts for each in (affixes.teacher(text), affixes.student(text))]
    _check_space(folder, pairs_size(host.latent_shape, uncond, config.pairs, len(set(encoded))))
    conditioning = Conditioning(host, encoded, folder, key)
    making = False
    with ExitStack() as stack:
        for first in range(0, config.pairs, SHARD):
            path = folder / f"pairs-{first:07d}.safetensors"
            count = min(SHARD, config.pairs - first)
            parts = _begun(path, key, recipe)
            if sum(map(len, parts)) < count and not making:  # runs that find all made may share it
                making = True
                stack.enter_context(locked(folder))
                parts = _begun(path, key, recipe)
            begun = made = sum(map(len, parts))
            numbers = range(first, first + count)
            of_shard = texts[first : first + count]
            cond = conditioning.of([affixes.teacher(text) for text in of_shard])
            conditioning.of([affixes.student(text) for text in of_shard])
            if made >= count:
                yield first + count, parts[0][:count]
                continue
            seeds = torch.tensor([config.seed * 1_000_000 + i for i in numbers])
            try:
                for rows in torch.arange(begun, count).split(config.batch_size):
                    noise = seeded_noise(seeds[rows].tolist(), host.latent_shape, device)
                    x = schedule.add_noise(torch.zeros_like(noise), noise, sigmas[:1].to(device))
                    model = Guided(host.denoiser, cond.rows(rows).to(device), uncond, Guidance.of(config))
                    with exclusive(host.denoiser.backbone), autocast(config, host.denoiser):
                        latents = sample(model, x, sigmas.to(device)).float().cpu()
                    _check_finite(latents, {first + row: of_shard[row] for row in rows.tolist()})
                    parts.append(latents)
                    made += len(rows)
                    if made < count:
                        yield first + made, parts[-1]
            finally:  # a cancelled shard keeps what is made
                if made > begun:
                    write_shard(path, Shard(torch.cat(parts), of_shard[:made], seeds[:made]), key, recipe)
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


def _begun(path: Path, key: str, recipe: Mapping[str, str]) -> list[Tensor]:
    """The latents that a shard holds already, if any, copied so that its file can be replaced; raises OtherRun."""
    if not path.exists():
        return []
    try:
        return [read_shard(path, key).latents.float()]
    except OtherRun:
        changed = changes(read_tensors(path)[1], recipe)
        raise OtherRun(
            f"the pairs in {path.parent} are others ({changed}): change that back, or use another name or folder"
        ) from None
    except DataError as error:
        log.warning("%s", error)
        return []


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two recipes of pairs or pictures, in words; empty if nothing does."""
    digests = {"model": "another model", "prompts": "other prompts", "pictures": "other pictures or captions"}
    return " and ".join(
        digests.get(name, f"{name} was {before.get(name) or 'empty'} and is {now.get(name) or 'empty'}")
        for name in dict.fromkeys([*now, *(n for n in ADDED if n in before)])
        if before.get(name) != now.get(name)
    )


def load_pairs(folder: str | Path, limit: int | None = None) -> Samples:
    """All pairs of a folder, or the first `limit`; raises DataError if there are none or one file is broken."""
    return load_samples(folder, "pairs", limit)
