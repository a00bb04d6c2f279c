"""What one update trains on: pairs, noise levels and noise, all drawn at once from a seeded generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.augment import NUMBERS
from ...core.denoiser import Cond, Guidance
from ...core.sampling import trailing_timesteps
from ...core.schedule import expand
from ...core.student import Student
from ...core.transfer import to_device
from ..config import Config
from ..data.samples import Samples
from ..sizes import MOST_SIZES
from ..world import ALONE, World

LARGEST_BATCH = 2**20  # rows that have noise of their own


def generator(seed: int, update: int, purpose: int = 0) -> torch.Generator:
    """Randomness of one update, told by its number alone: a resumed run draws the same."""
    return torch.Generator().manual_seed((seed * 1_000_003 + update) * 16 + purpose)


@dataclass(frozen=True)
class Some:
    """Some rows of a batch, of which a loss is the mean over those of every process."""

    rows: Tensor  # (n,) those of this process
    weight: float  # of the mean over them, so that the mean over processes is that over all
    whole: int  # how many there are in all processes

    @staticmethod
    def of(chosen: Tensor, world: World, device: torch.device) -> Some:
        """The rows of a whole batch that are chosen, by (B,) true or false on the CPU."""
        rows, whole = chosen[world.rows(len(chosen))].nonzero().flatten(), int(chosen.sum())
        return Some(to_device(rows, device), len(rows) * world.size / max(whole, 1), whole)

    def mean(self, loss: Callable[[Tensor], Tensor], beside: Tensor) -> Tensor:
        """A loss of the rows; 0, with a gradient to `beside`, where only other processes have some."""
        return self.weight * loss(self.rows) if len(self.rows) else 0.0 * beside.sum()


@dataclass(frozen=True)
class Batch:
    """One process's rows (B of them) of a batch, on the device; what decides the course is drawn on the CPU.

    Everything random is drawn for the whole batch, so that it does not depend on the number of processes.
    """

    x: Tensor  # (B, C, H, W) the student's input
    sigma: Tensor  # (B,) its level
    first: Tensor  # (B,) true where it is pure noise
    paired: Some  # the rows where that noise is the pair's own, so that the regression has one answer
    cond: Cond  # the student's
    teacher_cond: Cond  # the same but for a prefix and suffix that are baked in
    target: Tensor  # (B, C, H, W) the teacher's picture from the same noise
    positive: Tensor  # (B, C, H, W) what the discriminator takes for real
    positive_cond: Cond
    positive_key: Tensor  # (B,), on the CPU: which picture that is
    strangers: Some  # the rows of which the one before has a positive of another prompt
    stranger_cond: Cond | None  # that of the row before each, where the discriminator is to see mismatches
    renoise: Tensor  # (B,) sigma at which the discriminator sees both
    noise: Tensor  # (B, C, H, W) the noise of that
    distill_sigma: Tensor  # (B,) sigma of the distillation term
    distill_noise: Tensor
    seed: int  # of what is drawn later
    whole: int  # rows of the whole batch
    own: slice  # which of them these are

    raw: Callable[[int], Tensor | None]  # the positive of a row as its file has it, (3, height, width), if it is real

    def view(self, purpose: int) -> Tensor:
        """Numbers (B, NUMBERS) in [0, 1), on the CPU, by which pictures are cropped and augmented for a purpose."""
        draws = torch.Generator().manual_seed(self.seed * 16 + purpose)
        return torch.rand(self.whole, NUMBERS, generator=draws)[self.own]

    def noise_of(self, row: int, shape: Sequence[int]) -> Tensor:
        """Unit noise of this shape for one of these rows, on the CPU; another for every row of the whole batch."""
        draws = torch.Generator().manual_seed(self.seed * LARGEST_BATCH + self.own.start + row)
        return torch.randn(*shape, generator=draws)

    def drawn(self, draw: Callable[[tuple[int, ...]], Tensor], shape: Sequence[int]) -> Tensor:
        """These rows of what `draw` gives for as many rows as the whole batch has, (B, ...) in this `shape`."""
        return draw((self.whole, *shape[1:]))[self.own]


@dataclass(frozen=True)
class GuidanceBatch:
    """One batch of guidance distillation on the device: noisy pictures at any level."""

    x: Tensor  # (B, C, H, W)
    sigma: Tensor  # (B,) its level
    cond: Cond  # the student's
    teacher_cond: Cond  # the same but for a prefix and suffix that are baked in
    acts: Tensor  # (B,), on the CPU: where there is guidance


@dataclass(frozen=True)
class Reals:
    """Real pictures, and for each teacher pair the row (N,) of one of its prompt, -1 where there is none."""

    samples: Samples
    of_pair: Tensor

    @staticmethod
    def beside(pairs: Samples, samples: Samples) -> Reals:
        row = {prompt: i for i, prompt in enumerate(samples.prompts)}
        return Reals(samples, torch.tensor([row.get(prompt, -1) for prompt in pairs.prompts]))

    def rows(self, pairs: Tensor, other: Tensor) -> Tensor:
        """The reals of the given pairs' prompts; `other` where there is none."""
        own = self.of_pair[pairs]
        return torch.where(own >= 0, own, other)


