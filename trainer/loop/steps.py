"""One step each of student, discriminator and fake score: losses and gradients of one batch (ADD, LADD, DMD).

A step leaves its gradients on what it trains; the optimizers come later (`distill.py`), so that several batches can
make one update. Everything stays on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...core import losses
from ...core.denoiser import Cond, Guidance, guided
from ...core.schedule import expand
from .batch import Batch, GuidanceBatch
from .precision import autocast
from .state import State

CLEAN = 20.0  # timestep at which the teacher's features of a clean picture are taken


@dataclass(frozen=True)
class Phase:
    """What an update trains, by how far the run is."""

    discriminator: bool  # it is trained
    adversarial: bool  # the student is trained by it, and by the distillation loss
    ramp: float  # factor of their weights, 0 to 1: what learns beside the student knows nothing at first
    fresh_noise_share: float  # of first steps

    @classmethod
    def of(cls, state: State) -> Phase:
        config, update = state.config, state.update
        if config.guidance_only:
            return cls(False, False, 1.0, 0.0)
        adversarial = update >= config.regression_updates
        since = update - config.regression_updates + 1
        unpaired = config.adversarial_weight > 0 or config.distillation_weight > 0
        return cls(
            update >= config.regression_updates - config.discriminator_warmup and config.adversarial_weight > 0,
            adversarial,
            min(1.0, since / config.adversarial_ramp) if config.adversarial_ramp else 1.0,
            config.fresh_noise_share if adversarial and unpaired else 0.0,
        )


@dataclass(frozen=True)
class HeadInputs:
    """A batch of pictures as the discriminator's heads take it."""

    maps: list[Tensor]  # K standardised feature maps (B, C_k, H_k, W_k), on which R1 is taken
    sigma: Tensor  # (B,) noise level at which the features were taken
    text: Tensor  # (B, T) condition
    image: Tensor | None  # (B, I) condition, ADD's c_img

    def detached(self) -> HeadInputs:
        return replace(self, maps=[x.detach() for x in self.maps])


@dataclass(frozen=True)
class StudentStep:
    """What a student's step made."""

    output: Tensor  # x0 (B, C, H, W), with its graph until the gradient is taken
    losses: dict[str, Tensor]  # by name, weighted
    real: HeadInputs | None = None  # of the positives and the output, where the student's losses needed them
    fake: HeadInputs | None = None


@dataclass(frozen=True)
class DiscriminatorStep:
    """What a discriminator's step made."""

    losses: dict[str, Tensor]
    on_real: list[Tensor] = field(default_factory=list)  # K logits (B, N_k)
    on_fake: list[Tensor] = field(default_factory=list)


# --- What the discriminator sees ---


def head_inputs(state: State, x0: Tensor, cond: Cond, batch: Batch) -> HeadInputs:
    """Features of x0 (B, C, H, W) at the batch's noise level (LADD, section 3.2), with gradients to x0.

    A pixel backbone sees clean pictures: its level is 0.
    """
    sigma = batch.renoise if state.features.conditional else torch.zeros_like(batch.renoise)
    maps = state.features(state.student.schedule.add_noise(x0, batch.noise, sigma), sigma, cond)
    return HeadInputs(state.discriminator.standardise(maps), sigma, cond.summary, image_condition(state, batch))


@torch.no_grad()
def real_inputs(state: State, batch: Batch) -> HeadInputs:
    """Features of the batch's positives; the first ones calibrate the discriminator.

    A pixel backbone sees the same clean picture again and again: its maps are cached.
    """
    discriminator = state.discriminator
    if state.features.conditional:
        sigma = batch.renoise
        noisy = state.student.schedule.add_noise(batch.positive, batch.noise, sigma)
        maps = state.features(noisy, sigma, batch.positive_cond)
    else:
        sigma = torch.zeros_like(batch.renoise)

        def alone(i: int) -> list[Tensor]:
            one = slice(i, i + 1)
            return state.features(batch.positive[one], sigma[one], batch.positive_cond.rows(one))

        maps = state.feature_cache.of(batch.positive_key, alone, sigma.device)
    discriminator.calibrate(maps, lambda rows: state.world.gather(rows, batch.whole))
    text, image = batch.positive_cond.summary, image_condition(state, batch)
    return HeadInputs(discriminator.standardise(maps), sigma, text, image)


