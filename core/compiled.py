"""Blocks of a network compiled one by one (torch.compile): on a GPU its kernels are fused and fewer are launched.

A block is compiled with the LoRA in it, once for each way in which it is used: as the teacher, as the student, with and
without gradients. What looks on from outside, such as feature taps and gradient checkpointing, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .gradient_checkpointing import blocks_run_by

# Ways in which the blocks of one class may be used before torch gives up compiling them: each has a LoRA of its own.
WAYS = 4096


@contextmanager
def _told() -> Iterator[None]:
    """Within, what torch's compiler raises says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        words = " ".join(str(error).split())
        raise RuntimeError(f"torch cannot compile the model here ({words:.200}): set compile to false") from error


@contextmanager
def compiled(backbone: nn.Module, backend: str | Callable[..., Any] = "inductor") -> Iterator[None]:
    """Within, passes run each block of the backbone compiled; the very same `forward`s are put back.

    Enter it before `checkpointed`, which then computes the compiled block again. The first passes take minutes. Raises
    ValueError for an architecture without blocks that are known, RuntimeError where torch cannot compile here.
    """
    settings: Any = torch._dynamo.config
    limits = {"recompile_limit": WAYS, "accumulated_recompile_limit": 8 * WAYS}
    known = {name: value for name, value in limits.items() if hasattr(settings, name)}
    compiling = partial(torch.compile, dynamic=False, backend=backend)
    with blocks_run_by(backbone, compiling), _told(), settings.patch(known):
        yield