@dataclass(frozen=True)
class Positives:
    """What the discriminator takes for real in each row of a whole batch: the pair's own picture, or a real one."""

    pairs: Samples
    rows: Tensor  # (B,) of the pairs
    reals: Samples | None
    other: Tensor  # (B,) rows of the real pictures
    take: Tensor  # (B,) whether it is the real picture

    @staticmethod
    def draw(config: Config, pairs: Samples, reals: Reals | None, rows: Tensor, draws: torch.Generator) -> Positives:
        """For rows (B,) of the pairs; without real pictures nothing is drawn."""
        if reals is None or not config.sees_pictures:
            return Positives(pairs, rows, None, rows, torch.zeros_like(rows, dtype=torch.bool))
        return Positives(pairs, rows, reals.samples, *draw_reals(config, reals, rows, draws))

    @property
    def key(self) -> Tensor:
        """Which picture each is, (B,): n is that of the n-th pair, -1 - n the n-th real one."""
        return torch.where(self.take, -1 - self.other, self.rows)

    @property
    def strangers(self) -> Tensor:
        """Whether the row before has a positive of another prompt, (B,)."""
        prompts = [self.pairs.prompts[row] for row in self.rows.tolist()]
        if self.reals is not None:
            other = zip(self.other.tolist(), self.take.tolist(), prompts, strict=True)
            prompts = [self.reals.prompts[row] if take else own for row, take, own in other]
        return torch.tensor([prompt != prompts[i - 1] for i, prompt in enumerate(prompts)])

    def latents(self, index: Tensor) -> Tensor:
        """Those of the given rows (n,) of the batch, (n, C, H, W)."""
        own = self.pairs.latents[self.rows[index]]
        if self.reals is None:
            return own
        return torch.where(expand(self.take[index], own).bool(), self.reals.latents[self.other[index]], own)

    def raw(self, row: int) -> Tensor | None:
        """The picture (3, height, width) in [0, 1] of one row of the batch, if it is a real one, as its file has it."""
        if not self.take[row] or self.reals is None or self.reals.pictures is None:
            return None
        return self.reals.pictures(int(self.other[row]))

    def cond(self, index: Tensor) -> Cond:
        """The conditioning of the given rows (n,) of the batch."""
        own = self.pairs.cond.rows(self.rows[index])
        if self.reals is None:
            return own
        mixed = torch.arange(len(index)) + len(index) * self.take[index]
        return Cond.cat([own, self.reals.cond.rows(self.other[index])]).rows(mixed)


@dataclass(frozen=True)
class Group:
    """What is trained on of one size of pictures; `number` tells groups of one training apart."""

    pairs: Samples
    uncond: Cond  # one row: what guidance moves away from
    reals: Reals | None = None
    number: int = 0

    @staticmethod
    def of(pairs: Samples, uncond: Cond, pictures: Samples | None = None, number: int = 0) -> Group:
        """Pairs with the real pictures of their size, if there are any."""
        reals = None if pictures is None else Reals.beside(pairs, pictures)
        return Group(pairs, uncond, reals, number)

    def batch(
        self, config: Config, student: Student, draws: torch.Generator, fresh: float = 0.0, world: World = ALONE
    ) -> Batch:
        """As `draw_batch`, with keys that tell the pictures of all groups apart."""
        batch = draw_batch(config, student, self.pairs, self.reals, draws, fresh, world=world)
        key = batch.positive_key
        return replace(batch, positive_key=key * MOST_SIZES + torch.where(key < 0, -self.number, self.number))


def draw_group(groups: Sequence[Group], draws: torch.Generator) -> Group:
    """One of the groups, as often as it has pairs; where there is one, nothing is drawn."""
    if len(groups) == 1:
        return groups[0]
    pairs = torch.tensor([float(len(group.pairs)) for group in groups])
    return groups[int(torch.multinomial(pairs, 1, generator=draws))]