@torch.no_grad()
def image_condition(state: State, batch: Batch) -> Tensor | None:
    """ADD's c_img (B, I): features of the clean picture, where the student was given a part of it.

    The teacher knows noisy pictures alone: it sees this one with the little noise of its level.
    """
    if not state.discriminator.image:
        return None
    picture, schedule = batch.target, state.student.schedule
    sigma = schedule.sigma(picture.new_full((len(picture),), CLEAN))
    if state.features.conditional:
        picture = schedule.add_noise(picture, batch.noise, sigma)
    features = state.features(picture, sigma, batch.cond)[-1].mean((2, 3))
    return features * expand(~batch.first, batch.target)[:, :, 0, 0]


def logits(state: State, inputs: HeadInputs) -> list[Tensor]:
    """K logits (B, N_k)."""
    return state.discriminator(inputs.maps, inputs.sigma, inputs.text, inputs.image)


def mismatched(state: State, real: HeadInputs, batch: Batch) -> HeadInputs:
    """The positives with the texts of their neighbours in the batch, for a matching-aware discriminator.

    (arXiv 1605.05396, section 4.2.)
    """
    assert batch.stranger_cond
    if not state.features.conditional:
        return replace(real, text=batch.stranger_cond.summary)
    with torch.no_grad():
        return head_inputs(state, batch.positive, batch.stranger_cond, batch)


# --- Losses ---


def student_losses(state: State, batch: Batch, uncond: Cond, phase: Phase) -> StudentStep:
    """The student's pass and its weighted losses: regression, distillation, features, adversarial."""
    config = state.config
    output = state.student(batch.x, batch.sigma, batch.cond).float()
    paired, parts = batch.paired, {}
    if config.regression_weight > 0 and paired.whole:
        regression = paired.mean(lambda rows: losses.regression(output[rows], batch.target[rows]), output)
        parts["regression"] = config.regression_weight * regression
    if not phase.adversarial:
        return StudentStep(output, parts)
    if config.distillation_weight > 0:
        weight = config.distillation_weight * (phase.ramp if state.fake_score else 1.0)
        parts["distillation"] = weight * distillation_loss(state, output, batch, uncond)
    matches = config.feature_weight > 0 and paired.whole > 0
    if not (matches or config.adversarial_weight > 0):
        return StudentStep(output, parts)
    real, fake = real_inputs(state, batch), head_inputs(state, output, batch.cond, batch)
    if matches:
        with torch.no_grad():
            target = real if config.positives == "teacher" else head_inputs(state, batch.target, batch.cond, batch)
        both = (fake.maps, target.maps)
        matching = paired.mean(lambda rows: losses.feature_matching(*([x[rows] for x in m] for m in both)), output)
        parts["features"] = config.feature_weight * matching
    if config.adversarial_weight > 0:
        parts["adversarial"] = config.adversarial_weight * phase.ramp * adversarial_loss(state, real, fake)
    return StudentStep(output, parts, real, fake)


def adversarial_loss(state: State, real: HeadInputs, fake: HeadInputs) -> Tensor:
    """The student's side of the adversarial loss; the discriminator takes no gradient."""
    name, on_real = state.config.adversarial, None
    try:
        state.discriminator.requires_grad_(False)
        on_fake = logits(state, fake)
        if name == "relativistic":
            with torch.no_grad():
                on_real = logits(state, real)
    finally:
        state.discriminator.requires_grad_(True)
    return losses.ADVERSARIAL[name][1](on_fake, on_real)


def distillation_loss(state: State, output: Tensor, batch: Batch, uncond: Cond) -> Tensor:
    """The distillation term: noise goes on the student's output, the teacher (and the fake score) denoises it."""
    config, teacher, schedule = state.config, state.student.teacher, state.student.schedule
    sigma, clean, cond = batch.distill_sigma, output.detach(), batch.teacher_cond
    noisy = schedule.add_noise(clean, batch.distill_noise, sigma)
    scale = config.distillation_guidance
    if config.distillation == "nfsd":
        target = losses.nfsd_target(teacher, noisy, clean, sigma, cond, uncond, scale)
    elif state.fake_score:
        fake = state.fake_score.denoiser
        target = losses.matching_target(
            teacher, fake, noisy, clean, sigma, cond, uncond, scale, score_cond=batch.cond
        ).float()
    else:
        target = losses.teacher_target(teacher, noisy, sigma, cond, uncond, scale, config.teacher_steps)
    return losses.distillation(output, target, losses.WEIGHTS[config.distillation](schedule, sigma))


