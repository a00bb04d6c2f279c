"""The numbers of several updates, summed on the device and brought over together: each look there waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..world import ALONE, World
from .health import Health, HealthParts

OTHER_DEVICES = 10  # updates between two looks at a device that is no CPU


@dataclass(frozen=True)
class Measured:
    """Means over some updates: losses and norms of gradients by name, and health."""

    losses: dict[str, float]
    norms: dict[str, float]
    health: Health


@dataclass(frozen=True)
class Layout:
    """What the numbers of an update are, in their order. Losses are a `share` of it each; a name may come again."""

    losses: tuple[str, ...]
    norms: tuple[str, ...]
    heads: tuple[int, ...]
    relative: bool
    share: float

    def read(self, numbers: Sequence[float]) -> Measured:
        values = iter(numbers)
        losses: dict[str, float] = {}
        for name in self.losses:
            losses[name] = losses.get(name, 0.0) + next(values) * self.share
        norms = {name: next(values) for name in self.norms}
        return Measured(losses, norms, HealthParts([], self.heads, self.relative).take(values))


@dataclass
class Measures:
    """The sums of the numbers of the updates since they were last brought over, for each layout, and their count.

    Of several processes they are the means over all.
    """

    world: World = ALONE
    sums: dict[Layout, tuple[Tensor, int]] = field(default_factory=dict)

    def add(
        self,
        losses: Sequence[tuple[str, Tensor]],
        norms: Sequence[tuple[str, Tensor]],
        health: HealthParts,
        share: float,
    ) -> Tensor:
        """Take in what one update measured; all its numbers (n,), on the device."""
        (names, values), (of_norms, more) = (tuple(zip(*part, strict=True)) or ((), ()) for part in (losses, norms))
        layout = Layout(names, of_norms, health.heads, health.relative, share)
        numbers = torch.stack([x.detach().float().reshape(()) for x in (*values, *more, *health.values)])
        numbers = self.world.average(numbers)
        total, count = self.sums.get(layout, (0.0, 0))
        self.sums[layout] = total + numbers, count + 1
        return numbers

    def take(self) -> Measured:
        """The means, which are forgotten; of a loss that not every update has, over those that have it."""
        sums, self.sums = self.sums, {}
        numbers = iter(torch.cat([total for total, _ in sums.values()]).tolist())
        found = [
            (layout.read([next(numbers) / count for _ in range(len(total))]), count)
            for layout, (total, count) in sums.items()
        ]
        if len(found) == 1:
            return found[0][0]
        losses, norms = (_means([(getattr(m, name), n) for m, n in found]) for name in ("losses", "norms"))
        return Measured(losses, norms, Health(**_means([(m.health.numbers, n) for m, n in found])))


def _means(found: Sequence[tuple[dict[str, float], int]]) -> dict[str, float]:
    """The mean of each number by name, over the updates that had it."""
    names = dict.fromkeys(name for each, _ in found for name in each)
    counts = {name: sum(count for each, count in found if name in each) for name in names}
    return {name: sum(each[name] * n for each, n in found if name in each) / counts[name] for name in names}
