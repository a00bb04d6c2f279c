"""Text encoders and an autoencoder, which a training hardly needs: they can wait in the computer's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

CPU = torch.device("cpu")


class Aside:
    """Modules that wait in the computer's memory within `away`, and come to their device for as long as they work."""

    def __init__(self, modules: Callable[[], Sequence[nn.Module]]):
        """`modules()` are asked for at each move: there may be more of them meanwhile."""
        self.modules = modules
        self._home: torch.device | None = None  # where they work, within `away`

    @property
    def size(self) -> int:
        """Bytes of their weights."""
        return sum(t.numel() * t.element_size() for m in self.modules() for t in (*m.parameters(), *m.buffers()))

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within, the modules wait in the computer's memory; the same numbers are on their device again at the end."""
        home = next((p.device for m in self.modules() for p in m.parameters()), CPU)
        if home.type == "cpu" or self._home is not None:
            yield
            return
        try:
            self._move(CPU)
            self._home = home
            yield
        finally:
            self._home = None
            self._move(home)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, the modules are on their device, wherever they wait."""
        home = self._home
        if home is None:
            yield
            return
        try:
            self._move(home)
            yield
        finally:
            self._move(CPU)

    def _move(self, device: torch.device) -> None:
        for module in self.modules():
            module.to(device)
