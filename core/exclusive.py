"""One user of a model's weights at a time: a student is put onto the very tensors that every other pass reads."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, AbstractContextManager[bool]] = WeakKeyDictionary()
_NEW = threading.Lock()


def exclusive(backbone: nn.Module) -> AbstractContextManager[bool]:
    """The lock of a model's weights, for `with`: other threads wait, the same one may take it again.

    Take it for a picture, a batch or an update, never across a `yield` to whoever called.
    """
    with _NEW:
        return _LOCKS.setdefault(backbone, threading.RLock())
