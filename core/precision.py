"""Which arithmetic a device is fast in, and where a low one is too coarse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, amp, nn

from .lora import adaptable, quantised
from .transfer import to_device, to_host

# Types of weights that are numbers by themselves, by their names.
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def fast_bfloat16(device: torch.device) -> bool:
    """Whether passes in bfloat16 are faster here than in float32.

    Cards before NVIDIA's Ampere (T4, RTX 20, GTX 16) emulate it, and CPUs without its instructions are slower in it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and bool(check and check())


@contextmanager
def output_in_float32(backbone: nn.Module) -> Iterator[None]:
    """Within, the last layer of a UNet computes in float32, whatever autocast says.

    x0 = x - sigma eps multiplies an error of eps by 14.6 at the first step, and bfloat16 rounds to 1 in 256.
    """
    layer = output_layer(backbone)
    if layer is None:
        yield
        return
    own, forward = layer.__dict__.get("forward"), layer.forward

    def in_full(x: Tensor) -> Tensor:
        parameters: dict[str, Any] = dict(layer._parameters)
        try:
            layer._parameters.update({n: p if p is None else p.float() for n, p in parameters.items()})
            with amp.autocast(x.device.type, enabled=False):
                return forward(x.float())
        finally:
            layer._parameters.update(parameters)

    try:
        layer.forward = in_full
        yield
    finally:
        if own is None:
            layer.__dict__.pop("forward", None)
        else:
            layer.forward = own


@contextmanager
def cast_once(backbone: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within, frozen weights that autocast would cast to `dtype` anew in every pass, and keep, are in it already.

    Each pass gives the same to the bit. The last layer of a UNet stays (`output_in_float32`), and so do quantised
    weights. The weights come back as they were: a GPU's wait in the computer's memory meanwhile.
    """
    last = output_layer(backbone)
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:  # from the first: there may be no memory for the next
        for module in backbone.modules():
            for parameter in module._parameters.values() if module is not last and adaptable(module) else ():
                if parameter is None or parameter.requires_grad or parameter.dtype == dtype:
                    continue
                if not quantised(parameter) and parameter.element_size() > 1:
                    cast, own = parameter.data.to(dtype), to_host(parameter.data)
                    kept.append((parameter, own))
                    parameter.data = cast
        yield
    finally:
        for parameter, own in kept:
            parameter.data = to_device(own, parameter.device)


def output_layer(backbone: nn.Module) -> nn.Module | None:
    """A UNet's last layer in diffusers' layout and in the hosts'; None in a network of another kind."""
    layer: Any = getattr(backbone, "conv_out", None) or getattr(backbone, "out", None)
    if isinstance(layer, nn.Sequential) and len(layer):
        layer = layer[-1]
    weight: Any = getattr(layer, "weight", None)
    return layer if type(weight) is nn.Parameter and weight.dtype in PRECISIONS.values() else None
