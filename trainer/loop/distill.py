"""The training loop: a generator that yields one `Step` per student update and neither prints nor writes."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core import losses
from ...core.denoiser import Cond
from ...core.schedule import expand
from ..data.samples import Samples
from .batch import Batch, Reals, draw, generator
from .feature_cache import Kept
from .health import Health, measure
from .precision import autocast
from .state import State


class Diverged(RuntimeError):
    """A loss is no number any more. The last good student is kept; the message says what to change."""


@dataclass(frozen=True)
class Step:
    """What one student update did."""

    update: int  # 1 for the first
    losses: dict[str, float]
    health: Health
    seconds: float
    spent: float  # seconds of training so far, over all runs


@dataclass(frozen=True)
class Judged:
    """A batch of pictures as the discriminator sees them: head inputs, and what conditions the heads."""

    inputs: list[Tensor]
    sigma: Tensor
    text: Tensor
    image: Tensor | None

    def detached(self) -> Judged:
        return Judged([x.detach() for x in self.inputs], self.sigma, self.text, self.image)


def look(state: State, x0: Tensor, cond: Cond, batch: Batch, real: bool = False) -> Judged:
    """Features of x0 (B, C, H, W), where they are of noisy latents at the batch's level; gradients reach x0.

    `real`: x0 are the batch's positives, and no gradient is asked for.
    """
    schedule = state.student.schedule
    sigma = batch.renoise if state.features.conditional else torch.zeros_like(batch.renoise)
    if real and not state.features.conditional:

        def alone(i: int) -> list[Tensor]:
            one = slice(i, i + 1)
            return state.features(x0[one], sigma[one], cond.rows(one))

        maps = state.kept.of(batch.positive_key, alone)
    else:
        maps = state.features(schedule.add_noise(x0, batch.noise, sigma), sigma, cond)
    if real:
        state.discriminator.calibrate(maps)
    image = None
    if state.discriminator.image:
        # As ADD's c_img: of the clean picture, where the student was given a part of it.
        with torch.no_grad():
            low = schedule.sigma(torch.full((len(x0),), 20.0)).to(x0)
            image = (
                state.features(batch.target, low, batch.cond)[-1].mean((2, 3)) * expand(~batch.first, x0)[:, :, 0, 0]
            )
    return Judged(state.discriminator.standardise(maps), sigma, cond.summary, image)


def both(state: State, output: Tensor, batch: Batch) -> tuple[Judged, Judged]:
    """The batch's positives and the student's pictures, equally noised; gradients reach the student's."""
    with torch.no_grad():
        real = look(state, batch.positive, batch.positive_cond, batch, real=True)
    return real, look(state, output, batch.cond, batch)


def judge(state: State, seen: Judged) -> list[Tensor]:
    return state.discriminator(seen.inputs, seen.sigma, seen.text, seen.image)


def mismatched(state: State, real: Judged, batch: Batch) -> tuple[Judged, Tensor]:
    """The positives with the text of their neighbours in the batch, and (B,) where that is another text.

    For a matching-aware discriminator (arXiv 1605.05396, section 4.2).
    """
    order = torch.arange(len(real.text)).roll(1)
    other = real.text[order]
    if state.features.conditional:
        with torch.no_grad():
            wrong = look(state, batch.positive, batch.positive_cond.rows(order), batch)
    else:
        wrong = replace(real, text=other)
    return wrong, (other != real.text).any(1)


def discriminator_loss(
    state: State, real: Judged, fake: Judged, batch: Batch
) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """The named parts of the discriminator's loss, and the logits of real and fake."""
    config = state.config
    real, fake = real.detached(), fake.detached()
    exact = config.r1 == "exact" and config.r1_weight > 0
    if exact:
        for x in real.inputs:
            x.requires_grad_(True)
    on_real, on_fake = judge(state, real), judge(state, fake)
    loss = losses.ADVERSARIAL[config.adversarial][0]
    parts = {"discriminator": loss(on_real, on_fake)}
    if config.mismatch_weight > 0:
        wrong, differs = mismatched(state, real, batch)
        if differs.any():
            of_wrong = judge(state, wrong)
            parts["mismatch"] = config.mismatch_weight * loss(
                [x[differs] for x in on_real], [x[differs] for x in of_wrong]
            )
    if exact:
        parts["r1"] = config.r1_weight * losses.r1(on_real, real.inputs)
    elif config.r1 == "approximate" and config.r1_weight > 0:
        draws = torch.Generator(real.sigma.device).manual_seed(batch.seed)
        noise = [torch.randn(x.shape, generator=draws, device=x.device) for x in real.inputs]
        moved = [x + config.r1_noise * e for x, e in zip(real.inputs, noise, strict=True)]
        perturbed = judge(state, Judged(moved, real.sigma, real.text, real.image))
        parts["r1"] = config.r1_weight / config.r1_noise**2 * losses.approximate_r1(on_real, perturbed)
    return parts, on_real, on_fake


