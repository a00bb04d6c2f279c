"""A network that a host has loaded, borrowed for training: what every host needs so that gradients flow through it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


def thaw(network: nn.Module) -> None:
    """What was made in inference mode, which backward refuses, becomes ordinary tensors of the same bits and flags."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_inference():
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = buffer.clone()


@contextmanager
def cloned_inputs(network: nn.Module, names: re.Pattern[str]) -> Iterator[None]:
    """Within, modules of these names keep for backward what they were given, though others add to it in place."""
    found = [m for n, m in network.named_modules() if names.search(n)]
    hooks = [m.register_forward_pre_hook(lambda _module, args: (args[0].clone(), *args[1:])) for m in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watched(network: nn.Module, look: Callable[[], None]) -> Iterator[None]:
    """Within, every pass of the network first calls `look`, which may raise."""
    hook = network.register_forward_pre_hook(lambda *_: look())
    try:
        yield
    finally:
        hook.remove()
