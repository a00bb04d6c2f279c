"""The training loop: a generator that yields one `Step` per student update and neither prints nor writes."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...core.denoiser import Cond
from ...core.exclusive import exclusive
from ...core.sharded import whole
from ..data.samples import Samples
from ..world import average_gradients
from .batch import Group, draw_group, draw_guidance_batch, generator
from .feature_cache import FeatureCache
from .health import Health, HealthParts, health_parts
from .measures import OTHER_DEVICES, Measured, Measures
from .optimizer import can_skip, set_lr
from .precision import autocast, cast_frozen
from .state import Critic, State
from .steps import (
    DiscriminatorStep,
    Phase,
    StudentStep,
    discriminator_step,
    fake_score_step,
    guidance_step,
    student_step,
)

FAKE_SCORE = "fake score"


class Diverged(RuntimeError):
    """A loss is no number any more. The last good student is kept; the message says what to change."""


@dataclass(frozen=True)
class Step:
    """What one student update did. `losses` and `health` are means over `log_every` updates, at the last of them."""

    update: int  # 1 for the first
    losses: dict[str, float]  # empty in between
    health: Health | None
    seconds: float
    spent: float  # seconds of training so far, over all runs


def distill(state: State, pairs: Samples, uncond: Cond, pictures: Samples | None = None) -> Generator[Step, None, None]:
    """Train on pairs of one size, and pictures of it: as `distill_groups`."""
    return distill_groups(state, [Group.of(pairs, uncond, pictures)])


def distill_groups(state: State, groups: Sequence[Group]) -> Generator[Step, None, None]:
    """Train from `state.update` to `config.updates` (or `config.minutes`), yielding a Step after each update.

    Each batch is of one group, drawn by its number of pairs. Of pictures, which are real, the discriminator sees that
    of the pair's own prompt where there is one.
    The state lies whole between two yields, so closing the generator cancels; the teacher's flags
    are restored then. Raises Diverged when a loss or gradient is not finite, which is never applied.
    """
    scoring = state.fake_score.denoiser.training() if state.fake_score else nullcontext()
    student = state.student
    groups = [replace(group, uncond=group.uncond.to(student.device)) for group in groups]
    state.feature_cache = FeatureCache()  # keys tell pictures of this call apart
    measures = Measures(state.world)
    precise = cast_frozen(state.config, student.teacher)
    with student.training(), scoring, precise, state.compiled(), state.checkpointed():
        while not state.finished:
            # Spectral norms advance with every pass of the heads: an update that is broken off must not leave its own.
            spectral = [buffer for critic in state.critics for buffer in critic.discriminator.buffers()]
            norms = [buffer.clone() for buffer in spectral]
            try:
                with exclusive(student.teacher.backbone):
                    step = _update(state, groups, measures)
            except BaseException:
                if state.whole:
                    for buffer, before in zip(spectral, norms, strict=True):
                        buffer.copy_(before)
                raise
            yield step


def _update(state: State, groups: Sequence[Group], measures: Measures) -> Step:
    """One update of everything that is trained. `state.whole` is False while it is being applied."""
    config, began = state.config, time.monotonic()
    phase = Phase.of(state)
    set_learning_rates(state)
    norms = []
    for extra in range(1, max(config.discriminator_updates, config.fake_score_updates)):
        if beside := _beside(state, phase, extra):
            norms.extend(_extra_update(state, groups, generator(config.seed, state.update, extra), phase, beside))
    draws, share = generator(config.seed, state.update), 1 / config.gradient_accumulation
    drawn = [draw_group(groups, draws) for _ in range(config.gradient_accumulation)]
    learn = _learn_guidance if config.guidance_only else _learn_steps
    parts, health = learn(state, drawn, draws, phase, share)
    measured = _apply(state, phase, parts, norms, share, health, measures)
    update_average(state)
    seconds = state.world.told(time.monotonic() - began)  # or some would end, or lower their rates, before others
    state.update += 1
    state.spent += seconds
    state.whole = True
    losses, healthy = (measured.losses, measured.health) if measured else ({}, None)
    return Step(state.update, losses, healthy, seconds, state.spent)


Learnt = tuple[list[dict[str, Tensor]], HealthParts]


def _learn_steps(state: State, drawn: Sequence[Group], draws: torch.Generator, phase: Phase, share: float) -> Learnt:
    """Losses and gradients of everything that makes a picture in few steps, and the health of the last batch."""
    config = state.config
    fresh, world = phase.fresh_noise_share, state.world
    batches = [group.batch(config, state.student, draws, fresh, world) for group in drawn]
    parts: list[dict[str, Tensor]] = []
    made, critic = StudentStep(batches[0].x, {}), DiscriminatorStep({})
    for group, batch in zip(drawn, batches, strict=True):
        made = student_step(state, batch, group.uncond, phase, share)
        parts.append(made.losses)
        if phase.discriminator:
            critic = discriminator_step(state, batch, made, share)
            parts.append(critic.losses)
        if phase.adversarial and state.fake_score:
            parts.append(fake_score_step(state, batch, made, share))
    relative = config.adversarial == "relativistic"
    output, real = (world.gather(x.detach(), config.batch_size) for x in (made.output, batches[-1].positive))
    return parts, health_parts(critic.judged, output, real, relative)


def _learn_guidance(
    state: State, drawn: Sequence[Group], draws: torch.Generator, _phase: Phase, share: float
) -> Learnt:
    """Losses and gradients of guidance alone, and the health of the last batch beside the guided teacher's."""
    config, world = state.config, state.world
    batches = [draw_guidance_batch(config, state.student, group, draws, world=world) for group in drawn]
    made = [guidance_step(state, batch, group.uncond, share) for group, batch in zip(drawn, batches, strict=True)]
    student, target = made[-1]
    output, wanted = (world.gather(x.detach(), config.batch_size) for x in (student.output, target))
    return [step.losses for step, _ in made], health_parts([], output, wanted, False)


