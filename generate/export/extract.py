"""A LoRA out of a full student: the best approximation of what its training changed, at a rank (by SVD).

(Eckart and Young: of all matrices of rank r the truncated SVD is the nearest; large ones by a randomised SVD,
arXiv 0909.4061.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...trainer.data.files import trim
from .merge import Merge
from .student import Layer

EXACT = 512  # the smaller side of a matrix up to which the whole SVD is computed
OVERSAMPLED, ITERATIONS = 16, 4
# Classes of layers, the first that fits; what no LoRA holds is the last.
CLASSES = {
    "attention": r"attn\d?\.|attention|\.to_[qkv]|qkv",
    "feed-forward": r"\.ff\.|mlp",
    "convolutions": r"in_layers|out_layers|skip_connection|\.op\.|\.conv\.",
    "projections and embeddings": r"",
}
LEFT_OUT = "biases and norms, which a LoRA leaves out"


@dataclass
class Errors:
    """Squared changes and what of them is lost, by classes of layers."""

    changed: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, changed: float, lost: float) -> None:
        """Count one layer."""
        self.changed[kind] = self.changed.get(kind, 0.0) + changed
        self.lost[kind] = self.lost.get(kind, 0.0) + lost

    def relative(self) -> dict[str, float]:
        """The relative error (Frobenius) of each class, and of all together."""
        each = {k: _ratio(self.lost[k], self.changed[k]) for k in (*CLASSES, LEFT_OUT) if k in self.changed}
        return each | {"all": _ratio(sum(self.lost.values()), sum(self.changed.values()))}

    def in_words(self) -> list[str]:
        """A line for each class."""
        found = self.relative()
        width = max(map(len, found))
        return [f"{name:{width}}  {value:.3f}" for name, value in found.items()]


def _ratio(lost: float, changed: float) -> float:
    return math.sqrt(lost / changed) if changed else 0.0


def extract(merge: Merge, rank: int, errors: Errors) -> Iterator[tuple[str, Layer | None, int]]:
    """The layers of a LoRA by their modules' names, one after the other, with the bytes that were looked at.

    A weight that no LoRA can hold gives None. `errors` counts along.
    """
    for name, shape in merge.base.network.items():
        weight = merge.base.read(name).float()
        change, nbytes = merge.weight(name).float() - weight, 4 * weight.numel()
        del weight
        squared = float(change.square().sum(dtype=torch.float64))
        module = name.removesuffix(".weight")
        if module == name or len(shape) not in (2, 4) or _embeds(module):
            errors.add(LEFT_OUT, squared, squared)
            yield name, None, nbytes
            continue
        layer = truncated(change, rank)
        errors.add(_class_of(name), squared, float((change - layer.delta()).square().sum(dtype=torch.float64)))
        del change
        trim()
        yield module, layer, nbytes


def _embeds(module: str) -> bool:
    """Whether this is a table of embeddings, whose rows are looked up: no layer that a LoRA sits on."""
    return module.endswith(("token_embedding", "position_embedding"))


def _class_of(name: str) -> str:
    return next(kind for kind, pattern in CLASSES.items() if re.search(pattern, name))


def truncated(change: Tensor, rank: int) -> Layer:
    """The best LoRA of a rank for a change (out, in, ...) of a weight, its singular values shared by both halves."""
    matrix = change.flatten(1)
    small = min(matrix.shape)
    rank = min(rank, small)
    if small <= EXACT or rank + OVERSAMPLED >= small:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        v = v.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same file from the same student
            u, s, v = torch.svd_lowrank(matrix, rank + OVERSAMPLED, ITERATIONS)
    root = s[:rank].sqrt()
    down = (v[:, :rank] * root).T.reshape(rank, *change.shape[1:])
    up = (u[:, :rank] * root).reshape(change.shape[0], rank, *(1 for _ in change.shape[2:]))
    return Layer(down.contiguous(), up.contiguous(), 1.0)
