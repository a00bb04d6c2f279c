"""What autograd keeps of a pass for its backward, counted block by block and not kept."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ...core.gradient_checkpointing import BLOCKS, blocks

# What backward has of gradients of activations at a time, over the largest tensor of a pass: those of a layer's output
# and of its input, while the output itself is gone.
GRADIENTS = 1.5


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps of a pass."""

    inside: dict[str, int]  # by block; "" is outside of all
    inputs: int  # of the blocks
    largest: int = 0  # of any one tensor

    def of_batch(self, of_two: Kept, size: int) -> Kept:
        """What a batch keeps, by what one sample and two keep.

        Not all grows with the batch: under autocast each pass has its own casts of weights, which stay.
        """

        def line(one: int, two: int) -> int:
            return one + (size - 1) * (two - one)

        inside = {name: line(count, of_two.inside.get(name, count)) for name, count in self.inside.items()}
        return Kept(inside, line(self.inputs, of_two.inputs), line(self.largest, of_two.largest))

    @property
    def has_blocks(self) -> bool:
        """Whether gradient checkpointing changes anything."""
        return len(self.inside) > 1

    def throughout(self, checkpointing: bool) -> int:
        """What stays from the pass to its backward."""
        if not checkpointing or not self.has_blocks:
            return sum(self.inside.values())
        return self.inside.get("", 0) + self.inputs

    def backward(self, checkpointing: bool) -> int:
        """What backward has besides: gradients, and all that a block keeps which is computed again, the most of any."""
        gradients = round(GRADIENTS * self.largest)
        if not checkpointing or not self.has_blocks:
            return gradients
        return max(count for name, count in self.inside.items() if name) + gradients


class SavedTensors:
    """Counts what autograd would keep of a pass, by block, and keeps nothing of it."""

    def __init__(self, backbone: nn.Module, parameters: Iterable[Tensor], known: re.Pattern[str] = BLOCKS):
        """`parameters` are what is there anyway; blocks are those `known`."""
        self.backbone, self.known = backbone, known
        self._inside: dict[str, int] = defaultdict(int)
        self._inputs = self._largest = 0
        # A weak reference holds no memory, but no other storage takes its address either: each is counted once.
        self._counted = {ref.cdata: ref for ref in (StorageWeakRef(p.untyped_storage()) for p in parameters)}
        self._given: dict[int, StorageWeakRef] = {}
        self._now = ""

    @property
    def kept(self) -> Kept:
        return Kept(dict(self._inside), self._inputs, self._largest)

    def __enter__(self) -> SavedTensors:
        try:
            found = blocks(self.backbone, self.known)
        except ValueError:
            found = {}
        self._handles = [m.register_forward_pre_hook(self._enter(n), with_kwargs=True) for n, m in found.items()]
        self._handles += [m.register_forward_hook(self._leave, always_call=True) for m in found.values()]
        self._hooks = saved_tensors_hooks(self._count, self._gone)
        self._hooks.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._hooks.__exit__(*_)
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str):
        def hook(_module, args, kwargs):
            self._now = name
            self._inputs += sum(_new(a, self._given) for a in (*args, *kwargs.values()) if isinstance(a, Tensor))

        return hook

    def _leave(self, *_told) -> None:
        self._now = ""

    def _count(self, tensor: Tensor) -> tuple:
        size = _new(tensor, self._counted)
        self._inside[self._now] += size
        self._largest = max(self._largest, size)
        return ()

    @staticmethod
    def _gone(_packed: Any):
        raise RuntimeError("a pass that was only counted has no backward")


def _new(tensor: Tensor, counted: dict[int, StorageWeakRef]) -> int:
    """Bytes of a tensor's storage; 0 if it is counted already."""
    storage = tensor.untyped_storage()
    ref = StorageWeakRef(storage)
    return 0 if counted.setdefault(ref.cdata, ref) is not ref else storage.nbytes()
