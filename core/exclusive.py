"""One user of a model's weights at a time: a student is put onto the very tensors that every other pass reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, AbstractContextManager[bool]] = WeakKeyDictionary()
_NEW = threading.Lock()


@dataclass
class _Frozen:
    """What a frozen network's parameters were, and how many hold it so."""

    flags: list[tuple[nn.Parameter, bool]]
    holders: int = 0


_FROZEN: WeakKeyDictionary[nn.Module, _Frozen] = WeakKeyDictionary()


def exclusive(backbone: nn.Module) -> AbstractContextManager[bool]:
    """The lock of a model's weights, for `with`: other threads wait, the same one may take it again.

    Take it for a picture, a batch or an update, never across a `yield` to whoever called.
    """
    with _NEW:
        return _LOCKS.setdefault(backbone, threading.RLock())


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[None]:
    """No parameter of the model takes gradients within; whoever leaves last puts every flag back as it was."""
    with _NEW:
        held = _FROZEN.setdefault(backbone, _Frozen([(p, p.requires_grad) for p in backbone.parameters()]))
        held.holders += 1
        backbone.requires_grad_(False)
    try:
        yield
    finally:
        with _NEW:
            held.holders -= 1
            if not held.holders:
                _FROZEN.pop(backbone, None)
                for parameter, flag in held.flags:
                    parameter.requires_grad_(flag)
