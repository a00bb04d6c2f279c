"""Teacher pairs (noise and picture), made once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ...core.denoiser import Cond, Guidance, Guided
from ...core.exclusive import exclusive
from ...core.sampling import TEACHER_SAMPLERS, seeded_noise, trailing_sigmas
from ...core.transfer import to_device
from ..config import Config
from ..groups import OF_GUIDANCE
from ..host import Host
from ..loop.precision import as_sampled
from ..world import ALONE, World
from .affixes import NAMES, Affixes
from .conditioning import Conditioning
from .files import DataError, OtherRun, log, read_tensors
from .lock import locked
from .prompts import draw_prompts
from .samples import SHARD, Samples, Shard, load_samples, read_shard, write_shard
from .sizes import OfSize, by_size

FLAT = 1e-4  # standard deviation of latents in which there is nothing to see
ANOTHER = 2**31  # from a seed to that of another noise, which no pair has: generators tell seeds by their last 32 bits
# Of a recipe, where they are set.
ADDED = ("negative prompt", *NAMES, *(name.replace("_", " ") for name in OF_GUIDANCE))


def pairs_recipe(host: Host, config: Config, prompts: Sequence[str]) -> dict[str, str]:
    """What decides pairs, by the words in which a user knows it; `prompts` with their choices not yet drawn."""
    shares = by_size(host, config, prompts, Path())
    # A host's nodes and settings change how the same weights are read.
    levels = [f"{sigma:.4g}" for sigma in trailing_sigmas(host.denoiser.schedule, 4).tolist()]
    sampling = {"sampler": config.pair_sampler, "steps": str(config.pair_steps)}
    return {
        "model": digest(json.dumps([host.base_hash, host.text_hash, host.denoiser.prediction, levels])),
        **(host.sampling.recipe if host.sampling else sampling),
        "guidance": str(config.guidance),
        "seed": str(config.seed),
        "size": ", ".join(f"{s.host.latent_shape[2]} x {s.host.latent_shape[1]}" for s in shares) + " (of latents)",
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
def make_pairs(
    host: Host,
    config: Config,
    prompts: Sequence[str],
    folder: str | Path,
    warn: Callable[[str], None] = log.warning,
    world: World = ALONE,
) -> Iterator[tuple[int, Tensor]]:
    """Make `config.pairs` teacher pairs in `folder`, or what is missing of them.

    Yields (number made so far, the newest latents (n, C, H, W)) after each batch; closing the generator, or an
    error, keeps what is made, and the next call goes on. Pair k has noise seed
    `config.seed * 1_000_000 + k` and prompt k, the prompts repeating, of {red|blue} in them one drawn; the teacher's
    has prefix and suffix, and its guidance moves away from the negative prompt. A broken shard is made again, and so is
    a pair that is no picture, from another noise; `warn` is told of each. Raises DataError for prompts that are none
    and for a pair that is no picture again, OtherRun for pairs of another recipe, and InUse while somebody else makes
    pairs there. Of several sizes each has a folder within. The processes of a `world` share each batch.
    """
    draw_prompts(prompts, 0)  # or a text would be taken for a list of letters
    done = 0
    for share in by_size(host, config, prompts, Path(folder)):
        for made, newest in _make(share, warn, world):
            yield done + made, newest
        done += share.config.pairs


def _make(share: OfSize, warn: Callable[[str], None], world: World) -> Iterator[tuple[int, Tensor]]:
    """`make_pairs` of one size."""
    host, config, prompts, folder = share.host, share.config, share.prompts, share.folder
    texts = draw_prompts(prompts, config.pairs, config.seed)
    recipe, key = pairs_recipe(host, config, prompts), pairs_key(host, config, prompts)
    teacher = Teacher(host, config, world=world)
    affixes = Affixes.of(config)
    encoded = [each for text in texts for each in affixes.both(text)]
    _check_space(folder, pairs_size(host.latent_shape, teacher.uncond, config.pairs, len(set(encoded))))
    conditioning = Conditioning(host, encoded, folder, key)
    making = False
    with ExitStack() as stack:
        for first in range(0, config.pairs, SHARD):
            path = folder / f"pairs-{first:07d}.safetensors"
            count = min(SHARD, config.pairs - first)
            begun = _begun(path, key, recipe, warn)
            if len(begun) < count and not making:  # runs that find all made may share it
                making = True
                if world.leads:
                    stack.enter_context(locked(folder))
                world.wait_for_first()
                begun = _begun(path, key, recipe, warn)
            of_shard = texts[first : first + count]
            with world.first():  # what one has encoded the others read
                cond = conditioning.of([affixes.teacher(text) for text in of_shard])
                conditioning.of([affixes.student(text) for text in of_shard])
            if len(begun) >= count:
                yield first + count, begun.latents[:count]
                continue
            assert begun.seeds is not None
            parts, made = [begun.latents], len(begun)
            seeds = config.seed * 1_000_000 + torch.arange(first, first + count)
            seeds[:made] = begun.seeds
            try:
                for rows in torch.arange(made, count).split(config.batch_size):
                    latents = teacher.pictures(seeds[rows], cond.rows(rows))
                    for bad in _no_pictures(latents):
                        row = rows[bad : bad + 1]
                        seeds[row] += ANOTHER
                        latents[bad : bad + 1] = teacher.pictures(seeds[row], cond.rows(row))
                        prompt = of_shard[int(row)]
                        if _no_pictures(latents[bad : bad + 1]):
                            raise DataError(_no_picture(first + int(row), prompt))
                        warn(f"pair {first + int(row)} ({prompt[:80]!r}) was no picture: made from another noise")
                    parts.append(latents)
                    made += len(rows)
                    if made < count:
                        yield first + made, latents
            finally:  # a cancelled shard keeps what is made
                if made > len(begun) and world.leads:
                    write_shard(path, Shard(torch.cat(parts), of_shard[:made], seeds[:made]), key, recipe)
            yield first + count, parts[-1]
    world.wait_for_first()  # the last file is there


class Teacher:
    """The model as it makes pairs: its sampler, its levels (`sigmas`) and its guidance, by default the settings'.

    Where the host has a `sampling` of its own it is that, but at other `sigmas`.
    """

    def __init__(
        self,
        host: Host,
        config: Config,
        guidance: Guidance | None = None,
        sigmas: Tensor | None = None,
        world: World = ALONE,
    ):
        self.host, self.config, self.world = host, config, world
        self.guidance = Guidance.of(config) if guidance is None else guidance
        self.own = host.sampling if sigmas is None else None
        known = self.own.sigmas if self.own else sigmas
        self.sigmas = trailing_sigmas(host.denoiser.schedule, config.pair_steps) if known is None else known
        self.uncond = host.encode_text([config.negative_prompt]).to(host.denoiser.device)

    def pictures(self, seeds: Tensor, cond: Cond) -> Tensor:
        """Seeds of the noise (B,) and conditioning of B rows -> latents (B, C, H, W), on the CPU.

        Each process makes its own rows, and has all.
        """
        own = self.world.rows(len(seeds))
        some = own.stop > own.start
        made = self._pictures(seeds[own], cond.rows(own)) if some else torch.empty(0, *self.host.latent_shape)
        return self.world.gather(made, len(seeds))

    def _pictures(self, seeds: Tensor, cond: Cond) -> Tensor:
        denoiser = self.host.denoiser
        noise = seeded_noise(seeds.tolist(), self.host.latent_shape, denoiser.device)
        model = Guided(denoiser, cond.to_device(noise.device), self.uncond, self.guidance)
        with exclusive(denoiser.backbone), as_sampled(self.config, denoiser):
            return self._sample(model, noise, seeds.tolist()).float().cpu()

    def _sample(self, model: Guided, noise: Tensor, seeds: list[int]) -> Tensor:
        if self.own:
            return self.own(model, noise, seeds)
        first = to_device(self.sigmas[:1], noise.device)
        x = model.schedule.add_noise(torch.zeros_like(noise), noise, first)
        return TEACHER_SAMPLERS[self.config.pair_sampler](model, x, self.sigmas)


def _no_pictures(latents: Tensor) -> list[int]:
    """The rows of latents (B, C, H, W) that are no pictures: NaN, infinity, or one colour all over."""
    finite = latents.isfinite().all((1, 2, 3))
    varied = latents.std((2, 3)).amax(1) > FLAT
    return (~(finite & varied)).nonzero().flatten().tolist()


def _no_picture(number: int, prompt: str) -> str:
    """What to say of a pair that is no picture from any noise."""
    return (
        f"the teacher's picture of pair {number} ({prompt[:80]!r}) is no picture: its numbers are NaN or infinity, or "
        "all the same, from two noises. Set precision to float32, lower guidance, or use another checkpoint or VAE; "
        "the pairs before it are kept"
    )


def _begun(path: Path, key: str, recipe: Mapping[str, str], warn: Callable[[str], None]) -> Shard:
    """What a shard holds already, if any, copied so that its file can be replaced; raises OtherRun."""
    nothing = Shard(torch.empty(0), [], torch.empty(0, dtype=torch.long))
    if not path.exists():
        return nothing
    try:
        found = read_shard(path, key)
        seeds = nothing.seeds if found.seeds is None else found.seeds.clone()
        return Shard(found.latents.float(), found.prompts, seeds)
    except OtherRun:
        changed = changes(read_tensors(path)[1], recipe)
        raise OtherRun(
            f"the pairs in {path.parent} are others ({changed}): change that back, or use another name or folder"
        ) from None
    except DataError as error:
        warn(str(error))
        return nothing


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
