"""One step each of student, discriminator and fake score: losses and gradients of one batch (ADD, LADD, DMD).

A step leaves its gradients on what it trains; the optimizers come later (`distill.py`), so that several batches can
make one update. Everything stays on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...core import losses
from ...core.augment import cropped
from ...core.denoiser import Cond, Guidance, guided
from ...core.schedule import expand
from ...core.transfer import to_device
from .batch import Batch, GuidanceBatch
from .health import Judged
from .precision import autocast
from .state import Critic, State

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
class Seen:
    """The positives and the student's pictures as one discriminator sees them."""

    real: HeadInputs
    fake: HeadInputs


@dataclass(frozen=True)
class StudentStep:
    """What a student's step made."""

    output: Tensor  # x0 (B, C, H, W), with its graph until the gradient is taken
    losses: dict[str, Tensor]  # by name, weighted
    seen: list[Seen] = field(default_factory=list)  # by each discriminator, where the student's losses needed it


@dataclass(frozen=True)
class DiscriminatorStep:
    """What the discriminators' step made."""

    losses: dict[str, Tensor]
    judged: list[Judged] = field(default_factory=list)  # by each discriminator


# --- What a discriminator sees ---

# What views are drawn for: a picture is cropped and augmented anew for each.
OF_FAKE, OF_REAL, OF_DISTILLATION = range(3)


def head_inputs(state: State, critic: Critic, x0: Tensor, cond: Cond, batch: Batch) -> HeadInputs:
    """Features of x0 (B, C, H, W) at the batch's noise level (LADD, section 3.2), with gradients to x0.

    A pixel backbone sees clean pictures: its level is 0.
    """
    features = critic.features
    sigma = batch.renoise if features.conditional else torch.zeros_like(batch.renoise)
    noisy = state.student.schedule.add_noise(x0, batch.noise, sigma)
    maps = features(noisy, sigma, cond, batch.view(OF_FAKE) if features.varies else None)
    image = image_condition(state, critic, batch)
    return HeadInputs(critic.discriminator.standardise(maps), sigma, cond.summary, image)


@torch.no_grad()
def real_inputs(state: State, critic: Critic, batch: Batch, perturbation: float = 0.0) -> HeadInputs:
    """Features of the batch's positives; the first ones calibrate the discriminator.

    A `perturbation` is the size of noise that is put on the positives themselves; all else is as without.
    """
    discriminator, sigma = critic.discriminator, batch.renoise
    if critic.features.conditional:
        noisy = state.student.schedule.add_noise(_perturbed(batch, perturbation), batch.noise, sigma)
        maps = critic.features(noisy, sigma, batch.positive_cond)
    else:
        sigma = torch.zeros_like(sigma)
        maps = _real_pictures(state, critic.features, batch, perturbation)
    discriminator.calibrate(maps, lambda rows: state.world.gather(rows, batch.whole))
    text, image = batch.positive_cond.summary, image_condition(state, critic, batch)
    return HeadInputs(discriminator.standardise(maps), sigma, text, image)


def _perturbed(batch: Batch, size: float) -> Tensor:
    """The batch's positives (B, C, H, W) with noise of this size on them."""
    if not size:
        return batch.positive
    noise = [batch.noise_of(i, x.shape) for i, x in enumerate(batch.positive)]
    return batch.positive + size * to_device(torch.stack(noise), batch.positive.device)


def _real_pictures(state: State, features: Any, batch: Batch, perturbation: float) -> list[Tensor]:
    """What a pixel backbone sees of the positives, each alone.

    It sees the same clean picture again and again: its maps are cached, unless it is seen in another way each time.
    """
    view, device = batch.view(OF_REAL) if features.varies else None, batch.positive.device
    sigma = torch.zeros_like(batch.renoise)
    positive = _perturbed(batch, perturbation)

    def alone(i: int) -> list[Tensor]:
        one = slice(i, i + 1)
        how = None if view is None else view[one]
        raw = batch.raw(i) if state.config.raw_pictures else None
        if raw is not None:
            if perturbation:
                raw = raw + perturbation * batch.noise_of(i, raw.shape)
            return features.of_pictures(to_device(raw[None], device), how)
        return features(positive[one], sigma[one], batch.positive_cond.rows(one), how)

    if not features.varies and not perturbation:
        return state.feature_cache.of(batch.positive_key, alone, device)
    return [torch.cat(maps) for maps in zip(*map(alone, range(len(batch.positive))), strict=True)]


