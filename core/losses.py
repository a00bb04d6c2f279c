"""Adversarial losses, gradient penalties, distillation and regression: pure functions.

Logits come as a list of K tensors (B, N_k), one per head; each head counts the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .denoiser import Cond, Denoiser, Guidance, guided
from .schedule import Schedule, expand

Logits = Sequence[Tensor]


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([v.mean() for v in values]).mean()


def _pairs(real: Logits, fake: Logits):
    return list(zip(real, fake, strict=True))


# Hinge (ADD, eq. 2 and 3). The means over positions keep it alive at batch 1.
def hinge_discriminator(real: Logits, fake: Logits) -> Tensor:
    """The discriminator's hinge loss, (): real logits above 1, fake ones below -1."""
    return _mean([F.relu(1 - r) for r in real]) + _mean([F.relu(1 + f) for f in fake])


def hinge_student(fake: Logits, real: Logits | None = None) -> Tensor:
    """The student's hinge loss, (): the negative mean of its logits."""
    return -_mean(fake)


# Non-saturating (arXiv 1406.2661), as in StyleGAN.
def nonsaturating_discriminator(real: Logits, fake: Logits) -> Tensor:
    """The discriminator's logistic loss, ()."""
    return _mean([F.softplus(-r) for r in real]) + _mean([F.softplus(f) for f in fake])


def nonsaturating_student(fake: Logits, real: Logits | None = None) -> Tensor:
    """The student's logistic loss, (), which does not saturate where the discriminator is sure."""
    return _mean([F.softplus(-f) for f in fake])


# Relativistic pairing (R3GAN, arXiv 2501.05441, eq. 2): a fake is judged against a real of the same condition.
def relativistic_discriminator(real: Logits, fake: Logits) -> Tensor:
    """The discriminator's loss, (): each real logit above that of its fake."""
    return _mean([F.softplus(f - r) for r, f in _pairs(real, fake)])


def relativistic_student(fake: Logits, real: Logits | None = None) -> Tensor:
    """The student's loss, (): each fake logit above that of its real; raises ValueError without real logits."""
    if real is None:
        raise ValueError("the relativistic loss compares with real logits: give them")
    return _mean([F.softplus(r - f) for r, f in _pairs(real, fake)])


ADVERSARIAL: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "hinge": (hinge_discriminator, hinge_student),
    "nonsaturating": (nonsaturating_discriminator, nonsaturating_student),
    "relativistic": (relativistic_discriminator, relativistic_student),
}


# R1 (arXiv 1801.04406, eq. 9; ADD, eq. 3, takes it on the heads' input features): the slope at real pictures. Every
# position of a head is a discriminator of its own, so it is the mean over positions n of || grad_F D_n(F) ||^2, as
# large at every resolution, and the two estimators below agree: one is right for any perturbation, one needs no
# gradient of a gradient.
def exact_r1(logits: Logits, inputs: Sequence[Tensor], signs: Sequence[Tensor]) -> Tensor:
    """E || grad_F D_n(F) ||^2, (), of the heads' `inputs`, K maps (B, C_k, H_k, W_k) with requires_grad.

    In one backward pass for all positions: each logit is summed with a random sign, +1 or -1, under which the products
    of two positions' gradients vanish in expectation (Hutchinson's estimator of a trace).
    """
    signed = torch.stack([(x * sign).sum() for x, sign in zip(logits, signs, strict=True)]).sum()
    gradients = torch.autograd.grad(signed, list(inputs), create_graph=True)
    return _mean([g.square().sum((1, 2, 3)) / x.shape[1] for g, x in zip(gradients, logits, strict=True)])


def approximate_r1(logits: Logits, perturbed: Logits) -> Tensor:
    """|| D(x) - D(x + s e) ||^2 (APT, arXiv 2501.08316, eq. 4), of logits at the same noise and level.

    Over s^2 it is, for a small s, what `exact_r1` estimates.
    """
    return _mean([(a - b).square() for a, b in _pairs(logits, perturbed)])


# Weights c(t) of the distillation term (ADD, section 3.3).
def exponential_weight(schedule: Schedule, sigma: Tensor) -> Tensor:
    """c(t) = alpha_t, (B,)."""
    return schedule.alpha_sigma(sigma)[0]


def sds_weight(schedule: Schedule, sigma: Tensor) -> Tensor:
    """c(t) = alpha_t / (2 sigma_t) w(t) with w(t) = sigma_t^2 (DreamFusion), (B,)."""
    alpha, s = schedule.alpha_sigma(sigma)
    return alpha / (2 * s) * s**2


# The loss of guidance distillation (arXiv 2210.03142, section 3.1), whose weight there is max(SNR, 1).
def velocity_weight(schedule: Schedule, sigma: Tensor) -> Tensor:
    """1 / sigma_t^2, (B,): an error of x0 counts as that of the velocity does, v or a flow's; of v it is SNR + 1."""
    return schedule.alpha_sigma(sigma)[1] ** -2


