"""The processes that train together: one, or as many as a launcher has started.

All of them run the same program: they draw the same random numbers, and each works on its own rows of every batch.
Gradients and losses are averaged, and the first process alone writes files. So a run is the same, to rounding, in any
number of processes, and goes on in any other number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..core.sharded import is_sharded

T = TypeVar("T")
BUCKET = 2**26  # numbers that are averaged together: copying them must not double a large network's gradients


class Apart(RuntimeError):
    """Another process of the training has ended."""


class World:
    """One process alone: nothing is sent. Those of a launcher override what goes from one to another."""

    rank = 0
    size = 1
    shards = False  # whether a full student is spread over the processes (FSDP)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def rows(self, whole: int) -> slice:
        """The process's own of so many rows: as many as any other's, or one more."""
        return slice(whole * self.rank // self.size, whole * (self.rank + 1) // self.size)

    def gather(self, rows: Tensor, whole: int) -> Tensor:
        """The rows of all processes, `whole` in number, from this one's (n, ...)."""
        return rows

    def average(self, tensor: Tensor) -> Tensor:
        """A tensor's mean over all processes, in place."""
        return tensor

    def told(self, value: T) -> T:
        """What the first process has for this value, in every one."""
        return value

    def wait_for_first(self) -> None:
        """Go on when the first process has come here, too."""
        self.told(None)

    def largest(self, number: int) -> int:
        """The largest that any process has."""
        return int(self.gather(torch.tensor([number]), self.size).max())

    def shard(self, module: nn.Module) -> None:
        """Spread a module's parameters over the processes, where that is asked for."""

    @contextmanager
    def first(self) -> Iterator[None]:
        """Within, the first process is alone; the others come after it."""
        if not self.leads:
            self.wait_for_first()
        yield
        if self.leads:
            self.wait_for_first()


ALONE = World()


@torch.no_grad()
def average_gradients(world: World, module: nn.Module) -> None:
    """Average a module's gradients over all processes; the same parameters have one in each.

    Of sharded parameters the backward pass has done so.
    """
    if world.size == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None and not is_sharded(p)]
    for bucket in _buckets(gradients):
        flat = world.average(torch.cat([g.flatten() for g in bucket]))
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, together as long as they are of one type and not too many numbers."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
