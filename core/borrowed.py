"""A network that a host has loaded, borrowed for training: what ComfyUI and the WebUIs alike need for it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .denoiser import Cond, Denoiser, Rows, by_length
from .layouts import layout_of

Own = TypeVar("Own", bound="AppliedDenoiser")


class AppliedDenoiser(Denoiser):
    """x0 of a network below a host's own `apply_model`, as ComfyUI and Forge have it: of any architecture they run.

    `base` is the host's model, of which `diffusion_model` is the network and the attribute `compute_dtype` the type
    in which it computes. `options` go along with every pass. `device` is where the network computes: with little
    memory, weights of it may lie elsewhere. `layout` is what is known of the network beside that.
    """

    compute_dtype: str

    def __init__(self, base, options: dict[str, Any], device: torch.device):
        self.base, self.backbone, self.options, self._device = base, base.diffusion_model, options, device
        self.layout = layout_of(self.backbone)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self._pass(x, sigma, cond, [0])

    def both(self, positive: Rows, negative: Rows) -> tuple[Tensor, Tensor]:
        """As a host's own sampling: its patches are told which half of the rows is which, or of two passes."""
        (x, sigma, cond), (x_again, sigma_again, against) = positive, negative
        # Rows of texts of several lengths do not come in halves.
        if self.options and (len(x) != len(x_again) or cond.lengths or against.lengths):
            return self._pass(*positive, [0]), self._pass(*negative, [1])
        inputs = torch.cat([x, x_again]), torch.cat([sigma, sigma_again]), Cond.cat([cond, against])
        made = self._pass(*inputs, [0, 1])
        return made[: len(x)], made[len(x) :]

    def _pass(self, x: Tensor, sigma: Tensor, cond: Cond, told: list[int]) -> Tensor:
        """x0, with patches told as by a host: 0 is a condition's part of the rows, 1 what guidance moves away from."""
        return by_length(partial(self._applied, told), x, sigma, cond)[0]

    def _applied(self, told: list[int], x: Tensor, sigma: Tensor, cond: Cond) -> list[Tensor]:
        extra: dict[str, Any] = cond.extra if cond.pooled is None else cond.extra | {"y": cond.pooled}
        if self.layout and self.layout.count:
            extra = extra | {self.layout.count: cond.context.shape[1]}
        options = self.options | {"sigmas": sigma, "cond_or_uncond": told}  # a forward writes into it
        apply = partial(self.base.apply_model, c_crossattn=cond.context, transformer_options=options, **extra)
        if self.layout and self.layout.frame:
            return [apply(x.unsqueeze(2), sigma).squeeze(2)]
        return [apply(x, sigma)]

    def picture_part(self, tap: str, output: Any, x: Tensor, cond: Cond) -> Tensor:
        if self.layout is None:
            return super().picture_part(tap, output, x, cond)
        return self.layout.picture(self.backbone, tap, output, x)

    @property
    def device(self) -> torch.device:
        return self._device

    def with_backbone(self: Own, backbone: nn.Module) -> Own:
        """The same over another network of the same architecture, in float32; the host keeps its own."""
        other = copy.copy(self)
        other.base = copy.copy(self.base)
        setattr(other.base, self.compute_dtype, torch.float32)
        other.backbone = in_full(backbone)
        other.base._modules = self.base._modules | {"diffusion_model": backbone}
        return other


def in_full(copied: nn.Module) -> nn.Module:
    """A copy of a network as one to be trained: weights below float32 are too coarse for an optimizer's steps."""
    for module in copied.modules():
        module.__dict__.pop("forward", None)  # an extension's, bound to the network that was copied
    if isinstance(getattr(copied, "dtype", None), torch.dtype):
        copied.__dict__["dtype"] = torch.float32
    return copied.float()


def leave_inference_mode(network: nn.Module) -> None:
    """What was made in inference mode, which backward refuses, becomes ordinary tensors of the same bits and flags."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_inference():
                module._parameters[name] = nn.Parameter(ordinary(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = buffer.clone()


def ordinary(tensor: Tensor) -> Tensor:
    """A copy that is not in inference mode, of a host's own class too, which may give itself away as its clone."""
    copied = tensor.detach().clone()
    if copied.is_inference():
        copied = Tensor.clone(tensor)
        vars(copied).update(vars(tensor))  # what that class knows of its packed numbers
    return copied


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
def watched(network: nn.Module, check: Callable[[], None]) -> Iterator[None]:
    """Within, every pass of the network first calls `check`, which may raise."""
    hook = network.register_forward_pre_hook(lambda *_: check())
    try:
        yield
    finally:
        hook.remove()
