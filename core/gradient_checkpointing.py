"""Gradient checkpointing (arXiv 1604.06174): a block's activations are computed again in backward, not kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .lora import LoRA

# Residual and transformer blocks of the hosts' and diffusers' layouts, UNets and DiTs.
BLOCKS = re.compile(
    r"(?:^|\.)(?:(?:single_)?transformer_blocks|(?:joint|double|single)(?:_stream)?_blocks|blocks|layers|resnets|"
    r"\w+_refiner|(?:input|output)_blocks\.\d+|middle_block)\.\d+$"
)


def blocks(backbone: nn.Module, known: re.Pattern[str] = BLOCKS) -> dict[str, nn.Module]:
    """The innermost blocks by name, those `known`; raises ValueError for an architecture without any."""
    found = {n: m for n, m in backbone.named_modules() if known.search(n) and next(m.children(), None) is not None}
    inner = {n: m for n, m in found.items() if not any(other.startswith(n + ".") for other in found)}
    if not inner:
        raise ValueError(
            f"no known blocks in {type(backbone).__name__}: set gradient_checkpointing and compile to false"
        )
    return inner


@contextmanager
def checkpointed(backbone: nn.Module, loras: Sequence[LoRA] = (), known: re.Pattern[str] = BLOCKS) -> Iterator[None]:
    """Within, passes with gradients keep the inputs of each block alone; the very same `forward`s are put back.

    `loras` are those whose hooks sit in the backbone: a block is computed again as they were switched then.
    """
    with blocks_run_by(backbone, lambda forward: _again(forward, loras), known):
        yield


@contextmanager
def blocks_run_by(
    backbone: nn.Module, way: Callable[[Callable[..., Any]], Callable[..., Any]], known: re.Pattern[str] = BLOCKS
) -> Iterator[None]:
    """Within, each block runs what `way` makes of its `forward`; the very same `forward`s are put back.

    Raises ValueError as `blocks`.
    """
    changed = list(blocks(backbone, known).values())
    own = [module.__dict__.get("forward") for module in changed]
    try:
        for module in changed:
            module.forward = way(module.forward)
        yield
    finally:
        for module, forward in zip(changed, own, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _again(forward, loras: Sequence[LoRA]):
    def run(*args, **kwargs):
        return forward(*map(_own, args), **{k: _own(v) for k, v in kwargs.items()})

    def wrapped(*args: Any, **kwargs: Any):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # As it is now: a host writes into its options as it goes from block to block.
        args, kwargs = tuple(map(_noted, args)), {k: _noted(v) for k, v in kwargs.items()}
        switches = [lora.enabled for lora in loras]
        options: Any = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(
            run, *args, context_fn=lambda: (nullcontext(), _switched(loras, switches)), **options, **kwargs
        )

    return wrapped


def _noted(value: Any) -> Any:
    """An argument as it is now."""
    return dict(value) if isinstance(value, dict) else value


def _own(value: Any) -> Any:
    """An argument that a block may change: some hosts' blocks add to their input in place."""
    return value.clone() if isinstance(value, Tensor) else _noted(value)


@contextmanager
def _switched(loras: Sequence[LoRA], to: Sequence[bool]) -> Iterator[None]:
    """The LoRAs are on or off as given within."""
    before = [lora.enabled for lora in loras]
    try:
        for lora, on in zip(loras, to, strict=True):
            lora.enabled = on
        yield
    finally:
        for lora, on in zip(loras, before, strict=True):
            lora.enabled = on