def _apply(
    state: State,
    phase: Phase,
    parts: list[dict[str, Tensor]],
    norms: Sequence[tuple[str, Tensor]],
    share: float,
    health: HealthParts,
    measures: Measures,
) -> Measured | None:
    """Clip the gradients and let the optimizers step, unless a number is not finite; the numbers, where they are due.

    `norms` are of gradients that were applied before. Raises Diverged where the numbers are brought over, with nothing
    changed since one of them was not finite.
    """
    optimizers = _optimizers(state, phase)
    for module, optimizer in optimizers.values():
        average_gradients(state.world, module)
        state.scaler.unscale_(optimizer)
    for name, (module, _) in optimizers.items():
        norms = [*norms, (f"{name}'s gradient", clip_gradients(module, state.config.max_grad_norm))]
    numbers = measures.add([item for part in parts for item in part.items()], norms, health, share)
    skips = all(can_skip(optimizer) for _, optimizer in optimizers.values())
    due = (state.update + 1) % looks_every(state) == 0 or state.update + 1 >= state.config.updates
    measured = None
    if due or not skips:
        measured = measures.take()
        _check(state.update + 1, measured.losses)
        _check_gradients(state, measured.norms)
    state.whole = False
    for _, optimizer in optimizers.values():
        step_unless(state, optimizer, numbers)
    state.scaler.update()
    return measured


def looks_every(state: State) -> int:
    """Updates between two looks at the numbers."""
    return state.config.log_every or (1 if state.student.device.type == "cpu" else OTHER_DEVICES)


def step_unless(state: State, optimizer: torch.optim.Optimizer, numbers: Tensor) -> None:
    """Let an optimizer step; on the device it does not where one of the `numbers` (n,) is not finite.

    Float16's scaler has its own way of that.
    """
    if not state.scaler.is_enabled() and can_skip(optimizer):
        skipping: Any = optimizer  # torch's own scaler tells it so, too
        skipping.found_inf = (~numbers.isfinite()).any().float()
    state.scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=True)


Trained = dict[str, tuple[nn.Module, torch.optim.Optimizer]]  # by what it is called in messages


def _optimizers(state: State, phase: Phase) -> Trained:
    """What this update trains, in the order in which it is stepped."""
    return _beside(state, phase) | {"student": (state.student.trained, state.optimizer)}


def _beside(state: State, phase: Phase, extra: int = 0) -> Trained:
    """What learns beside the student in this update, or in one of its extra ones, which begin with 1."""
    config, found = state.config, {}
    if state.fake_score and phase.adversarial and extra < config.fake_score_updates:
        found[FAKE_SCORE] = (state.fake_score.denoiser.trained, state.fake_score.optimizer)
    for name, critic in critic_names(state) if phase.discriminator and extra < config.discriminator_updates else ():
        found[name] = (critic.discriminator, critic.optimizer)
    return found


