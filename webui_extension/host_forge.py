"""Forge's loaded model, trainable: its bare weights as ordinary tensors, frozen, and everything put back at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from backend import memory_management, stream
from modules import sd_models, shared
from torch import Tensor

from ..core.borrowed import cloned_inputs, leave_inference_mode
from .host_denoiser import ADDED_TO, ForgeDenoiser, frozen
from .host_training import BESIDE, WebUIHost, held

QUANTISED = {
    "nf4": "bitsandbytes' nf4 or fp4",
    "gguf": "GGUF",
}


def loaded() -> Any:
    """The chosen checkpoint's model, loaded now if it was not; raises ValueError where there is none."""
    if not sd_models.model_data.forge_loading_parameters.get("checkpoint_info"):
        raise ValueError("there is no checkpoint: put one into models/Stable-diffusion, and choose it")
    return sd_models.forge_model_reload()[0]


def check(model: Any) -> None:
    """Raises ValueError, in words, for a model that cannot be trained here."""
    name = model.sd_checkpoint_info.name
    if model.model_config.unet_config["in_channels"] != model.forge_objects_original.vae.latent_channels:
        raise ValueError(BESIDE.format(name))
    for parameter in model.forge_objects_original.unet.model.diffusion_model.parameters():
        kind = "nf4" if hasattr(parameter, "bnb_quantized") else "gguf" if hasattr(parameter, "gguf_cls") else ""
        if kind:
            raise ValueError(
                f"{name} keeps its weights as {QUANTISED[kind]}, on which no LoRA can be put layer by layer: load it "
                "in fp8, fp16 or bf16 (Diffusion in Low Bits, or another file)"
            )


@contextmanager
def trainable(model: Any, width: int, height: int) -> Iterator[WebUIHost]:
    """The model as the trainer's host, with gradients through its network; all is its own again after."""
    check(model)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(bare(model))
        unet, clip = model.forge_objects.unet, model.forge_objects.clip
        network = unet.model.diffusion_model
        stack.enter_context(levels(model))
        stack.enter_context(in_one_stream())
        _bring(unet)
        stack.enter_context(frozen(network))
        stack.enter_context(cloned_inputs(network, ADDED_TO))
        stack.enter_context(in_float32(unet.model))
        stack.enter_context(held(model, network))
        model.set_clip_skip(int(shared.opts.CLIP_stop_at_last_layers))
        denoiser = ForgeDenoiser(unet)
        channels = model.forge_objects.vae.latent_channels
        # Only UNets of the first Stable Diffusions look at the text across; the others join it to the picture.
        yield WebUIHost(
            model,
            denoiser,
            partial(_encode, model),
            partial(_others, unet),
            (width, height),
            channels,
            clip.cond_stage_model,
            joint=not hasattr(network, "input_blocks"),
        )


@contextmanager
def bare(model: Any) -> Iterator[None]:
    """The checkpoint as it was loaded, without the user's LoRAs; the next generation applies them anew."""
    before = model.forge_objects
    try:
        model.forge_objects = model.forge_objects_original.shallow_copy()
        for patcher in (model.forge_objects.unet, model.forge_objects.clip.patcher):
            patcher.refresh_loras()
        yield
    finally:
        model.forge_objects = before


@contextmanager
def levels(model: Any) -> Iterator[None]:
    """The noise levels that a generation would have: with zero terminal SNR where that is chosen."""
    predictor = model.forge_objects.unet.model.predictor
    wanted = shared.opts.sd_noise_schedule == "Zero Terminal SNR" or getattr(model.model_config, "ztsnr", False)
    if not wanted or not hasattr(predictor, "set_sigmas"):
        yield
        return
    from backend.modules.k_prediction import rescale_zero_terminal_snr_sigmas

    before = predictor.sigmas
    try:
        predictor.set_sigmas(rescale_zero_terminal_snr_sigmas(before))
        yield
    finally:
        predictor.set_sigmas(before)


@contextmanager
def in_one_stream() -> Iterator[None]:
    """Weights that are swapped in come in the stream of the computation: backward needs them later."""
    before = stream.stream_activated
    try:
        stream.stream_activated = False
        yield
    finally:
        stream.stream_activated = before


@contextmanager
def in_float32(base: Any) -> Iterator[None]:
    """Within, what Forge computes in float16 is computed in float32, or as autocast says: gradients are small."""
    narrow = base.computation_dtype == torch.float16
    layers = [m for m in base.modules() if narrow and getattr(m, "parameters_manual_cast", None) is False]
    before = base.computation_dtype
    try:
        base.computation_dtype = torch.float32 if narrow else before
        for layer in layers:
            layer.parameters_manual_cast = True  # to what comes in
        yield
    finally:
        base.computation_dtype = before
        for layer in layers:
            layer.parameters_manual_cast = False


def _bring(unet: Any) -> None:
    """The network to where it computes, everything else away from there, and none of it in inference mode."""
    with torch.inference_mode():  # as Forge loads
        memory_management.load_models_gpu([unet], memory_required=1e20)
        unet.refresh_loras()
    leave_inference_mode(unet.model)


@contextmanager
def _others(unet: Any) -> Iterator[None]:
    """Text encoders and autoencoder compute within as they do for a generation; then the network is back."""
    with torch.inference_mode():
        yield
    _bring(unet)


def _encode(model: Any, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> latents as the network takes them: the autoencoder's mean."""
    options = model.forge_objects.vae.patcher.model_options
    before = options.get("model_vae_regulation")
    try:
        options["model_vae_regulation"] = lambda posterior: posterior.mode()
        return model.encode_first_stage(pictures)
    finally:
        if before is None:
            del options["model_vae_regulation"]
        else:
            options["model_vae_regulation"] = before
