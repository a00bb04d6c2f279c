"""Whether a model predicts what its label says, told by its own output before work starts.

A v model that is called epsilon, or the reverse, loads without an error and gives noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.denoiser import Cond, Denoiser
from ..core.sampling import sample_euler, trailing_sigmas
from ..core.schedule import PREDICTION_TYPES, DiscreteSchedule

PURE = 14.0  # sigma at which nearly all is noise
STEPS = 4  # of the pictures that are sampled
LEVELS = (0.5, 1.0, 2.0)  # sigmas at which they are noised again
# The distance up to which a reading fits. Trained models lie at 0.1 to 0.35 under their own, the best for pictures that
# are hard to tell from noise at 0.5; networks that put out their input at 0.63 or more, others untrained above 0.8.
NEAR = {"eps": 0.5, "v": 0.6}
LARGEST = 64  # latents of a side: more tell no more


def check_prediction(denoiser: Denoiser, latent_shape: tuple[int, int, int], cond: Cond) -> str:
    """What to say of a model that is labelled eps and predicts v, or the reverse; "" of all others.

    `latent_shape` is (C, H, W), of `cond` the first row counts. Nothing is said where the output does not tell, as of a
    network that is not trained, and of models other than eps and v. Costs one pass of two pictures, and eight more
    where that does not fit the label.
    """
    label = denoiser.prediction
    if label not in NEAR or not isinstance(denoiser.schedule, DiscreteSchedule):
        return ""
    other = "v" if label == "eps" else "eps"
    if (noise_in_output(denoiser, latent_shape, cond) > 0.5) == (label == "eps"):
        return ""
    if not reading_distance(denoiser, latent_shape, cond, other) < NEAR[other]:
        return ""
    return (
        f"this model is labelled {PREDICTION_TYPES[label]}, but its output is that of a model that predicts "
        f"{PREDICTION_TYPES[other]}: load it as one that predicts {other}, or all of its pictures will be noise"
    )


class _Reading:
    """A denoiser whose output is read in a given way, as samplers call it."""

    def __init__(self, denoiser: Denoiser, cond: Cond, prediction: str):
        self.denoiser, self.cond, self.prediction = denoiser, cond, prediction
        self.schedule = denoiser.schedule

    def __call__(self, x: Tensor, sigma: Tensor, **_) -> Tensor:
        return self.schedule.to_x0(self.prediction, x, self.denoiser.output(x, sigma, self.cond), sigma)


def _drawn(denoiser: Denoiser, latent_shape: tuple[int, int, int], rows: int, seed: int) -> Tensor:
    """Noise for two pictures a row (rows, 2, C, H, W), no larger than what is looked at."""
    channels, height, width = latent_shape
    shape = (rows, 2, channels, min(height, LARGEST), min(width, LARGEST))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(denoiser.device)


def _pair(denoiser: Denoiser, cond: Cond) -> Cond:
    return cond.rows(slice(0, 1)).to(denoiser.device).repeat(2)


@torch.no_grad()
def noise_in_output(denoiser: Denoiser, latent_shape: tuple[int, int, int], cond: Cond, seed: int = 0) -> float:
    """How much of pure noise a network puts out again: all (1) if it predicts eps, next to none (0) if v.

    v = alpha noise - sigma x0 (arXiv 2202.00512), and alpha is 0.07 there.
    """
    (noise,) = _drawn(denoiser, latent_shape, 1, seed)
    sigma = torch.full((2,), PURE, device=denoiser.device)
    output = denoiser.output(PURE * noise, sigma, _pair(denoiser, cond))
    return float((output.double() * noise.double()).sum() / noise.double().square().sum())


@torch.no_grad()
def reading_distance(
    denoiser: Denoiser, latent_shape: tuple[int, int, int], cond: Cond, prediction: str, seed: int = 0
) -> float:
    """How far a network's output is from what it should be under a reading, eps or v: 0, or 1 if it puts out nothing.

    Pictures x0 are sampled under the reading, and noised again. The output is then a noise + b x0, by least squares;
    (a, b) should be (1, 0) for eps and (alpha, -sigma) for v. The mean distance of the two over three levels of noise.
    """
    cond = _pair(denoiser, cond)
    first, *more = _drawn(denoiser, latent_shape, 1 + len(LEVELS), seed)
    sigmas = trailing_sigmas(denoiser.schedule, STEPS).to(denoiser.device)
    x0 = sample_euler(_Reading(denoiser, cond, prediction), sigmas[0] * first, sigmas)
    total = 0.0
    for level, noise in zip(LEVELS, more, strict=True):
        sigma = torch.full((2,), level, device=denoiser.device)
        output = denoiser.output(denoiser.schedule.add_noise(x0, noise, sigma), sigma, cond)
        if not (output.isfinite().all() and x0.isfinite().all()):
            return float("inf")
        parts = torch.stack([noise.flatten(), x0.flatten()], 1).double().cpu()
        a, b = torch.linalg.lstsq(parts, output.double().cpu().flatten()[:, None]).solution.flatten().tolist()
        alpha, s = (float(v[0]) for v in denoiser.schedule.alpha_sigma(sigma))
        right = (1.0, 0.0) if prediction == "eps" else (alpha, -s)
        total += ((a - right[0]) ** 2 + (b - right[1]) ** 2) ** 0.5
    return total / len(LEVELS)
