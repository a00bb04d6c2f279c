"""AUTOMATIC1111's loaded model, trainable: its bare weights, frozen, and everything put back at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from modules import devices, lowvram, sd_hijack, sd_models, sd_unet, shared
from torch import Tensor, amp

from ..core.schedule import prediction_of_name
from .host_decoder import own_decoder
from .host_denoiser import CompvisDenoiser, frozen, in_float32
from .host_training import BESIDE, WebUIHost, emptied, held

HYPERTILE = "__webui_hypertile_params"  # where its extension keeps what it does to a module


def check(model: Any) -> None:
    """Raises ValueError, in words, for a model that cannot be trained here."""
    name = model.sd_checkpoint_info.name
    if getattr(model, "is_sd3", False):
        raise ValueError(f"{name} is a Stable Diffusion 3, which is not distilled here: use Forge or ComfyUI")
    if getattr(model, "is_sdxl_inpaint", False) or model.model.conditioning_key != "crossattn":
        raise ValueError(BESIDE.format(name))
    if prediction_of_name(model.parameterization) not in ("eps", "v"):
        raise ValueError(f"{name} predicts {model.parameterization!r}: known are eps and v")
    if shared.cmd_opts.lowvram:
        raise ValueError(
            "with --lowvram parts of the model come and go within a pass, which training cannot follow: start with "
            "--medvram, or without either"
        )


@contextmanager
def trainable(model: Any, width: int, height: int) -> Iterator[WebUIHost]:
    """The model as the trainer's host, with gradients through its UNet; weights and flags are its own again after."""
    check(model)
    network = model.model.diffusion_model
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(bare(model))
        stack.enter_context(plain(model))
        sd_models.send_model_to_device(model)
        _bring(model)
        for change in (frozen, in_float32):
            stack.enter_context(change(network))
        stack.enter_context(held(model, network))
        sd_models.apply_alpha_schedule_override(model)
        denoiser = CompvisDenoiser(
            network, model.alphas_cumprod, prediction_of_name(model.parameterization), torch.device(devices.device)
        )
        channels = getattr(model, "latent_channels", 4)
        yield WebUIHost(
            model,
            denoiser,
            partial(_encode, model),
            partial(_others, model),
            (width, height),
            channels,
            model.cond_stage_model,
            own_decoder(model.first_stage_model, denoiser.device, lambda z: z / model.scale_factor),
        )


@contextmanager
def bare(model: Any) -> Iterator[None]:
    """The checkpoint's own weights, without the user's LoRAs and hypernetworks; the next generation applies them anew.

    The Lora extension merges in place and keeps copies: it is made to put them back.
    """
    networks: Any = sys.modules.get("networks")
    with emptied(getattr(networks, "loaded_networks", None)), emptied(shared.loaded_hypernetworks), torch.no_grad():
        for module in model.modules():
            if getattr(module, "network_current_names", ()):
                networks.network_apply_weights(module)
        with torch.enable_grad():
            yield


@contextmanager
def plain(model: Any) -> Iterator[None]:
    """The UNet computes within as for a picture with no option on: no tiling, no Hypertile, no engine in its place."""
    tiles = [p for m in model.modules() if (p := getattr(m, HYPERTILE, None)) is not None and p.enabled]
    circular = sd_hijack.model_hijack.circular_enabled
    try:
        sd_unet.apply_unet("None")  # a generation begins with its own
        sd_hijack.model_hijack.apply_circular(False)
        for params in tiles:
            params.enabled = False
        yield
    finally:
        for params in tiles:
            params.enabled = True
        if sd_hijack.model_hijack.layers:
            sd_hijack.model_hijack.apply_circular(circular)


def _bring(model: Any) -> None:
    """The UNet to where it computes: with --medvram its hook does so, and sends away what was there."""
    if lowvram.is_enabled(model):
        for hook in list(model.model._forward_pre_hooks.values()):
            hook(model.model, ())


@contextmanager
def _others(model: Any) -> Iterator[None]:
    """Text encoders and autoencoder compute within as they do for a generation; then the UNet is back."""
    with torch.no_grad(), devices.autocast():
        yield
    _bring(model)


def _encode(model: Any, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> latents as the UNet takes them; the mean, where the autoencoder tells it."""
    with amp.autocast("cuda", enabled=False):
        found = model.first_stage_model.encode(pictures.to(devices.device, devices.dtype_vae))
    return (found.mode() if hasattr(found, "mode") else found) * model.scale_factor