def critic_names(state: State) -> list[tuple[str, Critic]]:
    """The discriminators by what they are called."""
    several = len(state.critics) > 1
    return [(f"discriminator of {c.features.name}" if several else "discriminator", c) for c in state.critics]


def _extra_update(
    state: State, groups: Sequence[Group], draws: torch.Generator, phase: Phase, beside: Trained
) -> list[tuple[str, Tensor]]:
    """One more update of what learns `beside` the student, on batches of its own, as many as the student's.

    Discriminators and fake score see the same pictures (DMD2, arXiv 2405.14867). The norms of their gradients.
    """
    config, student = state.config, state.student
    fresh, share = phase.fresh_noise_share, 1 / config.gradient_accumulation
    state.whole = False
    for _ in range(config.gradient_accumulation):
        batch = draw_group(groups, draws).batch(config, student, draws, fresh, state.world)
        with torch.no_grad(), autocast(config, student):
            made = StudentStep(student(batch.x, batch.sigma, batch.cond).float(), {})
        if beside.keys() - {FAKE_SCORE}:
            discriminator_step(state, batch, made, share)
        if FAKE_SCORE in beside:
            fake_score_step(state, batch, made, share)
    norms = []
    for name, (module, optimizer) in beside.items():
        average_gradients(state.world, module)
        state.scaler.unscale_(optimizer)
        norms.append((f"{name}'s gradient", clip_gradients(module, config.max_grad_norm)))
    for (name, norm), (_, optimizer) in zip(norms, beside.values(), strict=True):
        if not can_skip(optimizer):
            _check_gradients(state, {name: norm.item()})
        step_unless(state, optimizer, norm.reshape(1))
    state.scaler.update()
    return norms


def clip_gradients(module: nn.Module, largest: float) -> Tensor:
    """Scale a module's gradients down to a norm of `largest` at most (0: as they are); their norm before, ()."""
    parameters = [p for p in module.parameters() if p.grad is not None]
    return whole(nn.utils.clip_grad_norm_(parameters, largest if largest > 0 else math.inf))


@torch.no_grad()
def update_average(state: State) -> None:
    """The EMA of the student's weights: w' <- d w' + (1 - d) w, with d = min(ema_decay, (1 + n) / (10 + n)).

    The second keeps it young at first, as TensorFlow's ExponentialMovingAverage with `num_updates` does.
    """
    keep = min(state.config.ema_decay, (1 + state.update) / (10 + state.update))
    slow: list[Tensor] = [*state.average.parameters()]
    fast: list[Tensor] = [*state.student.trained.parameters()]
    get_ema_multi_avg_fn(keep)(slow, fast, None)


def learning_rate_scale(state: State) -> float:
    """The learning rates' factor: 1, then falling linearly to 0 over the last share `lr_decay` of the run."""
    config = state.config
    done = state.update / config.updates
    if config.minutes:
        done = max(done, state.spent / (60 * config.minutes))
    return min(1.0, (1 - done) / config.lr_decay) if config.lr_decay else 1.0


def set_learning_rates(state: State) -> None:
    """Every learning rate as it is at this update."""
    config, scale = state.config, learning_rate_scale(state)
    rates: list[tuple[torch.optim.Optimizer, float]] = [(state.optimizer, config.lr)]
    rates += [(critic.optimizer, config.lr_discriminator) for critic in state.critics]
    if state.fake_score:
        rates.append((state.fake_score.optimizer, config.lr_fake_score))
    for optimizer, lr in rates:
        set_lr(optimizer, lr * scale)


def _check_gradients(state: State, norms: dict[str, float]) -> None:
    """Raise Diverged for one that is no number; under float16 the optimizer skips it, until no smaller scale helps."""
    if all(map(math.isfinite, norms.values())):  # else the device would be asked for the scale
        return
    if not state.scaler.is_enabled() or state.scaler.get_scale() < 1:
        _check(state.update + 1, norms)


def _check(update: int, values: dict[str, float]) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise Diverged(
            f"update {update}: {', '.join(bad)} is not finite. Lower lr or lr_discriminator, raise r1_weight, "
            "or set precision to float32; the last good student is kept"
        )
