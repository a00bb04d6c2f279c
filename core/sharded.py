"""Tensors that are spread over processes (torch's DTensor): each has a part. Ordinary ones are whole already.

Putting one together, and taking one apart, is done by all processes at once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process."""
    given: Any = tensor
    return given.full_tensor() if is_sharded(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process."""
    given: Any = tensor
    return given.to_local() if is_sharded(tensor) else tensor


def sharded_like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, spread as the `other` is."""
    if not is_sharded(other):
        return value
    from torch.distributed.tensor import distribute_tensor  # not every build of torch has it

    like: Any = other
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
