"""Whether a distillation is well: a few numbers every update, and words when one leaves its range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Health:
    """One update's measures. Ratios are the student's over the positives', in latents; 1 is healthy.

    Of two discriminators accuracy and gap are those of the latents', beside those of the pictures'.
    """

    accuracy: float  # of the discriminator, 0 to 1
    logit_gap: float  # mean logit of real minus fake
    saturation: float  # ratio of the latents' spread
    sharpness: float  # ratio of the power in high frequencies
    diversity: float  # ratio of the mean distance between samples of a batch
    pixel_accuracy: float | None = None
    pixel_logit_gap: float | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """Those that there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


Judged = tuple[Sequence[Tensor], Sequence[Tensor]]  # a discriminator's K logits (B, N_k) of real and fake


@dataclass(frozen=True)
class HealthParts:
    """The numbers that a Health is made of, still on the device.

    `values` are K gaps and K rights of each discriminator with its K heads, and five more.
    """

    values: list[Tensor]
    heads: tuple[int, ...]  # of each discriminator
    relative: bool

    def take(self, numbers: Iterator[float]) -> Health:
        """The Health of the values, once they are plain numbers."""
        judged: list[tuple[float, float]] = []
        for heads in self.heads:
            gap = sum(next(numbers) for _ in range(heads)) / heads
            judged.append((sum(next(numbers) for _ in range(heads)) / heads / (1 if self.relative else 2), gap))
        accuracy, logit_gap = judged[0] if judged else (0.0, 0.0)
        more = dict(zip(("pixel_accuracy", "pixel_logit_gap"), judged[1], strict=True)) if judged[1:] else {}
        saturation, sharp, sharp_real, spread, spread_real = (next(numbers) for _ in range(5))
        return Health(
            accuracy=accuracy,
            logit_gap=logit_gap,
            saturation=saturation,
            sharpness=sharp / max(sharp_real, 1e-12),
            # A small batch may hold one picture twice, or one alone: then there is nothing to compare with.
            diversity=spread / spread_real if spread_real > 1e-6 else 1.0,
            **more,
        )


def high_frequency_power(x: Tensor) -> Tensor:
    """Mean square, (), of what a 3x3 blur takes away from x (B, C, H, W)."""
    return (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)).square().mean()


def spread_of_batch(x: Tensor) -> Tensor:
    """Mean squared distance, (), between neighbours of a batch (B, C, H, W); 0 for one sample."""
    return (x - x.roll(1, 0)).square().mean()


def health_parts(judged: Sequence[Judged], output: Tensor, positives: Tensor, relative: bool) -> HealthParts:
    """What Health needs of each discriminator's logits, and of the latents (B, C, H, W) behind them.

    `relative` judges accuracy by the difference of the two logits, as relativistic losses do.
    """
    output, positives = output.detach().float(), positives.float()
    values: list[Tensor] = []
    for real, fake in judged:
        pairs = [(r.detach(), f.detach()) for r, f in zip(real, fake, strict=True)]
        values += [r.mean() - f.mean() for r, f in pairs]
        if relative:
            values += [(r > f).float().mean() for r, f in pairs]
        else:
            values += [(r > 0).float().mean() + (f < 0).float().mean() for r, f in pairs]
    saturation = output.std() / positives.std().clamp(min=1e-6)
    powers = [f(x) for f in (high_frequency_power, spread_of_batch) for x in (output, positives)]
    return HealthParts([*values, saturation, *powers], tuple(len(real) for real, _ in judged), relative)


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
OF_DISCRIMINATORS = ("accuracy", "logit_gap", "pixel_accuracy", "pixel_logit_gap")
RANGES |= {
    f"pixel_{name}": (low, f"of pictures, {below}", high, f"of pictures, {above}")
    for name, (low, below, high, above) in RANGES.items()
    if name in OF_DISCRIMINATORS
}


def average(healths: Sequence[Health]) -> dict[str, float]:
    """Mean of each measure over some updates."""
    rows = [h.numbers for h in healths]
    return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}


def warnings(means: dict[str, float], adversarial: bool) -> list[str]:
    """What is out of range in the means over some updates, in words with a remedy."""
    found = []
    for name, (low, below, high, above) in RANGES.items():
        if name not in means or (not adversarial and name in OF_DISCRIMINATORS):
            continue
        value = means[name]
        if value < low or value > high:
            found.append(f"{name} is {value:.2f} (healthy {low:g} to {high:g}): {below if value < low else above}")
    return found
