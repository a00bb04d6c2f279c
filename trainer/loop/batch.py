"""What one update trains on: pairs, noise levels and noise, all drawn at once from a seeded generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.denoiser import Cond, Guidance
from ...core.sampling import trailing_timesteps
from ...core.schedule import expand
from ...core.student import Student
from ...core.transfer import to_device
from ..config import Config
from ..data.samples import Samples
from ..sizes import MOST_SIZES


def generator(seed: int, update: int, purpose: int = 0) -> torch.Generator:
    """Randomness of one update, told by its number alone: a resumed run draws the same."""
    return torch.Generator().manual_seed((seed * 1_000_003 + update) * 16 + purpose)


@dataclass(frozen=True)
class Batch:
    """One batch on the device, with everything random about it drawn; what decides the course is drawn on the CPU."""

    x: Tensor  # (B, C, H, W) the student's input
    sigma: Tensor  # (B,) its level
    first: Tensor  # (B,) true where it is pure noise
    paired: Tensor  # (P,) the rows where that noise is the pair's own, so that the regression has one answer
    cond: Cond  # the student's
    teacher_cond: Cond  # the same but for a prefix and suffix that are baked in
    target: Tensor  # (B, C, H, W) the teacher's picture from the same noise
    positive: Tensor  # (B, C, H, W) what the discriminator takes for real
    positive_cond: Cond
    positive_key: Tensor  # (B,), on the CPU: which picture that is: n of the n-th pair's, -1 - n of the n-th real one
    strangers: Tensor  # (S,) the rows of which the one before has a positive of another prompt
    renoise: Tensor  # (B,) sigma at which the discriminator sees both
    noise: Tensor  # (B, C, H, W) the noise of that
    distill_sigma: Tensor  # (B,) sigma of the distillation term
    distill_noise: Tensor
    seed: int  # of what is drawn on the device


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

    def batch(self, config: Config, student: Student, draws: torch.Generator, fresh: float = 0.0) -> Batch:
        """As `draw_batch`, with keys that tell the pictures of all groups apart."""
        batch = draw_batch(config, student, self.pairs, self.reals, draws, fresh)
        key = batch.positive_key
        return replace(batch, positive_key=key * MOST_SIZES + torch.where(key < 0, -self.number, self.number))


def draw_group(groups: Sequence[Group], draws: torch.Generator) -> Group:
    """One of the groups, as often as it has pairs; where there is one, nothing is drawn."""
    if len(groups) == 1:
        return groups[0]
    pairs = torch.tensor([float(len(group.pairs)) for group in groups])
    return groups[int(torch.multinomial(pairs, 1, generator=draws))]


def draw_batch(
    config: Config, student: Student, pairs: Samples, reals: Reals | None, draws: torch.Generator, fresh: float = 0.0
) -> Batch:
    """A batch for one update, on the student's device; a share `fresh` of pure noise is no pair's."""
    schedule, device, size = student.schedule, student.device, config.batch_size
    rows = torch.randint(len(pairs), (size,), generator=draws)
    target, cond = pairs.latents[rows], pairs.cond.rows(rows)
    teacher_cond = cond if pairs.teacher_cond is None else pairs.teacher_cond.rows(rows)
    shape = target.shape
    timesteps = torch.tensor(trailing_timesteps(config.student_steps, student.start_timestep, schedule.timesteps))
    share = torch.full((config.student_steps,), (1 - config.first_step_share) / max(config.student_steps - 1, 1))
    share[0] = config.first_step_share if config.student_steps > 1 else 1.0
    level = torch.multinomial(share, size, True, generator=draws)
    first = level == 0
    sigma = schedule.sigma(timesteps[level])
    paired = first & (torch.rand(size, generator=draws) >= fresh)
    clean = torch.where(expand(first, target).bool(), torch.zeros_like(target), target)
    noise = torch.where(expand(paired, target).bool(), pairs.noise(rows), torch.randn(shape, generator=draws))
    positive, positive_cond, positive_key = target, cond, rows
    prompts = [pairs.prompts[row] for row in rows.tolist()]
    if reals is not None and config.sees_pictures:
        other, take = draw_reals(config, reals, rows, draws)
        positive = torch.where(expand(take, target).bool(), reals.samples.latents[other], target)
        positive_key = torch.where(take, -1 - other, rows)
        mixed = torch.arange(size) + size * take
        positive_cond = Cond.cat([cond, reals.samples.cond.rows(other)]).rows(mixed)
        theirs = [reals.samples.prompts[row] for row in other.tolist()]
        prompts = [real if taken else own for real, own, taken in zip(theirs, prompts, take.tolist(), strict=True)]
    strangers = torch.tensor([i for i, prompt in enumerate(prompts) if prompt != prompts[i - 1]], dtype=torch.long)
    last = schedule.timesteps - 1
    normal = torch.randn(size, generator=draws)
    renoise = schedule.sigma(
        torch.sigmoid(config.renoise_mean + config.renoise_std * normal) * last
    )  # LADD, section 3.2
    uniform = torch.rand(size, generator=draws)
    return Batch(
        to_device(schedule.add_noise(clean, noise, sigma), device),
        to_device(sigma, device),
        to_device(first, device),
        to_device(paired.nonzero().flatten(), device),
        cond.to_device(device),
        teacher_cond.to_device(device),
        to_device(target, device),
        to_device(positive, device),
        positive_cond.to_device(device),
        positive_key,
        to_device(strangers, device),
        to_device(renoise, device),
        to_device(torch.randn(shape, generator=draws), device),
        to_device(schedule.sigma(last * (0.02 + 0.96 * uniform)), device),
        to_device(torch.randn(shape, generator=draws), device),
        int(torch.randint(2**31, (1,), generator=draws)),
    )


def draw_reals(config: Config, reals: Reals, rows: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """For pairs' rows (B,) those of real pictures (B,), of the same prompt if there are, and whether to take them."""
    other = reals.rows(rows, torch.randint(len(reals.samples), rows.shape, generator=draws))
    share = 1.0 if config.positives == "real" else config.real_share
    return other, torch.rand(len(rows), generator=draws) < share