def distillation_loss(state: State, output: Tensor, batch: Batch, uncond: Cond) -> Tensor:
    """The distillation term: noise goes on the student's output, the teacher (and the score) denoises it."""
    config, teacher, schedule = state.config, state.student.teacher, state.student.schedule
    sigma = batch.distill_sigma
    noisy = schedule.add_noise(output.detach(), batch.distill_noise, sigma)
    guidance = config.distillation_guidance
    if config.distillation == "nfsd":
        target = losses.nfsd_target(teacher, noisy, output.detach(), sigma, batch.cond, uncond, guidance)
    elif state.score:
        score = state.score.denoiser
        target = losses.matching_target(
            teacher, score, noisy, output.detach(), sigma, batch.cond, uncond, guidance
        ).float()
    else:
        target = losses.teacher_target(teacher, noisy, sigma, batch.cond, uncond, guidance, config.teacher_steps)
    return losses.distillation(output, target, losses.WEIGHTS[config.distillation](schedule, sigma))


def ramp(state: State) -> float:
    """What learns beside the student counts from 0 to 1 after the warm-up: fresh, its gradient is noise."""
    config = state.config
    return (
        min(1.0, (state.update - config.regression_updates + 1) / config.adversarial_ramp)
        if config.adversarial_ramp
        else 1.0
    )


def rate(state: State) -> float:
    """The learning rates' factor: 1, then falling linearly to 0 over the last share `decay` of the run."""
    config = state.config
    done = state.update / config.updates
    if config.minutes:
        done = max(done, state.spent / (60 * config.minutes))
    return min(1.0, (1 - done) / config.lr_decay) if config.lr_decay else 1.0


def student_loss(
    state: State, batch: Batch, uncond: Cond, adversarial: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The named, weighted parts of the student's loss, and what the discriminator's update can use again."""
    config, student = state.config, state.student
    output = student(batch.x, batch.sigma, batch.cond).float()
    parts: dict[str, Tensor] = {}
    used: dict[str, Any] = {"output": output}
    if config.regression_weight > 0 and batch.paired.any():
        parts["regression"] = config.regression_weight * losses.regression(
            output[batch.paired], batch.target[batch.paired]
        )
    if adversarial and config.distillation_weight > 0:
        weight = config.distillation_weight * (ramp(state) if state.score else 1.0)
        parts["distillation"] = weight * distillation_loss(state, output, batch, uncond)
    match = config.feature_weight > 0 and batch.paired.any()
    if adversarial and (config.adversarial_weight > 0 or match):
        real, fake = both(state, output, batch)
        used |= {"real": real, "fake": fake}
        if match:
            with torch.no_grad():
                target = real if config.positives == "teacher" else look(state, batch.target, batch.cond, batch)
            rows = batch.paired
            parts["features"] = config.feature_weight * losses.feature_matching(
                [x[rows] for x in fake.inputs], [x[rows] for x in target.inputs]
            )
        if config.adversarial_weight > 0:
            state.discriminator.requires_grad_(False)
            on_fake = judge(state, fake)
            on_real = None
            if config.adversarial == "relativistic":
                with torch.no_grad():
                    on_real = judge(state, real)
            weight = config.adversarial_weight * ramp(state)
            parts["adversarial"] = weight * losses.ADVERSARIAL[config.adversarial][1](on_fake, on_real)
            state.discriminator.requires_grad_(True)
    return parts, used


def _add(total: dict[str, float], parts: dict[str, Tensor], share: float) -> None:
    for name, value in parts.items():
        total[name] = total.get(name, 0.0) + value.item() * share


def _update(optimizer: torch.optim.Optimizer, module: nn.Module, clip: float) -> float:
    """Clip, step and clear; returns the gradient's norm."""
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else math.inf).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _discriminate(state: State, pairs: Samples, reals: Reals | None, draws: torch.Generator, adversarial: bool) -> None:
    """One more discriminator update, on a batch of its own."""
    batch = draw(
        state.config, state.student, pairs, reals, draws, state.config.fresh_noise_share if adversarial else 0.0
    )
    device = state.student.device
    with autocast(state.config, device):
        with torch.no_grad():
            output = state.student(batch.x, batch.sigma, batch.cond).float()
            real, fake = both(state, output, batch)
        parts, _, _ = discriminator_loss(state, real, fake, batch)
    torch.stack(list(parts.values())).sum().backward()
    norm = _update(state.discriminator_optimizer, state.discriminator, state.config.max_grad_norm)
    _check(state.update + 1, {"discriminator's gradient": norm})