@torch.no_grad()
def image_condition(state: State, critic: Critic, batch: Batch) -> Tensor | None:
    """ADD's c_img (B, I): features of the clean picture, where the student was given a part of it.

    The teacher knows noisy pictures alone: it sees this one with the little noise of its level.
    """
    if not critic.discriminator.image:
        return None
    picture, schedule = batch.target, state.student.schedule
    sigma = schedule.sigma(picture.new_full((len(picture),), CLEAN))
    if critic.features.conditional:
        picture = schedule.add_noise(picture, batch.noise, sigma)
    features = critic.features(picture, sigma, batch.cond)[-1].mean((2, 3))
    return features * expand(~batch.first, batch.target)[:, :, 0, 0]


def logits(critic: Critic, inputs: HeadInputs) -> list[Tensor]:
    """K logits (B, N_k)."""
    return critic.discriminator(inputs.maps, inputs.sigma, inputs.text, inputs.image)


def mismatched(state: State, critic: Critic, real: HeadInputs, batch: Batch) -> HeadInputs:
    """The positives with the texts of their neighbours in the batch, for a matching-aware discriminator.

    (arXiv 1605.05396, section 4.2.)
    """
    assert batch.stranger_cond
    if not critic.features.conditional:
        return replace(real, text=batch.stranger_cond.summary)
    with torch.no_grad():
        return head_inputs(state, critic, batch.positive, batch.stranger_cond, batch)


# --- Losses ---


def student_losses(state: State, batch: Batch, uncond: Cond, phase: Phase) -> StudentStep:
    """The student's pass and its weighted losses: regression, distillation, features, adversarial."""
    config = state.config
    output = state.student(batch.x, batch.sigma, batch.cond).float()
    paired, parts = batch.paired, {}
    if config.regression_weight > 0 and paired.whole:
        regression = paired.mean(lambda rows: losses.regression(output[rows], batch.target[rows]), output)
        parts["regression"] = config.regression_weight * regression
    if phase.adversarial and config.distillation_weight > 0:
        weight = config.distillation_weight * (phase.ramp if state.fake_score else 1.0)
        parts["distillation"] = weight * distillation_loss(state, output, batch, uncond)
    matches = config.feature_weight > 0 and paired.whole > 0
    if not matches and not (phase.adversarial and config.adversarial_weight > 0):
        return StudentStep(output, parts)
    seen = []
    for critic in state.critics:
        found = Seen(real_inputs(state, critic, batch), head_inputs(state, critic, output, batch.cond, batch))
        seen.append(found)
        for name, loss in _judged_losses(state, critic, found, batch, phase):
            parts[_named(state, critic, name)] = loss
    return StudentStep(output, parts, seen)


def _named(state: State, critic: Critic, name: str) -> str:
    """A loss's name; where two discriminators judge, with what this one sees."""
    return name if len(state.critics) == 1 else f"{name} ({critic.features.name})"


def _judged_losses(
    state: State, critic: Critic, seen: Seen, batch: Batch, phase: Phase
) -> Iterator[tuple[str, Tensor]]:
    """The student's losses by what one discriminator sees: matching its features, and adversarial."""
    config, paired, real, fake = state.config, batch.paired, seen.real, seen.fake
    if config.feature_weight > 0 and paired.whole > 0:
        with torch.no_grad():
            same = config.positives == "teacher" and not critic.features.varies
            # Where pictures are cropped and augmented, these are as the student's.
            target = real if same else head_inputs(state, critic, batch.target, batch.cond, batch)
        both = (fake.maps, target.maps)
        matching = paired.mean(
            lambda rows: losses.feature_matching(*([x[rows] for x in m] for m in both)), fake.maps[0]
        )
        yield "features", critic.share * config.feature_weight * matching
    if phase.adversarial and config.adversarial_weight > 0:
        weight = critic.share * config.adversarial_weight * phase.ramp
        yield "adversarial", weight * adversarial_loss(state, critic, real, fake)


