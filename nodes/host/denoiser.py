"""A loaded MODEL as core's Denoiser, for every architecture that ComfyUI's own `apply_model` runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...core.borrowed import AppliedDenoiser, cloned_inputs
from ...core.denoiser import Cond
from ...core.layouts import layout_of
from ...core.rotary import give_gradients
from ...core.schedule import Schedule, schedule_of
from .patcher import prediction_of
from .patches import kept_for_backward

# Norms whose input is added to in place while backward still needs it, of Flux and its kin.
ADDED_TO = re.compile(r"^(double_blocks\.\d+\.(img|txt)_norm[12]|single_blocks\.\d+\.pre_norm)$")

BESIDE = (
    "this model ({}) takes a picture or a mask beside the latent, as those for inpainting and editing do, and its "
    "student would never see one: connect the ordinary model"
)


def levels_of(model) -> Schedule:
    """The MODEL's own noise levels as core's schedule; raises ValueError for a kind that core does not know."""
    space = model.get_model_object("model_sampling")
    return schedule_of(prediction_of(model), getattr(space, "sigmas", torch.zeros(0)), space.timestep)


class ModelDenoiser(AppliedDenoiser):
    """x0 of a MODEL that is loaded (`host.load`), in the network's own latent space.

    `latent_in` and `latent_out` lead from ComfyUI's latents to that space and back. Patches of the
    MODEL (LoRAs, attention) act as they do when it is sampled. Raises ValueError for a MODEL of another
    kind of noise levels, of latents that are no pictures, or that wants a picture beside them.
    """

    compute_dtype = "manual_cast_dtype"

    def __init__(self, model):
        check_pictures(model)
        if getattr(model.model, "concat_keys", ()):
            raise ValueError(BESIDE.format(type(model.model).__name__))
        options = kept_for_backward(model.model_options.get("transformer_options", {}))
        super().__init__(model.model, options, model.load_device)
        self.schedule, self.prediction = levels_of(model), prediction_of(model)

    @property
    def frame(self) -> bool:
        """Whether a picture is a video of one frame to the MODEL."""
        return bool(self.layout and self.layout.frame)

    def latent_in(self, latents: Tensor) -> Tensor:
        """ComfyUI's latents (B, C, H, W) -> the network's."""
        return self._in_frame(self.base.process_latent_in, latents)

    def latent_out(self, latents: Tensor) -> Tensor:
        """The network's latents (B, C, H, W) -> ComfyUI's."""
        return self._in_frame(self.base.process_latent_out, latents)

    def _in_frame(self, process: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
        return process(latents.unsqueeze(2)).squeeze(2) if self.frame else process(latents)


def check_pictures(model) -> None:
    """Raise ValueError for a MODEL whose latents are no pictures, as those of video and sound."""
    layout = layout_of(model.model.diffusion_model)
    dimensions = model.get_model_object("latent_format").latent_dimensions
    if dimensions != (3 if layout and layout.frame else 2):
        raise ValueError(
            f"this model's latents have {dimensions} dimensions, and a {type(model.model).__name__} is not known as a "
            "model of pictures: those of video and sound cannot be used here, connect a model of pictures"
        )


@contextmanager
def differentiable(model) -> Iterator[None]:
    """Within, the gradients of the MODEL's network are right; everything is put back at the end.

    Flux's blocks add in place to what their norms keep for backward: the norms get copies. Float16 has no room
    for small gradients: what ComfyUI computes in it is computed in float32, or as autocast says. Newer cores fuse
    the rotary embedding into an operation without a gradient, unless they are told of a training; some then, too.
    """
    give_gradients()
    base, network, management = model.model, model.model.diffusion_model, comfy.model_management
    cast = getattr(base, "manual_cast_dtype", None)
    narrow = (cast or next(network.parameters()).dtype) == torch.float16
    layers = [m for m in network.modules() if narrow and getattr(m, "comfy_cast_weights", None) is False]
    was_training = getattr(management, "in_training", None)  # older cores have no such word
    try:
        if was_training is not None:
            management.in_training = True
        base.manual_cast_dtype = torch.float32 if narrow else cast
        for layer in layers:
            layer.comfy_cast_weights = True  # to what comes in
        with cloned_inputs(network, ADDED_TO):
            yield
    finally:
        if was_training is not None:
            management.in_training = was_training
        base.manual_cast_dtype = cast
        for layer in layers:
            layer.comfy_cast_weights = False


def conditions(model, conditioning, latent: Tensor) -> Cond:
    """ComfyUI's conditioning for latents (B, C, H, W) -> what the MODEL's network is given, B rows.

    Raises ValueError for one that is not the same all over: areas, masks, timestep ranges, ControlNets;
    and for a MODEL that wants a picture beside the text.
    """
    if len(conditioning) != 1:
        raise ValueError(f"the conditioning has {len(conditioning)} parts: give one prompt, not combined ones")
    given = {"area", "mask", "start_percent", "end_percent", "control", "hooks"} & conditioning[0][1].keys()
    if given:
        raise ValueError(f"the conditioning has {', '.join(sorted(given))}: give it as it comes from the text encoder")
    with torch.inference_mode():  # only then does ComfyUI run what prepares the text for some networks
        prepared = _prepared(model, conditioning, latent)
        parts = {
            name: value.process_cond(batch_size=len(latent), device=latent.device, area=None).cond
            for name, value in prepared.items()
        }
    if "c_concat" in parts:
        raise ValueError(BESIDE.format(type(model.model).__name__))
    if (layout := layout_of(model.model.diffusion_model)) and layout.count:
        parts.pop(layout.count, None)  # the context says it
    if "attention_mask" in parts and parts["attention_mask"].all():
        del parts["attention_mask"]  # it hides nothing
    other = [name for name, value in parts.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"the conditioning's {', '.join(other)} cannot be given to a batch of single samples")
    context = parts.pop("c_crossattn").to(latent.device)
    pooled = parts.pop("y", None)
    return Cond(context, None if pooled is None else pooled.to(latent.device), parts).map(torch.clone)


def attends_jointly(model, conditioning, latent: Tensor) -> bool:
    """Whether text and picture are one sequence to the MODEL's network: repeated text tokens then change pictures."""
    return not isinstance(_prepared(model, conditioning, latent)["c_crossattn"], comfy.conds.CONDCrossAttn)


def _prepared(model, conditioning, latent: Tensor) -> dict[str, Any]:
    """What ComfyUI makes of a conditioning for the MODEL's network."""
    latent = latent.unsqueeze(2) if model.get_model_object("latent_format").latent_dimensions == 3 else latent
    conds = {"positive": comfy.sampler_helpers.convert_cond(conditioning)}
    return comfy.samplers.process_conds(model.model, latent, conds, latent.device)["positive"][0]["model_conds"]
