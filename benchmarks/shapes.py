"""Networks of Stable Diffusion's shapes with random weights, and what trainings of them need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from turbodistill.core.denoiser import Cond, Denoiser
from turbodistill.core.schedule import DiscreteSchedule, FlowSchedule
from turbodistill.trainer.data.samples import Samples
from turbodistill.trainer.pipeline.denoisers import FluxDenoiser, UNetDenoiser

PAIRS, CHANNELS, FACTOR = 8, 4, 8


class Shape(NamedTuple):
    """The settings of a network and of its autoencoder, in diffusers' words, and the text that it is told."""

    network: dict[str, Any]
    vae: dict[str, Any]
    width: int  # of the text's tokens
    pooled: int = 0  # width of the pooled text, 0 where there is none
    tokens: int = 77
    channels: int = CHANNELS  # of latents
    flux: bool = False


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
    "sd15": Shape({"cross_attention_dim": 768, "attention_head_dim": 8}, VAE, 768),
    "sdxl": Shape(
        OF_XL
        | {
            "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        },
        VAE,
        2048,
        1280,
    ),
    "flux": Shape(
        {"guidance_embeds": True},
        VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        4096, 768, 512, 16, True,
    ),
    # To see on any machine that a benchmark runs.
    "small": Shape(SMALL_UNET | {"cross_attention_dim": 64}, SMALL_VAE, 64),
    "small-xl": Shape(SMALL_UNET | OF_XL | {"cross_attention_dim": 64}, SMALL_VAE, 64, 1280),
}  # fmt: skip


@contextmanager
def made_in(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within, networks are made on the device in this type, with no copy of another before."""
    own = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(own)


def network(kind: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A network of a kind in SHAPES, made on the device."""
    import diffusers

    library: Any = diffusers
    shape = SHAPES[kind]
    with made_in(device, dtype):
        made = library.FluxTransformer2DModel if shape.flux else partial(library.UNet2DConditionModel, sample_size=64)
        return made(**shape.network).eval().requires_grad_(False)


def around(kind: str, made: Any) -> Denoiser:
    """A network of a kind as a denoiser."""
    if SHAPES[kind].flux:
        return FluxDenoiser(made, FlowSchedule(3.0))
    return UNetDenoiser(made, DiscreteSchedule(), "eps")


def denoiser(kind: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Denoiser:
    return around(kind, network(kind, device, dtype))


def autoencoder(kind: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    import diffusers

    library: Any = diffusers
    with made_in(device, dtype):
        return library.AutoencoderKL(**SHAPES[kind].vae).eval().requires_grad_(False)


def condition(kind: str, count: int, size: int) -> Cond:
    """What such a network is told of `count` random texts, for pictures of this size."""
    shape, draws = SHAPES[kind], torch.Generator().manual_seed(0)
    context = torch.randn(count, shape.tokens, shape.width, generator=draws)
    if not shape.pooled:
        return Cond(context)
    pooled = torch.randn(count, shape.pooled, generator=draws)
    if shape.flux:
        return Cond(context, pooled)
    ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32).repeat(count, 1)
    return Cond(context, pooled, {"time_ids": ids})


def pairs(kind: str, size: int) -> Samples:
    """Random latents with random texts."""
    draws = torch.Generator().manual_seed(1)
    latents = torch.randn(PAIRS, SHAPES[kind].channels, size // FACTOR, size // FACTOR, generator=draws)
    prompts = [f"prompt {i}" for i in range(PAIRS)]
    return Samples(latents, condition(kind, PAIRS, size), prompts, torch.arange(PAIRS))