def distill(state: State, pairs: Samples, uncond: Cond, pictures: Samples | None = None) -> Generator[Step, None, None]:
    """Train from `state.update` to `config.updates` (or `config.minutes`), yielding a Step after each update.

    Of `pictures`, which are real, the discriminator sees that of the pair's own prompt where there is one.
    The state lies whole between two yields, so closing the generator cancels; the teacher's flags
    are restored then. Raises Diverged when a loss or gradient is not finite, before it is applied.
    """
    scoring = state.score.denoiser.training() if state.score else nullcontext()
    config, student = state.config, state.student
    uncond = uncond.to(student.device)
    state.kept = Kept()  # keys tell pictures of this call apart
    reals = None if pictures is None else Reals.beside(pairs, pictures)
    with student.training(), scoring, state.checkpointed():
        while state.update < config.updates and not (config.minutes and state.spent >= config.minutes * 60):
            # Spectral norms advance with every judgement: an update that is broken off must not leave its own.
            norms = [buffer.clone() for buffer in state.discriminator.buffers()]
            try:
                step = _advance(state, pairs, uncond, reals)
            except BaseException:
                if state.whole:
                    for buffer, before in zip(state.discriminator.buffers(), norms, strict=True):
                        buffer.copy_(before)
                raise
            yield step


def _advance(state: State, pairs: Samples, uncond: Cond, reals: Reals | None) -> Step:
    """One update of everything that is trained. `state.whole` is False while it is being applied."""
    config, student = state.config, state.student
    begun = time.monotonic()
    adversarial = state.update >= config.regression_updates
    # Heads that know nothing yet would only push the student about: they learn first (`lead`).
    judged = state.update >= config.regression_updates - config.discriminator_warmup and config.adversarial_weight > 0
    _set_rates(state)
    if judged:
        for extra in range(1, config.discriminator_updates):
            state.whole = False
            _discriminate(state, pairs, reals, generator(config.seed, state.update, extra), adversarial)
    draws = generator(config.seed, state.update)
    totals: dict[str, float] = {}
    share = 1 / config.gradient_accumulation
    on_real: list[Tensor] = []
    on_fake: list[Tensor] = []
    used: dict[str, Any] = {}
    unpaired = config.adversarial_weight > 0 or config.distillation_weight > 0
    fresh = config.fresh_noise_share if adversarial and unpaired else 0.0
    batches = [draw(config, student, pairs, reals, draws, fresh) for _ in range(config.gradient_accumulation)]
    for batch in batches:
        with autocast(config, student.device):
            parts, used = student_loss(state, batch, uncond, adversarial)
        if not parts:
            parts = {"regression": 0.0 * used["output"].sum()}
        (torch.stack(list(parts.values())).sum() * share).backward()
        _add(totals, parts, share)
        if judged:
            with autocast(config, student.device):
                if not adversarial:
                    with torch.no_grad():
                        used["real"], used["fake"] = both(state, used["output"], batch)
                parts, on_real, on_fake = discriminator_loss(state, used["real"], used["fake"], batch)
            (torch.stack(list(parts.values())).sum() * share).backward()
            _add(totals, parts, share)
        if adversarial and state.score:
            with autocast(config, student.device):
                parts = {"score": state.score.loss(used["output"], batch)}
            (parts["score"] * share).backward()
            _add(totals, parts, share)
    _check(state.update + 1, totals)
    state.whole = False
    norms = {}
    if state.score and adversarial:
        norms["score"] = _update(state.score.optimizer, state.score.denoiser.trained, config.max_grad_norm)
    if on_real:
        norms["discriminator"] = _update(state.discriminator_optimizer, state.discriminator, config.max_grad_norm)
    norms["student"] = _update(state.optimizer, student.trained, config.max_grad_norm)
    _check(state.update + 1, {f"{name}'s gradient": norm for name, norm in norms.items()})
    with torch.no_grad():
        keep = min(config.ema_decay, (1 + state.update) / (10 + state.update))
        for slow, fast in zip(state.average.parameters(), student.trained.parameters(), strict=True):
            slow.lerp_(fast, 1 - keep)
    relative = config.adversarial == "relativistic"
    health = measure(on_real, on_fake, used["output"], batches[-1].positive, relative)
    seconds = time.monotonic() - begun
    state.update += 1
    state.spent += seconds
    state.whole = True
    return Step(state.update, totals, health, seconds, state.spent)


def _set_rates(state: State) -> None:
    """Every learning rate as it is at this update."""
    config, scale = state.config, rate(state)
    rates = [(state.optimizer, config.lr), (state.discriminator_optimizer, config.lr_discriminator)]
    if state.score:
        rates.append((state.score.optimizer, config.lr_fake_score))
    for optimizer, lr in rates:
        for group in optimizer.param_groups:
            group["lr"] = lr * scale


def _check(update: int, values: dict[str, float]) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise Diverged(
            f"update {update}: {', '.join(bad)} is not finite. Lower lr or lr_discriminator, raise r1_weight, "
            "or set precision to float32; the last good student is kept"
        )