def draw_batch(
    config: Config,
    student: Student,
    pairs: Samples,
    reals: Reals | None,
    draws: torch.Generator,
    fresh: float = 0.0,
    *,
    world: World = ALONE,
) -> Batch:
    """The process's rows of a batch for one update, on the student's device.

    A share `fresh` of pure noise is no pair's.
    """
    schedule, device, size = student.schedule, student.device, config.batch_size
    own = world.rows(size)
    rows = torch.randint(len(pairs), (size,), generator=draws)
    target, cond = pairs.latents[rows[own]], pairs.cond.rows(rows[own])
    teacher_cond = cond if pairs.teacher_cond is None else pairs.teacher_cond.rows(rows[own])
    shape = (size, *target.shape[1:])
    timesteps = torch.tensor(trailing_timesteps(config.student_steps, student.start_timestep, schedule.timesteps))
    share = torch.full((config.student_steps,), (1 - config.first_step_share) / max(config.student_steps - 1, 1))
    share[0] = config.first_step_share if config.student_steps > 1 else 1.0
    level = torch.multinomial(share, size, True, generator=draws)
    first = level == 0
    sigma = schedule.sigma(timesteps[level])[own]
    paired = first & (torch.rand(size, generator=draws) >= fresh)
    clean = torch.where(expand(first[own], target).bool(), torch.zeros_like(target), target)
    fresh_noise = torch.randn(shape, generator=draws)[own]
    noise = torch.where(expand(paired[own], target).bool(), pairs.noise(rows[own]), fresh_noise)
    positives, index = Positives.draw(config, pairs, reals, rows, draws), torch.arange(size)
    stranger_cond = positives.cond(index.roll(1)[own]) if config.mismatch_weight > 0 else None
    last = schedule.timesteps - 1
    normal = torch.randn(size, generator=draws)[own]
    level = torch.sigmoid(config.renoise_mean + config.renoise_std * normal)  # LADD, section 3.2
    renoise = schedule.sigma((level * last).clamp(max=config.renoise_max_timestep))
    uniform = torch.rand(size, generator=draws)[own]
    lowest = max(0.02 * last, min(config.distillation_min_timestep, 0.98 * last))
    return Batch(
        to_device(schedule.add_noise(clean, noise, sigma), device),
        to_device(sigma, device),
        to_device(first[own], device),
        Some.of(paired, world, device),
        cond.to_device(device),
        teacher_cond.to_device(device),
        to_device(target, device),
        to_device(positives.latents(index[own]), device),
        positives.cond(index[own]).to_device(device),
        positives.key[own],
        Some.of(positives.strangers, world, device),
        None if stranger_cond is None else stranger_cond.to_device(device),
        to_device(renoise, device),
        to_device(torch.randn(shape, generator=draws)[own], device),
        to_device(schedule.sigma(lowest + (0.98 * last - lowest) * uniform), device),
        to_device(torch.randn(shape, generator=draws)[own], device),
        int(torch.randint(2**31, (1,), generator=draws)),
        size,
        own,
        lambda i: positives.raw(int(index[own][i])),
    )


def draw_reals(config: Config, reals: Reals, rows: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """For pairs' rows (B,) those of real pictures (B,), of the same prompt if there are, and whether to take them."""
    other = reals.rows(rows, torch.randint(len(reals.samples), rows.shape, generator=draws))
    share = 1.0 if config.positives == "real" else config.real_share
    return other, torch.rand(len(rows), generator=draws) < share


def draw_guidance_batch(
    config: Config, student: Student, group: Group, draws: torch.Generator, *, world: World = ALONE
) -> GuidanceBatch:
    """The process's rows of a batch: pictures of pairs, and real ones, with fresh noise at uniform timesteps."""
    schedule, device, size = student.schedule, student.device, config.batch_size
    pairs, reals, own = group.pairs, group.reals, world.rows(size)
    rows = torch.randint(len(pairs), (size,), generator=draws)
    clean, conds = pairs.latents[rows[own]], _conds(pairs, rows[own])
    if reals is not None and config.sees_pictures:
        other, take = (drawn[own] for drawn in draw_reals(config, reals, rows, draws))
        clean = torch.where(expand(take, clean).bool(), reals.samples.latents[other], clean)
        mixed = torch.arange(len(take)) + len(take) * take
        both = zip(conds, _conds(reals.samples, other), strict=True)
        conds = [Cond.cat(each).rows(mixed) for each in both]
    # Spread evenly over the batch (arXiv 2107.00630, appendix I.1): the loss differs most by the level.
    uniform = (torch.rand((), generator=draws) + torch.arange(size) / size) % 1
    sigma = schedule.sigma((uniform * schedule.timesteps).long())[own]
    noise = torch.randn((size, *clean.shape[1:]), generator=draws)[own]
    x = schedule.add_noise(clean, noise, sigma)
    student_s, teacher_s = (cond.to_device(device) for cond in conds)
    acts = Guidance.of(config).acts(schedule, sigma)
    return GuidanceBatch(to_device(x, device), to_device(sigma, device), student_s, teacher_s, acts)


def _conds(samples: Samples, rows: Tensor) -> list[Cond]:
    """The student's and the teacher's."""
    own = samples.cond.rows(rows)
    return [own, own if samples.teacher_cond is None else samples.teacher_cond.rows(rows)]
