"""The networks of AUTOMATIC1111 and Forge as core's Denoiser."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.borrowed import AppliedDenoiser, in_full
from ..core.denoiser import Cond, Denoiser
from ..core.lora import autocasts
from ..core.schedule import DiscreteSchedule, Schedule, expand, prediction_of_name, schedule_of

# What a model computes in, and a layer's mark that it follows: in Forge and Neo, and in reForge as in old ComfyUI.
COMPUTING = {"computation_dtype": "parameters_manual_cast", "manual_cast_dtype": "ldm_patched_cast_weights"}
# Norms whose input is added to in place while backward still needs it, of Forge's UNet and of Flux and its kin.
ADDED_TO = re.compile(
    r"(?:^|\.)(?:transformer_blocks\.\d+\.norm[123]|double_blocks\.\d+\.(?:img|txt)_norm[12]|"
    r"single_blocks\.\d+\.pre_norm)$"
)


class CompvisDenoiser(Denoiser):
    """x0 of an AUTOMATIC1111 model's UNet, which is given a picture of unit variance and a fractional timestep.

    `device` is where it computes: with --medvram its weights may lie elsewhere meanwhile.
    """

    def __init__(self, network: nn.Module, alphas_cumprod: Tensor, prediction: str, device: torch.device):
        self.backbone, self.prediction = network, prediction
        self.schedule: Schedule = DiscreteSchedule(alphas_cumprod.detach())
        self._device = device

    def output(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        alpha, _ = self.schedule.alpha_sigma(sigma)
        summary = {} if cond.pooled is None else {"y": cond.pooled}
        return self.backbone(expand(alpha, x) * x, self.schedule.timestep(sigma), context=cond.context, **summary)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self.schedule.to_x0(self.prediction, x, self.output(x, sigma, cond).to(x.dtype), sigma)

    @property
    def device(self) -> torch.device:
        return self._device

    def with_backbone(self, backbone: nn.Module) -> CompvisDenoiser:
        """The same over another network of the same architecture, in float32; the WebUI keeps its own."""
        other = copy.copy(self)
        other.backbone = in_full(backbone)
        return other


class ForgeDenoiser(AppliedDenoiser):
    """x0 of a UnetPatcher's network in Forge or its kin, of every architecture that its own `apply_model` runs.

    Raises ValueError for a model of another kind of noise levels.
    """

    def __init__(self, unet):
        super().__init__(unet.model, unet.model_options.get("transformer_options", {}), unet.load_device)
        self.compute_dtype, _ = computing_type(self.base)
        self.prediction, self.schedule = levels_of(space_of(self.base))


def computing_type(base) -> tuple[str, str]:
    """The names of a Forge model's computing type and of a layer's mark that it follows."""
    return next((name, mark) for name, mark in COMPUTING.items() if hasattr(base, name))


def space_of(base):
    """A Forge model's object of noise levels and reading; reForge's bears ComfyUI's name."""
    return base.predictor if hasattr(base, "predictor") else base.model_sampling


def prediction_of(space) -> str:
    """What the network predicts, "unknown" for another kind: Forge says it, reForge by the class that reads it."""
    name = getattr(space, "prediction_type", None)
    if name is None:
        name = next((c.__name__ for c in type(space).__mro__ if "calculate_denoised" in vars(c)), "").lower()
    return prediction_of_name(name) or "unknown"


def levels_of(space) -> tuple[str, Schedule]:
    """What the network of a Forge model predicts, and its noise levels; raises ValueError for an unknown kind."""
    kind = prediction_of(space)
    return kind, schedule_of(kind, space.sigmas, space.timestep)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Within, no weight of the network takes gradients; flag and type are put back, also where one was replaced.

    Forge's own norms, given another type, keep their weights in that.
    """
    own = [
        (m, n, p.requires_grad, p.dtype) for m in network.modules() for n, p in m._parameters.items() if p is not None
    ]
    try:
        network.requires_grad_(False)
        yield
    finally:
        for module, name, flag, dtype in own:
            if (parameter := module._parameters.get(name)) is None:
                continue
            if parameter.dtype != dtype:
                parameter = module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), False)
            parameter.requires_grad_(flag)


@contextmanager
def in_float32(network: nn.Module) -> Iterator[None]:
    """Within, layers of weights below float32 compute in float32, where autocast does not say otherwise.

    Float16 has no room for small gradients. By hooks, since a copy of the network takes them along.
    """
    narrow = [m for m in network.modules() if any(_narrow(p) for p in m._parameters.values())]
    hooks = [m.register_forward_pre_hook(_widen) for m in narrow]
    hooks += [m.register_forward_hook(_restore, always_call=True) for m in narrow]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _narrow(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.is_floating_point() and parameter.element_size() < 4


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _widen(module: nn.Module, args: tuple) -> tuple | None:
    on = bool(args) and autocasts(args[0].device)
    if on and any(p is not None and p.ndim > 1 for p in module._parameters.values()):
        return None  # autocast has types of its own for all but the norms
    module.__dict__["_turbodistill_own"] = dict(module._parameters)
    module._parameters.update({name: _wide(p) for name, p in module._parameters.items()})
    return None if on else tuple(map(_wide, args))


def _restore(module: nn.Module, *_) -> None:
    if own := module.__dict__.pop("_turbodistill_own", None):
        module._parameters.update(own)


# What the hosts say of a model that its weights do not tell -> ModelSpec's architecture.
ARCHITECTURES = {
    "is_sd3": "stable-diffusion-v3-medium",
    "is_sdxl": "stable-diffusion-xl-v1-base",
    "is_sd2": "stable-diffusion-v2",
    "is_sd1": "stable-diffusion-v1",
}


def architecture(model: Any) -> str:
    """What a card calls the loaded model's architecture."""
    for mark, name in ARCHITECTURES.items():
        if getattr(model, mark, False):
            return name
    if type(model).__name__ == "Flux":
        return "flux-1-dev" if model.use_distilled_cfg_scale else "flux-1-schnell"
    return type(model).__name__
