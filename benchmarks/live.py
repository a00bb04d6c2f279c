"""The bytes that are alive: what an allocator would have to give, on real tensors and on those without numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts each storage that operations make within as long as it lives; `most` is the most there was at once."""

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        """`there` are tensors that are alive already."""
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref] = {}
        for tensor in there:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result
