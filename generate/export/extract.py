"""A LoRA out of a full student: the best approximation of what its training changed, at a rank."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ...core.low_rank import Change, nearest
from ...trainer.data.files import trim
from .merge import Merge

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


def extract(merge: Merge, rank: int, errors: Errors) -> Iterator[tuple[str, Change | None, int]]:
    """The layers of a LoRA by their modules' names, one after the other, with the bytes that were looked at.

    A weight that no LoRA can hold gives None. `errors` counts along.
    """
    for name, shape in merge.base.network.items():
        weight = merge.base.read(name).float()
        change, nbytes = merge.weight(name).float() - weight, 4 * weight.numel()
        del weight
        squared = float(change.square().sum(dtype=torch.float64))
        module = name.removesuffix(".weight")
        if module == name or len(shape) not in (2, 4) or _embeds(module) or _depthwise(shape):
            errors.add(LEFT_OUT, squared, squared)
            yield name, None, nbytes
            continue
        layer = nearest(change, rank)
        errors.add(_class_of(name), squared, float((change - layer.delta()).square().sum(dtype=torch.float64)))
        del change
        trim()
        yield module, layer, nbytes


def _embeds(module: str) -> bool:
    """Whether this is a table of embeddings, whose rows are looked up: no layer that a LoRA sits on."""
    return module.endswith(("token_embedding", "position_embedding"))


def _depthwise(shape: Sequence[int]) -> bool:
    """Whether this is a convolution of each channel by itself, on which no LoRA of ours sits."""
    return len(shape) == 4 and shape[1] == 1


def _class_of(name: str) -> str:
    return next(kind for kind, pattern in CLASSES.items() if re.search(pattern, name))
