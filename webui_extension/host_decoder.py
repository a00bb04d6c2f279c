"""The WebUIs' decoders with gradients: a copy of the autoencoder's, or the tiny one of their previews."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, amp, nn

from ..core.decoder import ENCODES, Decoder, frozen_copy

FACTOR = 8  # pixels a side of a latent, in all that these hosts load


def own_decoder(autoencoder: nn.Module, device: torch.device, unscaled: Callable[[Tensor], Tensor]) -> Decoder:
    """An autoencoder's decoder, copied when it is first used, so that the host may move the autoencoder itself.

    `unscaled` makes the autoencoder's own latents of the network's.
    """

    def copied() -> nn.Module:
        made = frozen_copy(autoencoder, device, without=ENCODES)
        if getattr(made.__dict__.get("decode"), "__self__", None) is not made:  # with --medvram it is the host's own
            made.__dict__.pop("decode", None)
        return made

    def decode(network: Any, latents: Tensor) -> Tensor:
        weight = next(network.parameters())
        with amp.autocast(weight.device.type, enabled=False):
            z = unscaled(latents.float()).to(weight.dtype)
            found = network.decode(z)
        return getattr(found, "sample", found).float() / 2 + 0.5

    return Decoder(FACTOR, copied, decode)


def tiny_decoder(device: torch.device) -> Decoder:
    """The tiny decoder that the host's previews use; raises ValueError where it cannot be had."""

    def make() -> nn.Module:
        from modules import sd_vae_taesd

        try:
            found: Any = sd_vae_taesd.decoder_model()
        except Exception as error:  # the host gets it from the web
            raise ValueError(
                f"pixel_decoder is 'tiny', and the host cannot load its own ({error!s:.200}): {OTHER}"
            ) from None
        if found is None or type(found).__name__ == "TAEHVDecoder":
            raise ValueError(f"pixel_decoder is 'tiny', and the host knows none for this model: {OTHER}")
        return frozen_copy(getattr(found, "decoder", found), device, torch.float32)

    # What it gives is in [0, 1].
    return Decoder(FACTOR, make, lambda network, z: network(z.float()))


OTHER = "set pixel_decoder to vae"
