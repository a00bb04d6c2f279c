"""What a diffusers pipeline holds, as the trainer's host."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.card import fingerprint
from ...core.denoiser import Cond, Denoiser
from ..host import decoded_at_once
from .denoisers import UNetDenoiser


class ModelError(ValueError):
    """A checkpoint that cannot be loaded: the message says why and what to do."""


class PipelineHost:
    """A loaded UNet, autoencoder and text encoder, as `trainer.host.Host` asks for them."""

    def __init__(
        self, unet, vae, encode_text, schedule, prediction: str, name: str, architecture: str, size: tuple[int, int]
    ):
        self.denoiser: Denoiser = UNetDenoiser(unet, schedule, prediction)
        self.vae = vae.requires_grad_(False)
        # Its attention leaves the channels last: a CPU's group norm is slow backwards then, above all in bfloat16.
        vae.decoder.mid_block.register_forward_hook(lambda _module, _args, maps: maps.contiguous())
        self._encode_text = encode_text
        self.name, self.architecture, self.resolution = name, architecture, size
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (vae.config.latent_channels, size[1] // factor, size[0] // factor)
        self.base_hash, self.text_hash = fingerprint(unet), ""

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Cond:
        return self._encode_text(prompts)

    def decoder(self, latents: Tensor) -> Tensor:
        z = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        images = [self.vae.decode(chunk).sample for chunk in z.split(decoded_at_once(self.resolution))]
        return torch.cat(images).float() / 2 + 0.5

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        x = images.to(self.vae.device, self.vae.dtype) * 2 - 1
        return self.vae.encode(x).latent_dist.mean * self.vae.config.scaling_factor
