"""A frozen network's weights as whole numbers of eight bits, while something small beside them is trained.

As torchao's `Int8WeightOnlyConfig` does it (row-wise absmax, arXiv 2208.07339, section 2): each output channel has a
scale, and the arithmetic stays that of the activations. Unlike there, no pass keeps a weight in full precision for its
backward, where it is made again, and convolutions are packed too, of which half a UNet consists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from .lora import autocasts, quantised
from .precision import output_layer
from .transfer import to_device, to_host

LEAST = 2**14  # numbers of a weight that are worth it
MOST = 127


def packable(backbone: nn.Module) -> dict[str, nn.Module]:
    """The layers by name whose weights can be packed: all large ones of torch's own classes but the output layer.

    A host's own classes cast and move their weights in their own ways, and are left alone.
    """
    last = output_layer(backbone)
    return {
        name: module
        for name, module in backbone.named_modules()
        if module is not last
        and (type(module) is nn.Linear or (type(module) is nn.Conv2d and module.padding_mode == "zeros"))
        and not quantised(module.weight)
        and module.weight.element_size() > 1
        and module.weight.numel() >= LEAST
    }


def can_pack(backbone: nn.Module) -> bool:
    """Whether there is a layer that can be packed, or is."""
    return bool(packable(backbone)) or any(p.dtype == torch.int8 for p in backbone.parameters())


def bytes_saved(backbone: nn.Module, dtype: torch.dtype | None = None) -> int:
    """What packing saves of weights in `dtype`, or in their own."""
    weights: list[Any] = [module.weight for module in packable(backbone).values()]
    sizes = [dtype.itemsize if dtype else w.element_size() for w in weights]
    return sum(w.numel() * (size - 1) - 4 * len(w) for w, size in zip(weights, sizes, strict=True))


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (O, ...) -> whole numbers (O, ...) from -127 to 127, and a scale (O, 1, ...) for each output channel."""
    rows = tuple(range(1, weight.ndim))
    scale = weight.detach().abs().amax(rows, keepdim=True).float().clamp(min=1e-12) / MOST
    return (weight.detach() / scale).round().clamp(-MOST, MOST).to(torch.int8), scale


def unpacked(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `packed`, to half a step of the scale."""
    return numbers.to(dtype).mul_(scale.to(dtype))


SCALE = ".scale"  # behind a weight's name


def packed_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's state with its large weights packed, each beside its scales; the rest in float16."""
    large = {name for name, value in state.items() if value.ndim in (2, 4) and value.numel() >= LEAST}
    small = {name: value.half() for name, value in state.items() if name not in large}
    parts = {name: packed(state[name]) for name in large}
    numbers = {name: part[0] for name, part in parts.items()}
    return numbers | {name + SCALE: part[1] for name, part in parts.items()} | small


def unpacked_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `packed_state`, in float32."""
    return {
        name: unpacked(value, tensors[name + SCALE], torch.float32) if name + SCALE in tensors else value.float()
        for name, value in tensors.items()
        if not name.endswith(SCALE)
    }


class _Layer(torch.autograd.Function):
    """A linear layer or convolution of packed weights, with the gradient to its input alone."""

    @staticmethod
    def forward(ctx, x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None, options: dict, dtype: torch.dtype):
        ctx.save_for_backward(numbers, scale)
        ctx.options, ctx.given = options, (x.shape, x.dtype)
        return _layer(x, unpacked(numbers, scale, dtype), bias, options)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        numbers, scale = ctx.saved_tensors
        (gradient,), (shape, dtype) = gradients, ctx.given
        weight = unpacked(numbers, scale, gradient.dtype)
        if not ctx.options:
            return (gradient @ weight).to(dtype), None, None, None, None, None
        found = conv2d_input(shape, weight, gradient, **ctx.options)
        return found.to(dtype), None, None, None, None, None


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    return F.conv2d(x, weight, bias, **options) if options else F.linear(x, weight, bias)


def _forward(module: Any, scale: Tensor):
    """What such a layer does in place of its own `forward`."""
    options = {k: getattr(module, k) for k in ("stride", "padding", "dilation", "groups") if hasattr(module, k)}

    def forward(x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else x.dtype
        return _Layer.apply(x, module.weight, scale, module.bias, options, dtype)

    return forward


@contextmanager
def in_eight_bits(backbone: nn.Module) -> Iterator[None]:
    """Within, the weights of `packable` layers are packed; the very same numbers come back.

    Those wait in the computer's memory, so that a GPU holds the packed ones alone.
    """
    kept: list[tuple[Any, bool, Tensor, Any]] = []
    try:
        for module in packable(backbone).values():
            weight: Any = module.weight
            numbers, scale = packed(weight.data)
            kept.append((module, weight.requires_grad, to_host(weight.data), module.__dict__.get("forward")))
            weight.requires_grad_(False)
            weight.data = numbers
            module.forward = _forward(module, scale)
        yield
    finally:
        for module, flag, own, forward in kept:
            module.weight.data = to_device(own, module.weight.device)
            module.weight.requires_grad_(flag)
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward
