"""Gradients through comfy-kitchen's fused rotary embedding (RoPE, arXiv 2104.09864), for which it has none.

Its operations rotate pairs of numbers by a table of 2 x 2 matrices, some behind an RMS norm (arXiv 1910.07467). Forward
stays fused; backward computes it again from torch's own operations. The table of positions is not trained.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Operations on two tensors; those with a "1" behind the name are on one.
ROTATIONS = ("apply_rope", "apply_rope_split_half", "rms_rope", "rms_rope_split_half")


def rotated(x: Tensor, table: Tensor, halves: bool = False) -> Tensor:
    """Pairs of x (..., D) multiplied by the table's matrices (..., D / 2, 2, 2).

    A pair is two neighbours, or with `halves` a number of the first half and that of the second.
    """
    pairs = x.to(table.dtype)
    pairs = pairs.unflatten(-1, (2, -1)).mT if halves else pairs.unflatten(-1, (-1, 2))
    turned = table[..., 0] * pairs[..., :1] + table[..., 1] * pairs[..., 1:]
    return (turned.mT if halves else turned).flatten(-2).type_as(x)


def normed_and_rotated(
    x: Tensor, table: Tensor, halves: bool, scale: Tensor | None, epsilon: float, first: int
) -> Tensor:
    """The same of x's RMS norm, if there is a `scale` (D,) of it; of its `first` numbers alone, if that is not 0."""
    if scale is not None:
        x = F.rms_norm(x, x.shape[-1:], scale, epsilon)
    if first and first < x.shape[-1]:
        return torch.cat([rotated(x[..., :first], table, halves), x[..., first:]], -1)
    if x.ndim > 2 and 1 != x.shape[2] < table.shape[2]:  # a table for more tokens than there are
        table = table[:, :, : x.shape[2]]
    return rotated(x, table, halves)


def give_gradients() -> None:
    """From now on these operations have gradients in this process; without the library it does nothing."""
    for name in (*ROTATIONS, *(f"{name}1" for name in ROTATIONS)):
        if hasattr(torch.ops.comfy_kitchen, name):
            torch.library.register_autograd(f"comfy_kitchen::{name}", partial(_backward, name), setup_context=_keep)


def _keep(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def _backward(name: str, ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    given: list[Any] = [next(saved) if other is None else other[0] for other in ctx.others]
    count = 1 if name.endswith("1") else 2  # x or q and k, the table, a scale of each, epsilon, the first that turn
    table, rest = given[count], given[count + 1 :]
    scales = rest[:count] if name.startswith("rms") else [None] * count
    scales = [scales[0] if scale is None else scale for scale in scales]
    epsilon, first = [*rest[count:], 0.0, 0][:2] if name.startswith("rms") else (0.0, 0)
    found: list[Tensor | None] = [None] * len(given)
    for at, (gradient, scale) in enumerate(zip(gradients, scales, strict=True)):
        x = given[at].detach().requires_grad_()
        with torch.enable_grad():
            y = normed_and_rotated(x, table, "split_half" in name, scale, epsilon, first)
        (found[at],) = torch.autograd.grad(y, x, gradient)
    return tuple(found)
