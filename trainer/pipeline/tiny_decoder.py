"""Tiny autoencoders of diffusers' class (TAESD), whose decoder comes near the model's own at a fraction of its cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import architecture as of

# Which of the hub's belongs to an architecture's latents.
NAMES = {
    **dict.fromkeys((of.SD1, of.SD2), "madebyollin/taesd"),
    of.SDXL: "madebyollin/taesdxl",
    **dict.fromkeys((of.SD3, of.SD35_MEDIUM, of.SD35_LARGE), "madebyollin/taesd3"),
    **dict.fromkeys((of.FLUX_DEV, of.FLUX_SCHNELL, of.CHROMA, of.Z_IMAGE, of.LUMINA2), "madebyollin/taef1"),
}


def load_tiny(architecture: str, device: torch.device) -> Any:
    """The tiny autoencoder of an architecture, frozen; raises ValueError where there is none, or it cannot be had."""
    if architecture not in NAMES:
        raise ValueError(
            f"pixel_decoder is 'tiny', and no tiny autoencoder is known for {architecture}: set pixel_decoder to vae"
        )
    try:
        from diffusers import AutoencoderTiny

        found: Any = AutoencoderTiny.from_pretrained(NAMES[architecture], torch_dtype=torch.float32)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"pixel_decoder is 'tiny', and {NAMES[architecture]} cannot be loaded ({error!s:.200}): set pixel_decoder "
            "to vae"
        ) from None
    return found.to(device).eval().requires_grad_(False)


def decoded(network: Any, latents: Tensor) -> Tensor:
    """Latents as the denoiser takes them -> pictures about [0, 1]."""
    return network.decode(latents.to(network.device, network.dtype), return_dict=False)[0] / 2 + 0.5
