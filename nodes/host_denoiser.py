"""A loaded MODEL as core's Denoiser, for every architecture that ComfyUI's own `apply_model` runs."""

from __future__ import annotations

import copy
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn

from ..core.denoiser import Cond, Denoiser
from ..core.schedule import DiscreteSchedule, FlowSchedule, Schedule
from .host import prediction_of

TIMESTEPS = 1000  # of the discrete models that core knows


def schedule_of(model) -> Schedule:
    """The MODEL's own noise levels as core's schedule; raises ValueError for a kind that core does not know."""
    space = model.get_model_object("model_sampling")
    prediction, table = prediction_of(model), getattr(space, "sigmas", torch.zeros(0)).detach().double().cpu()
    if prediction in ("eps", "v") and len(table) == TIMESTEPS:
        return DiscreteSchedule(1 / (1 + table**2))
    if prediction == "flow" and len(table):
        # SD3, Flux and AuraFlow write the shift in different ways; the level halfway tells it for all.
        middle = table[len(table) // 2 - 1]
        schedule = FlowSchedule(float(middle / (1 - middle)))
        times = torch.linspace(0, 1, len(table) + 1)[1:] * schedule.timesteps - 1
        if torch.allclose(schedule.sigma(times).double(), table, atol=1e-4):
            return schedule
    raise ValueError(
        f"this model predicts {prediction} over {len(table)} noise levels of its own kind ({type(space).__name__}): "
        f"eps and v over {TIMESTEPS} levels, and flow with a shift, are what can be used here"
    )


class ModelDenoiser(Denoiser):
    """x0 of a MODEL that is loaded (`host.load`), in the network's own latent space.

    `latent_in` and `latent_out` lead from ComfyUI's latents to that space and back. Patches of the
    MODEL (LoRAs, attention) act as they do when it is sampled.
    """

    def __init__(self, model):
        self.schedule = schedule_of(model)
        self.prediction = prediction_of(model)
        self.base = model.model
        self.backbone = self.base.diffusion_model
        self.options: dict[str, Any] = model.model_options.get("transformer_options", {})
        self.latent_in = self.base.process_latent_in
        self.latent_out = self.base.process_latent_out

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        extra = cond.extra if cond.pooled is None else cond.extra | {"y": cond.pooled}
        options = dict(self.options)  # a forward writes into it
        return self.base.apply_model(x, sigma, c_crossattn=cond.context, transformer_options=options, **extra)

    def with_backbone(self, backbone: nn.Module) -> ModelDenoiser:
        """The same over another network of the same architecture; the MODEL keeps its own."""
        other = copy.copy(self)
        other.base = copy.copy(self.base)
        other.base._modules = self.base._modules | {"diffusion_model": backbone}
        other.backbone = backbone
        return other


def conditions(model, conditioning, latent: Tensor) -> Cond:
    """ComfyUI's conditioning for latents (B, C, H, W) -> what the MODEL's network is given, B rows.

    Raises ValueError for one that is not the same all over: areas, masks, timestep ranges, ControlNets.
    """
    if len(conditioning) != 1:
        raise ValueError(f"the conditioning has {len(conditioning)} parts: give one prompt, not combined ones")
    given = {"area", "mask", "start_percent", "end_percent", "control", "hooks"} & conditioning[0][1].keys()
    if given:
        raise ValueError(f"the conditioning has {', '.join(sorted(given))}: give it as it comes from the text encoder")
    conds = {"positive": comfy.sampler_helpers.convert_cond(conditioning)}
    prepared = comfy.samplers.process_conds(model.model, latent, conds, latent.device)["positive"][0]["model_conds"]
    parts = {
        name: value.process_cond(batch_size=len(latent), device=latent.device, area=None).cond
        for name, value in prepared.items()
    }
    other = [name for name, value in parts.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"the conditioning's {', '.join(other)} cannot be given to a batch of single samples")
    context = parts.pop("c_crossattn").to(latent.device)
    pooled = parts.pop("y", None)
    return Cond(context, None if pooled is None else pooled.to(latent.device), parts)
