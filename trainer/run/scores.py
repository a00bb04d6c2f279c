"""Scores by which the best student is chosen; lower is better."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Scores pictures of the student against the teacher's for the same prompts and noise; lower is better.
Score = Callable[[Tensor, Tensor], float]


def kind_of(score: Score) -> str:
    """A score's name; values of two kinds cannot be compared."""
    return getattr(score, "__name__", type(score).__name__)


def latent_score(student: Tensor, teacher: Tensor) -> float:
    """Kernel distance on downsampled latents, which every host has. Front ends with a feature network pass theirs."""
    size = min(8, student.shape[-1])
    pooled = [torch.nn.functional.adaptive_avg_pool2d(x.float(), size).flatten(1) for x in (student, teacher)]
    return kernel_distance(*pooled)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x y / d + 1)^3 (KID, arXiv 1801.01401) of features (N, d), (M, d)."""
    a, b = a.double(), b.double()
    n, m, d = len(a), len(b), a.shape[1]
    if n < 2 or m < 2:
        raise ValueError(f"the kernel distance needs two samples on each side, not {n} and {m}")
    aa, bb, ab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = (aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1))
    return float(within - 2 * ab.mean())