def discriminator_losses(state: State, real: HeadInputs, fake: HeadInputs, batch: Batch) -> DiscriminatorStep:
    """The discriminator's weighted losses: adversarial, mismatched text, R1."""
    config = state.config
    real, fake = real.detached(), fake.detached()
    penalty = config.r1 if config.r1_weight > 0 else "none"
    if penalty == "exact":
        for x in real.maps:
            x.requires_grad_(True)
    on_real, on_fake = logits(state, real), logits(state, fake)
    loss = losses.ADVERSARIAL[config.adversarial][0]
    parts = {"discriminator": loss(on_real, on_fake)}
    if config.mismatch_weight > 0 and batch.strangers.whole:
        both = (on_real, logits(state, mismatched(state, real, batch)))
        wrong = batch.strangers.mean(lambda rows: loss(*([x[rows] for x in side] for side in both)), both[1][0])
        parts["mismatch"] = config.mismatch_weight * wrong
    device = real.sigma.device
    draws = torch.Generator(device).manual_seed(batch.seed)
    like: dict[str, Any] = {"generator": draws, "device": device}
    if penalty == "exact":
        signs = [batch.drawn(lambda shape: torch.randint(2, shape, **like) * 2 - 1, x.shape) for x in on_real]
        parts["r1"] = config.r1_weight * losses.exact_r1(on_real, real.maps, signs)
    elif penalty == "approximate":
        noise = [batch.drawn(lambda shape: torch.randn(shape, **like), x.shape) for x in real.maps]
        moved = replace(real, maps=[x + config.r1_noise * e for x, e in zip(real.maps, noise, strict=True)])
        difference = losses.approximate_r1(on_real, logits(state, moved))
        parts["r1"] = config.r1_weight / config.r1_noise**2 * difference
    return DiscriminatorStep(parts, on_real, on_fake)


# --- Steps ---


def student_step(state: State, batch: Batch, uncond: Cond, phase: Phase, share: float) -> StudentStep:
    """Losses of the student on one batch, a `share` of the update's, and their gradient."""
    with autocast(state.config, state.student, state.student.teacher):
        step = student_losses(state, batch, uncond, phase)
    if not step.losses:  # nothing to learn from this batch: a loss of 0, so that there is a gradient
        step = replace(step, losses={"regression": 0.0 * step.output.sum()})
    _backward(state, step.losses, share)
    return step


def discriminator_step(state: State, batch: Batch, student: StudentStep, share: float) -> DiscriminatorStep:
    """Losses of the discriminator on the student's pictures, a `share` of the update's, and their gradient."""
    with autocast(state.config, state.student, state.student.teacher):
        real, fake = student.real, student.fake
        if real is None or fake is None:
            with torch.no_grad():
                real, fake = real_inputs(state, batch), head_inputs(state, student.output, batch.cond, batch)
        step = discriminator_losses(state, real, fake, batch)
    _backward(state, step.losses, share)
    return step


def fake_score_step(state: State, batch: Batch, student: StudentStep, share: float) -> dict[str, Tensor]:
    """The fake score's denoising loss on the student's pictures (DMD, arXiv 2311.18828), and its gradient."""
    assert state.fake_score
    with autocast(state.config, state.student, state.student.teacher):
        parts = {"fake_score": state.fake_score.loss(student.output, batch)}
    _backward(state, parts, share)
    return parts


def guidance_step(state: State, batch: GuidanceBatch, uncond: Cond, share: float) -> tuple[StudentStep, Tensor]:
    """Guidance distillation's loss (arXiv 2210.03142, eq. 4) and its gradient, beside the guided teacher's x0.

    At every level the student gives in one pass what the teacher gives with guidance, or without where there is none.
    """
    student, guidance = state.student, Guidance.of(state.config)
    with autocast(state.config, student, student.teacher):
        with torch.no_grad():
            given = batch.x, batch.sigma, batch.teacher_cond, uncond, guidance
            target = guided(student.teacher, *given, batch.acts).float()
        output = student(batch.x, batch.sigma, batch.cond).float()
        weight = losses.velocity_weight(student.schedule, batch.sigma)
        step = StudentStep(output, {"guidance": losses.distillation(output, target, weight)})
    _backward(state, step.losses, share)
    return step, target


def _backward(state: State, parts: dict[str, Tensor], share: float) -> None:
    state.scaler.scale(torch.stack(list(parts.values())).sum() * share).backward()
