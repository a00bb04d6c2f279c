"""Rows that stay in their files, mapped into memory: only what is taken is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.denoiser import Cond


@dataclass(frozen=True)
class StoredLatents:
    """Latents (N, C, H, W) in half precision, of which indexing reads the given ones as float32."""

    parts: Sequence[Tensor]  # (n, C, H, W) each, one behind another
    index: Tensor  # (N,) which row of all parts each is

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.parts[0].shape[1:]))

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        # As float32 first: autocast joins no half precision but its own.
        return torch.stack([self.parts[part][row].float() for part, row in _located(self.parts, self.index[rows])])

    def select(self, rows: Tensor) -> StoredLatents:
        """The given rows; nothing is read."""
        return replace(self, index=self.index[rows])


@dataclass(frozen=True)
class StoredCond:
    """Conditioning of N samples in half precision, stored once for all that have the same prompt."""

    parts: Sequence[Cond]
    index: Tensor  # (N,) which row of all parts each is

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, rows: Tensor | slice) -> Cond:
        """The given rows as float32; texts of different lengths become the same as `Cond.cat` makes them."""
        found = [self.parts[part].rows([row]) for part, row in _located(self.parts, self.index[rows])]
        return Cond.cat([cond.map(lambda v: v.float() if v.is_floating_point() else v) for cond in found])

    def select(self, rows: Tensor) -> StoredCond:
        """The given rows; nothing is read."""
        return replace(self, index=self.index[rows])


def _located(parts: Sequence[Tensor] | Sequence[Cond], numbers: Tensor) -> Iterator[tuple[int, int]]:
    """Which part each row is in, and where there."""
    lengths = torch.tensor([len(part) for part in parts])
    ends = lengths.cumsum(0)
    part = torch.searchsorted(ends, numbers, right=True)
    return zip(part.tolist(), (numbers - (ends - lengths)[part]).tolist(), strict=True)
