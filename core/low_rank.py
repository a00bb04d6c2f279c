"""Changes of weights by matrices of low rank, and the nearest ones at a rank.

(Eckart and Young: of all matrices of rank r the truncated SVD is the nearest; of large ones by a randomised SVD,
arXiv 0909.4061.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 512  # the smaller side of a matrix up to which the whole SVD is computed
OVERSAMPLED, ITERATIONS = 16, 4


@dataclass(frozen=True)
class Change:
    """A layer's weight (out, in, ...) changes by scale * up (out, r, ...) @ down (r, in, ...)."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the layer's weight."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """The change in the weight's shape, float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * self.scale).reshape(self.shape)

    def truncated(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest change of a rank at most `rank`: up (out, k), down (k, in ...), the scale evenly in both.

        The product's singular values are returned as well, all of them, falling. Only its small core is decomposed.
        """
        q, core = torch.linalg.qr(self.up.double().flatten(1))
        p, other = torch.linalg.qr(self.down.double().flatten(1).mT)
        u, s, v = torch.linalg.svd(core @ other.mT * self.scale, full_matrices=False)
        up, down = _halves(q @ u, s, v @ p.mT, rank)
        return up.float(), down.float(), s


def nearest(change: Tensor, rank: int) -> Change:
    """The best of a rank for a change (out, in, ...) of a weight, its singular values shared by both halves."""
    matrix = change.flatten(1)
    small = min(matrix.shape)
    if small <= EXACT or rank + OVERSAMPLED >= small:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same file from the same student
            u, s, v = torch.svd_lowrank(matrix, rank + OVERSAMPLED, ITERATIONS)
        v = v.mT
    up, down = (half.contiguous() for half in _halves(u, s, v, rank))
    return Change(down.reshape(-1, *change.shape[1:]), up.reshape(*up.shape, *(1 for _ in change.shape[2:])), 1.0)


def _halves(u: Tensor, s: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (m, r), s (r,), v (r, n) of an SVD -> up (m, k) and down (k, n), of k = `rank` at most."""
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
