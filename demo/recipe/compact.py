"""A training's state in six bytes a parameter: float16 weights, 8-bit moments and averages.

Whatever is saved is also what the training goes on with, so that a resumed run and one that was never
stopped are the same to the bit. Rounding weights to float16 once in some hundred updates moves them less
than a tenth of one update does; the moments are forgotten and built anew within as many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """A tensor as whole numbers from -127 to 127, with one scale for each index of its first dimension."""

    values: Tensor  # int8, the tensor's shape
    scale: Tensor  # float32 (first dimension,)

    def decode(self) -> Tensor:
        return self.values.float() * self.scale.view(-1, *[1] * (self.values.ndim - 1))


def rows(x: Tensor) -> Rows:
    """Round to the nearest of 255 steps of each row; an error of at most 1/254 of the row's largest value."""
    x = x.float()
    scale = x.flatten(1).abs().amax(1) / 127 if x.ndim > 1 else x.abs() / 127
    wide = scale.clamp(min=torch.finfo(torch.float32).tiny).view(-1, *[1] * (x.ndim - 1))
    return Rows((x / wide).round().to(torch.int8), scale)


def logarithm(x: Tensor) -> Tensor:
    """Numbers >= 0 -> int8 of half powers of two, 2^-64 to 2^63; a root's error is then at most 9 %.

    For Adam's second moments: on a linear scale the small ones would become nought, and be divided by.
    """
    return (2 * x.float().clamp(min=2.0**-64).log2()).round().clamp(-128, 127).to(torch.int8)


def exponential(x: Tensor) -> Tensor:
    """The inverse of `logarithm`, float32; the least value stands for nought."""
    return torch.where(x > -128, torch.exp2(x.float() / 2), 0.0)