def equal_weight(schedule: Schedule, sigma: Tensor) -> Tensor:
    """c(t) = 1, (B,)."""
    return torch.ones_like(sigma)


WEIGHTS: dict[str, Callable[[Schedule, Tensor], Tensor]] = {
    "exponential": exponential_weight,
    "sds": sds_weight,
    # These two change the target, not the weight.
    "nfsd": exponential_weight,
    "matching": equal_weight,
}


@torch.no_grad()
def teacher_target(
    teacher: Denoiser, x: Tensor, sigma: Tensor, cond: Cond, uncond: Cond | None, guidance: float, steps: int = 1
) -> Tensor:
    """The teacher's guided x0 (B, C, H, W) from x at sigma (B,), in `steps` Euler steps to 0 (ADD, table 1d)."""

    def model(x: Tensor, s: Tensor) -> Tensor:
        return guided(teacher, x, s, cond, uncond, Guidance(guidance))

    if steps == 1:
        return model(x, sigma)
    fractions = torch.linspace(1, 0, steps + 1)
    timestep = teacher.schedule.timestep(sigma)
    for fraction, following in pairwise(fractions):
        now = sigma if fraction == 1 else teacher.schedule.sigma(timestep * fraction).to(sigma)
        after = teacher.schedule.sigma(timestep * following).to(sigma) if following > 0 else torch.zeros_like(sigma)
        denoised = model(x, now)
        x = x + (x - denoised) / expand(now, x) * expand(after - now, x)
    return x


@torch.no_grad()
def nfsd_target(
    teacher: Denoiser,
    x: Tensor,
    x0: Tensor,
    sigma: Tensor,
    cond: Cond,
    uncond: Cond,
    guidance: float,
    negative: Cond | None = None,
) -> Tensor:
    """Noise-free score distillation's target (arXiv 2310.17590, eq. 8-10), (B, C, H, W).

    x0 moved against delta_D + s delta_C, where delta_C is the condition's direction and delta_D the
    domain correction: the unconditional noise below timestep 200, above it the difference to a
    `negative` prompt (none given: zero). The noise residue, which blurs SDS, is left out.
    """
    schedule = teacher.schedule
    parts = [cond, uncond.repeat(len(x)) if len(uncond) == 1 else uncond]
    if negative is not None:
        parts.append(negative.repeat(len(x)) if len(negative) == 1 else negative)
    n = len(parts)
    denoised = teacher(torch.cat([x] * n), torch.cat([sigma] * n), Cond.cat(parts)).chunk(n)
    eps = [schedule.noise_in(x, d, sigma) for d in denoised]
    above = eps[1] - eps[2] if negative is not None else torch.zeros_like(x)
    small = expand((schedule.timestep(sigma) < 200).float(), x)
    correction = small * eps[1] + (1 - small) * above
    alpha, s = schedule.alpha_sigma(sigma)
    return x0 - expand(s / alpha, x) * (correction + guidance * (eps[0] - eps[1]))


@torch.no_grad()
def matching_target(
    teacher: Denoiser,
    score: Denoiser,
    x: Tensor,
    x0: Tensor,
    sigma: Tensor,
    cond: Cond,
    uncond: Cond | None,
    guidance: float,
    score_cond: Cond | None = None,
) -> Tensor:
    """Distribution matching's target (DMD, arXiv 2311.18828, eq. 7 and 8), (B, C, H, W).

    `score` denoises what the student makes, of `score_cond` if that is another condition than the teacher's; the
    teacher denoises what it should make; x0 is moved by their
    difference at x, its noised self at sigma (B,), over the teacher's mean distance from x0.
    """
    real = guided(teacher, x, sigma, cond, uncond, Guidance(guidance))
    fake = score(x, sigma, cond if score_cond is None else score_cond)
    scale = (x0 - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-4)
    return x0 + (real - fake) / scale


def denoising(denoiser: Denoiser, x0: Tensor, noise: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    """The ordinary training loss of a diffusion model, on its backbone's output: x0, noise (B, ...), sigma (B,)."""
    x = denoiser.schedule.add_noise(x0, noise, sigma)
    wanted = denoiser.schedule.from_x0(denoiser.prediction, x, x0, sigma)
    return F.mse_loss(denoiser.output(x, sigma, cond).float(), wanted)


def distillation(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """E c(t) || x_hat - x_psi ||^2 (ADD, eq. 4), mean over elements; the target takes no gradient."""
    return (weight * (output - target.detach()).square().mean((1, 2, 3))).mean()


def regression(output: Tensor, target: Tensor, delta: float = 0.5) -> Tensor:
    """Huber between the student's picture and the teacher's from the same noise, (B, C, H, W) each."""
    return F.huber_loss(output, target.detach(), delta=delta)


def feature_matching(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean L1 between K standardised feature maps of the student's and of the teacher's picture."""
    return _mean([(f - r.detach()).abs() for f, r in _pairs(fake, real)])
