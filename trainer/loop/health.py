"""Whether a distillation is well: a few numbers every update, and words when one leaves its range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Health:
    """One update's measures. Ratios are the student's over the positives', in latents; 1 is healthy."""

    accuracy: float  # of the discriminator, 0 to 1
    logit_gap: float  # mean logit of real minus fake
    saturation: float  # ratio of the latents' spread
    sharpness: float  # ratio of the power in high frequencies
    diversity: float  # ratio of the mean distance between samples of a batch


@dataclass(frozen=True)
class HealthParts:
    """The numbers that a Health is made of, still on the device: `values` are K gaps, K rights, and five more."""

    values: list[Tensor]
    heads: int  # K
    relative: bool

    def take(self, numbers: Iterator[float]) -> Health:
        """The Health of the values, once they are plain numbers."""
        gaps = [next(numbers) for _ in range(self.heads)]
        rights = [next(numbers) / (1 if self.relative else 2) for _ in range(self.heads)]
        saturation, sharp, sharp_real, spread, spread_real = (next(numbers) for _ in range(5))
        return Health(
            accuracy=sum(rights) / self.heads if self.heads else 0.0,
            logit_gap=sum(gaps) / self.heads if self.heads else 0.0,
            saturation=saturation,
            sharpness=sharp / max(sharp_real, 1e-12),
            # A small batch may hold one picture twice, or one alone: then there is nothing to compare with.
            diversity=spread / spread_real if spread_real > 1e-6 else 1.0,
        )


def high_frequency_power(x: Tensor) -> Tensor:
    """Mean square, (), of what a 3x3 blur takes away from x (B, C, H, W)."""
    return (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)).square().mean()


def spread_of_batch(x: Tensor) -> Tensor:
    """Mean squared distance, (), between neighbours of a batch (B, C, H, W); 0 for one sample."""
    return (x - x.roll(1, 0)).square().mean()


def health_parts(
    real: Sequence[Tensor], fake: Sequence[Tensor], output: Tensor, positives: Tensor, relative: bool
) -> HealthParts:
    """What Health needs of K logits (B, N_k) of real and fake, and of the latents (B, C, H, W) behind them.

    `relative` judges accuracy by the difference of the two logits, as relativistic losses do.
    """
    output, positives = output.detach().float(), positives.float()
    pairs = [(r.detach(), f.detach()) for r, f in zip(real, fake, strict=True)]
    gaps = [r.mean() - f.mean() for r, f in pairs]
    if relative:
        rights = [(r > f).float().mean() for r, f in pairs]
    else:
        rights = [(r > 0).float().mean() + (f < 0).float().mean() for r, f in pairs]
    saturation = output.std() / positives.std().clamp(min=1e-6)
    powers = [f(x) for f in (high_frequency_power, spread_of_batch) for x in (output, positives)]
    return HealthParts([*gaps, *rights, saturation, *powers], len(pairs), relative)


# Range, and what to say below and above it (method: others' runs failed in these ways).
RANGES: dict[str, tuple[float, str, float, str]] = {
    "accuracy": (
        0.52,
        "the discriminator hardly tells student from teacher: raise lr_discriminator or discriminator_updates",
        0.95,
        "the discriminator wins too easily: raise r1_weight, or lower lr_discriminator",
    ),
    "logit_gap": (
        0.02,
        "the discriminator's logits do not part: raise lr_discriminator",
        15.0,
        "the discriminator's logits run away: raise r1_weight",
    ),
    "saturation": (
        0.8,
        "pictures turn grey: raise adversarial_weight",
        1.25,
        "pictures are oversaturated: lower guidance or distillation_guidance",
    ),
    "sharpness": (
        0.5,
        "pictures are blurred: train longer, or raise adversarial_weight",
        2.0,
        "pictures are noisy: lower adversarial_weight, or set prediction to x0",
    ),
    "diversity": (
        0.6,
        "pictures become alike: raise regression_weight",
        1.8,
        "pictures fall apart: raise regression_weight, lower adversarial_weight",
    ),
}


def average(healths: Sequence[Health]) -> dict[str, float]:
    """Mean of each measure over some updates."""
    rows = [asdict(h) for h in healths]
    return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}


def warnings(means: dict[str, float], adversarial: bool) -> list[str]:
    """What is out of range in the means over some updates, in words with a remedy."""
    found = []
    for name, (low, below, high, above) in RANGES.items():
        if not adversarial and name in ("accuracy", "logit_gap"):
            continue
        value = means[name]
        if value < low or value > high:
            found.append(f"{name} is {value:.2f} (healthy {low:g} to {high:g}): {below if value < low else above}")
    return found
