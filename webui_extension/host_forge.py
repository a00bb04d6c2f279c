"""The loaded model of Forge, Neo or reForge, trainable: bare, ordinary, frozen weights; all is put back at the end."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from modules import processing, shared
from torch import Tensor

from ..core.borrowed import cloned_inputs, leave_inference_mode
from .host_decoder import own_decoder
from .host_denoiser import ADDED_TO, ForgeDenoiser, computing_type, frozen, space_of
from .host_kind import NO_GRADIENT, has_fused_rope, memory_management
from .host_training import BESIDE, WebUIHost, held

QUANTISED = {
    "nf4": "bitsandbytes' nf4 or fp4",
    "gguf": "GGUF",
}


def check(model: Any) -> None:
    """Raises ValueError, in words, for a model that cannot be trained here."""
    name = model.sd_checkpoint_info.name
    objects = model.forge_objects_original
    network, channels = objects.unet.model, objects.vae.latent_channels
    if _configuration(model).unet_config.get("in_channels", channels) != channels:
        raise ValueError(BESIDE.format(name))
    if getattr(objects.vae, "latent_dim", 2) != 2:
        raise ValueError(f"{name} makes videos, which are not distilled here: load a model of pictures")
    if has_fused_rope() and not hasattr(network.diffusion_model, "input_blocks"):
        raise ValueError(NO_GRADIENT.format(name))
    for parameter in network.diffusion_model.parameters():
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
        if hasattr(model, "set_clip_skip"):  # else the text encoder asks for the setting
            model.set_clip_skip(int(shared.opts.CLIP_stop_at_last_layers))
        denoiser = ForgeDenoiser(unet)
        channels, first = model.forge_objects.vae.latent_channels, model.forge_objects.vae.first_stage_model
        # Only UNets of the first Stable Diffusions look at the text across; the others join it to the picture.
        yield WebUIHost(
            model,
            denoiser,
            partial(_encode, model),
            partial(_others, unet),
            (width, height),
            channels,
            clip.cond_stage_model,
            own_decoder(first, denoiser.device, partial(_unscaled, first, unet.model)),
            joint=not hasattr(network, "input_blocks"),
        )


@contextmanager
def bare(model: Any) -> Iterator[None]:
    """The checkpoint as it was loaded, without the user's LoRAs; the next generation applies them anew."""
    before = model.forge_objects
    try:
        model.forge_objects = model.forge_objects_original.shallow_copy()
        for patcher in (model.forge_objects.unet, model.forge_objects.clip.patcher):
            _merge(patcher)
        yield
    finally:
        model.forge_objects = before


@contextmanager
def levels(model: Any) -> Iterator[None]:
    """The noise levels that a generation would have: with zero terminal SNR where that is chosen."""
    space = space_of(model.forge_objects.unet.model)
    zero = any(getattr(about, "ztsnr", False) for about in (model, _configuration(model)))
    if not (zero or shared.opts.sd_noise_schedule == "Zero Terminal SNR") or not hasattr(space, "set_sigmas"):
        yield
        return
    before = space.sigmas
    try:
        space.set_sigmas(processing.rescale_zero_terminal_snr_sigmas(before))  # pyright: ignore - A1111 has none
        yield
    finally:
        space.set_sigmas(before)


@contextmanager
def in_one_stream() -> Iterator[None]:
    """Weights that are swapped in come in the stream of the computation: backward needs them later."""
    stream = sys.modules.get("backend.stream")  # reForge waits for its own, as ComfyUI does
    off = {name: None for name in ("stream_activated", "mover_stream") if hasattr(stream, name)}
    before = {name: getattr(stream, name) for name in off}
    try:
        for name, value in off.items():
            setattr(stream, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(stream, name, value)


@contextmanager
def in_float32(base: Any) -> Iterator[None]:
    """Within, what Forge computes in float16 is computed in float32, or as autocast says: gradients are small."""
    name, flag = computing_type(base)
    before = getattr(base, name)
    narrow = (before or next(base.diffusion_model.parameters()).dtype) == torch.float16
    layers = [m for m in base.modules() if narrow and getattr(m, flag, None) is False]
    try:
        setattr(base, name, torch.float32 if narrow else before)
        for layer in layers:
            setattr(layer, flag, True)  # to what comes in
        yield
    finally:
        setattr(base, name, before)
        for layer in layers:
            setattr(layer, flag, False)


def _configuration(model: Any) -> Any:
    """What the host has found out about the checkpoint's networks."""
    return getattr(model, "model_config", None) or model.forge_objects_original.unet.model.model_config


def _merge(patcher: Any) -> None:
    """Forge merges LoRAs, or takes them out, when it is asked; its kin while they load."""
    if hasattr(patcher, "refresh_loras"):
        patcher.refresh_loras()


def _bring(unet: Any) -> None:
    """The network to where it computes, everything else away from there, and none of it in inference mode."""
    load = memory_management().load_models_gpu  # pyright: ignore[reportOptionalMemberAccess] - else none is opened
    whole = {"force_full_load": True} if "force_full_load" in inspect.signature(load).parameters else {}
    with torch.inference_mode():  # as Forge loads
        load([unet], memory_required=1e20, **whole)
        _merge(unet)
    leave_inference_mode(unet.model)


def _unscaled(autoencoder: Any, base: Any, latents: Tensor) -> Tensor:
    """The network's latents -> the autoencoder's, by whichever of the two knows how."""
    return autoencoder.process_out(latents) if hasattr(autoencoder, "process_out") else base.process_latent_out(latents)


@contextmanager
def _others(unet: Any) -> Iterator[None]:
    """Text encoders and autoencoder compute within as they do for a generation; then the network is back."""
    with torch.inference_mode():
        yield
    _bring(unet)


def _encode(model: Any, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> latents as the network takes them: the autoencoder's mean."""
    autoencoder = sys.modules[type(model.forge_objects.vae.first_stage_model).__module__]
    posterior = getattr(autoencoder, "DiagonalGaussianDistribution", None)
    if posterior is None:
        return model.encode_first_stage(pictures)
    drawn = posterior.sample
    try:
        posterior.sample = posterior.mode
        return model.encode_first_stage(pictures)
    finally:
        posterior.sample = drawn