def draw_guidance_batch(config: Config, student: Student, group: Group, draws: torch.Generator) -> GuidanceBatch:
    """Pictures of pairs, and real ones, with fresh noise at uniform timesteps, on the student's device."""
    schedule, device, size = student.schedule, student.device, config.batch_size
    pairs, reals = group.pairs, group.reals
    rows = torch.randint(len(pairs), (size,), generator=draws)
    clean, conds = pairs.latents[rows], _conds(pairs, rows)
    if reals is not None and config.sees_pictures:
        other, take = draw_reals(config, reals, rows, draws)
        clean = torch.where(expand(take, clean).bool(), reals.samples.latents[other], clean)
        mixed = torch.arange(size) + size * take
        both = zip(conds, _conds(reals.samples, other), strict=True)
        conds = [Cond.cat(each).rows(mixed) for each in both]
    # Spread evenly over the batch (arXiv 2107.00630, appendix I.1): the loss differs most by the level.
    uniform = (torch.rand((), generator=draws) + torch.arange(size) / size) % 1
    sigma = schedule.sigma((uniform * schedule.timesteps).long())
    x = schedule.add_noise(clean, torch.randn(clean.shape, generator=draws), sigma)
    own, teacher_s = (cond.to_device(device) for cond in conds)
    acts = Guidance.of(config).acts(schedule, sigma)
    return GuidanceBatch(to_device(x, device), to_device(sigma, device), own, teacher_s, acts)


def _conds(samples: Samples, rows: Tensor) -> list[Cond]:
    """The student's and the teacher's."""
    own = samples.cond.rows(rows)
    return [own, own if samples.teacher_cond is None else samples.teacher_cond.rows(rows)]
