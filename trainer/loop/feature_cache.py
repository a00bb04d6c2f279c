"""Feature maps that are made once: of a clean picture, a frozen network makes the same every time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.transfer import to_device, to_host

LIMIT = 2**30  # bytes of the computer's memory, not the device's


class FeatureCache:
    """Maps by their picture's key, as many as `limit` bytes hold; those of further pictures are made anew."""

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self.taken = 0
        self.maps: dict[int, list[Tensor]] = {}

    def of(self, keys: Tensor, make: Callable[[int], list[Tensor]], device: torch.device) -> list[Tensor]:
        """K maps (B, C_k, H_k, W_k), on a device, of the pictures with the given keys (B,), which lie on the CPU.

        `make(i)` gives the i-th one's, (1, ...).
        Each picture is seen alone: its maps then are the same to the bit whatever the batch, and with
        them a run that was resumed with nothing kept.
        """
        rows = [self.maps.get(key) or self._keep(key, make(i)) for i, key in enumerate(keys.tolist())]
        return [torch.cat([to_device(m, device) for m in maps]) for maps in zip(*rows, strict=True)]

    def _keep(self, key: int, maps: list[Tensor]) -> list[Tensor]:
        size = sum(m.numel() * m.element_size() for m in maps)
        if self.taken + size <= self.limit:
            self.taken += size
            self.maps[key] = [to_host(m) for m in maps]
        return maps
