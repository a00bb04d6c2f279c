"""Between two tensors: straight lines, and great circles, which keep the length of noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .denoiser import Cond

PARALLEL = 0.9995  # cosine above which the great circle is the straight line


def lerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The straight line from a (...) to b (...), at 0 to 1 of the way."""
    return a + (b - a) * share


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The great circle from a (...) to b (...), whole tensors as vectors, at 0 to 1 of the way (arXiv 1609.04468).

    Their lengths are interpolated along. Vectors of nearly one direction, or none, are joined by the straight line.
    """
    lengths = a.float().norm(), b.float().norm()
    if min(lengths) == 0:
        return lerp(a, b, share)
    first, second = a.float() / lengths[0], b.float() / lengths[1]
    cosine = float((first * second).sum().clamp(-1, 1))
    if abs(cosine) > PARALLEL:
        return lerp(a, b, share)
    angle = math.acos(cosine)
    turned = (math.sin((1 - share) * angle) * first + math.sin(share * angle) * second) / math.sin(angle)
    return (turned * torch.lerp(lengths[0], lengths[1], share)).to(a.dtype)


def blended(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Between the latents of two pictures (C, H, W): the line, with each channel's mean and spread interpolated.

    Latents of pictures are no noise: a great circle has no meaning for them, and their mean is flat (AdaIN, as in
    DiffMorpher, arXiv 2312.07409).
    """
    line, dims = lerp(a, b, share), (-2, -1)
    spread = lerp(a.std(dims, keepdim=True), b.std(dims, keepdim=True), share)
    mean = line.mean(dims, keepdim=True)
    return (line - mean) / line.std(dims, keepdim=True).clamp(min=1e-6) * spread + mean


def turned(noise: Tensor, other: Tensor, angle: float) -> Tensor:
    """Unit noise (...) turned by an angle towards other unit noise (...): unit noise again, whatever the angle."""
    return math.cos(angle) * noise + math.sin(angle) * other


def mixed(a: Cond, b: Cond, share: float) -> Cond:
    """Two conditions, at 0 to 1 of the way from one to the other; their texts may have different lengths.

    Token states are mixed token by token; a pooled text goes along the great circle.
    """
    if share <= 0 or share >= 1:
        return a if share <= 0 else b
    both = Cond.cat([a, b])
    first, second = both.rows(slice(0, len(a))), both.rows(slice(len(a), None))
    pooled = None
    if first.pooled is not None and second.pooled is not None:
        pooled = torch.stack([slerp(x, y, share) for x, y in zip(first.pooled, second.pooled, strict=True)])
    extra = {
        name: lerp(value, second.extra[name], share) if value.is_floating_point() else value
        for name, value in first.extra.items()
    }
    lengths = {name: torch.maximum(value, second.lengths[name]) for name, value in first.lengths.items()}
    return Cond(lerp(first.context, second.context, share), pooled, extra, lengths)
