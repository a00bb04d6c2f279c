"""Networks of Stable Diffusion's shapes with random weights, and what trainings of them need."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from turbodistill.core.denoiser import Cond
from turbodistill.core.schedule import DiscreteSchedule
from turbodistill.trainer.data.samples import Samples
from turbodistill.trainer.pipeline.denoisers import UNetDenoiser

PAIRS, TOKENS, CHANNELS, FACTOR = 8, 77, 4, 8


class Shape(NamedTuple):
    """The settings of a UNet and of its autoencoder, in diffusers' words, and the width of its text."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    pooled: int = 0


VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
}  # fmt: skip
SMALL_UNET = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8,
}  # fmt: skip
SMALL_VAE = VAE | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
OF_XL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}  # fmt: skip
SHAPES = {
    "sd15": Shape({"cross_attention_dim": 768, "attention_head_dim": 8}, VAE),
    "sdxl": Shape(
        OF_XL
        | {
            "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        },
        VAE,
        1280,
    ),
    # To see on any machine that a benchmark runs.
    "small": Shape(SMALL_UNET | {"cross_attention_dim": 64}, SMALL_VAE),
    "small-xl": Shape(SMALL_UNET | OF_XL | {"cross_attention_dim": 64}, SMALL_VAE, 1280),
}  # fmt: skip


def denoiser(kind: str, device: torch.device, dtype: torch.dtype = torch.float32) -> UNetDenoiser:
    """A UNet of a kind in SHAPES, made on the device."""
    import diffusers

    library: Any = diffusers
    with torch.device(device):
        unet = library.UNet2DConditionModel(sample_size=64, **SHAPES[kind].unet)
    return UNetDenoiser(unet.to(dtype).eval().requires_grad_(False), DiscreteSchedule(), "eps")


def autoencoder(kind: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    import diffusers

    library: Any = diffusers
    with torch.device(device):
        return library.AutoencoderKL(**SHAPES[kind].vae).to(dtype).eval().requires_grad_(False)


def condition(kind: str, count: int, size: int) -> Cond:
    """What such a network is told of `count` random texts, for pictures of this size."""
    shape, draws = SHAPES[kind], torch.Generator().manual_seed(0)
    context = torch.randn(count, TOKENS, shape.unet["cross_attention_dim"], generator=draws)
    if not shape.pooled:
        return Cond(context)
    ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32).repeat(count, 1)
    return Cond(context, torch.randn(count, shape.pooled, generator=draws), {"time_ids": ids})


def pairs(kind: str, size: int) -> Samples:
    """Random latents with random texts."""
    draws = torch.Generator().manual_seed(1)
    latents = torch.randn(PAIRS, CHANNELS, size // FACTOR, size // FACTOR, generator=draws)
    prompts = [f"prompt {i}" for i in range(PAIRS)]
    return Samples(latents, condition(kind, PAIRS, size), prompts, torch.arange(PAIRS))
