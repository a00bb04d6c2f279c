"""ComfyUI's decoders with gradients: a copy of the VAE's, or the tiny one of its previews."""

from __future__ import annotations

from functools import partial
from typing import Any

import folder_paths
import torch
from torch import Tensor, nn

from ...core.decoder import ENCODES, Decoder, frozen_copy
from .denoiser import ModelDenoiser


def own_decoder(denoiser: ModelDenoiser, vae) -> Decoder:
    """A VAE's decoder, copied when it is first used, so that ComfyUI may move and unload the VAE itself."""
    return Decoder(vae.spacial_compression_encode(), lambda: _copied(denoiser, vae), partial(_decode, denoiser, vae))


def _copied(denoiser: ModelDenoiser, vae) -> nn.Module:
    network = vae.first_stage_model
    if getattr(vae, "output_channels", 3) != 3 or not hasattr(network, "decode"):
        raise ValueError(
            f"this VAE is a {type(network).__name__}, through which no gradient is known: leave pixel_backbone empty"
        )
    return frozen_copy(network, denoiser.device, vae.vae_dtype, ENCODES)


def _range(vae) -> tuple[float, float]:
    """Factor and offset by which ComfyUI makes colours of what a VAE's network gives."""
    low, high = (float(vae.process_output(torch.tensor([x]))) for x in (-0.5, 0.5))  # what is beyond it cuts off
    return high - low, (high + low) / 2


def _decode(denoiser: ModelDenoiser, vae, network: Any, latents: Tensor) -> Tensor:
    weight = next(network.parameters())
    factor, offset = _range(vae)
    z = denoiser.latent_out(latents.float()).to(weight.device, weight.dtype)
    found = network.decode(z.unsqueeze(2))[:, :, 0] if denoiser.frame else network.decode(z)
    return found.float() * factor + offset


def tiny_decoder(denoiser: ModelDenoiser, factor: int) -> Decoder:
    """The tiny decoder that ComfyUI's previews use; raises ValueError where it is not there."""
    latents = denoiser.base.latent_format
    name = getattr(latents, "taesd_decoder_name", None)
    if name is None or denoiser.frame:
        raise ValueError("pixel_decoder is 'tiny', and ComfyUI knows none for this model: set pixel_decoder to vae")
    listed = [file for file in folder_paths.get_filename_list("vae_approx") if file.startswith(name)]
    if not listed:
        raise ValueError(
            f"pixel_decoder is 'tiny', and {name} is not in models/vae_approx: put it there, as for previews, or set "
            "pixel_decoder to vae"
        )
    path = folder_paths.get_full_path("vae_approx", listed[0])

    def make() -> nn.Module:
        from comfy.taesd.taesd import TAESD

        with torch.inference_mode(False):
            loaded = TAESD(None, path, latent_channels=latents.latent_channels)
        return frozen_copy(loaded.taesd_decoder, denoiser.device, torch.float32)

    # What it gives is in [0, 1].
    return Decoder(factor, make, lambda network, z: network(z.float()))