def adversarial_loss(state: State, critic: Critic, real: HeadInputs, fake: HeadInputs) -> Tensor:
    """The student's side of the adversarial loss; the discriminator takes no gradient."""
    name, on_real = state.config.adversarial, None
    try:
        critic.discriminator.requires_grad_(False)
        on_fake = logits(critic, fake)
        if name == "relativistic":
            with torch.no_grad():
                on_real = logits(critic, real)
    finally:
        critic.discriminator.requires_grad_(True)
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
    weight = losses.WEIGHTS[config.distillation](schedule, sigma)
    if state.decoder:
        with torch.no_grad():
            target = _pictures(state, target, batch)
        output = _pictures(state, output, batch)
    return losses.distillation(output, target, weight)


def _pictures(state: State, latents: Tensor, batch: Batch) -> Tensor:
    """Latents as pictures, in [-1, 1] as ADD compares them; the part of them that `pixel_crop` leaves."""
    assert state.decoder
    side = math.ceil(state.config.pixel_crop / state.decoder.factor)
    part = cropped(latents, side, batch.view(OF_DISTILLATION))
    parts = part.split(state.decoder.at_once(part))
    again = state.config.gradient_checkpointing and torch.is_grad_enabled()
    options: Any = {"use_reentrant": False, "preserve_rng_state": False}
    found = [checkpoint(state.decoder, x, **options) if again else state.decoder(x) for x in parts]
    return 2 * torch.cat(found) - 1


def discriminator_losses(
    state: State, critic: Critic, real: HeadInputs, fake: HeadInputs, batch: Batch
) -> tuple[dict[str, Tensor], Judged]:
    """A discriminator's weighted losses, adversarial, mismatched text and R1, and its logits of real and fake."""
    config = state.config
    real, fake = real.detached(), fake.detached()
    penalty = config.r1 if config.r1_weight > 0 else "none"
    if penalty == "exact":
        for x in real.maps:
            x.requires_grad_(True)
    on_real, on_fake = logits(critic, real), logits(critic, fake)
    loss = losses.ADVERSARIAL[config.adversarial][0]
    parts = {"discriminator": loss(on_real, on_fake)}
    if config.mismatch_weight > 0 and batch.strangers.whole:
        both = (on_real, logits(critic, mismatched(state, critic, real, batch)))
        wrong = batch.strangers.mean(lambda rows: loss(*([x[rows] for x in side] for side in both)), both[1][0])
        parts["mismatch"] = config.mismatch_weight * wrong
    device = real.sigma.device
    draws = torch.Generator(device).manual_seed(batch.seed)
    like: dict[str, Any] = {"generator": draws, "device": device}
    if penalty == "exact":
        signs = [batch.drawn(lambda shape: torch.randint(2, shape, **like) * 2 - 1, x.shape) for x in on_real]
        parts["r1"] = config.r1_weight * losses.exact_r1(on_real, real.maps, signs)
    elif penalty in ("approximate", "data"):
        if penalty == "data":
            moved = real_inputs(state, critic, batch, config.r1_noise)
        else:
            noise = [batch.drawn(lambda shape: torch.randn(shape, **like), x.shape) for x in real.maps]
            moved = replace(real, maps=[x + config.r1_noise * e for x, e in zip(real.maps, noise, strict=True)])
        difference = losses.approximate_r1(on_real, logits(critic, moved))
        parts["r1"] = config.r1_weight / config.r1_noise**2 * difference
    return {_named(state, critic, name): loss for name, loss in parts.items()}, (on_real, on_fake)


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
    """Losses of each discriminator on the student's pictures, a `share` of the update's, and their gradient."""
    with autocast(state.config, state.student, state.student.teacher):
        seen = student.seen or [_seen_alone(state, critic, student.output, batch) for critic in state.critics]
        parts, judged = {}, []
        for critic, each in zip(state.critics, seen, strict=True):
            found, of_both = discriminator_losses(state, critic, each.real, each.fake, batch)
            parts |= found
            judged.append(of_both)
    _backward(state, parts, share)
    return DiscriminatorStep(parts, judged)


@torch.no_grad()
def _seen_alone(state: State, critic: Critic, output: Tensor, batch: Batch) -> Seen:
    return Seen(real_inputs(state, critic, batch), head_inputs(state, critic, output, batch.cond, batch))


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
