"""The embedded model, or another single file with its architecture in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ...core.denoiser import Cond
from ...core.lora import check_match
from ...core.schedule import DiscreteSchedule, scaled_linear
from ...demo.files import HEADER
from ...demo.text_encoder import TextEncoder
from ..checkpoint.header import read_header
from .denoisers import UNetDenoiser
from .host import ModelError, PipelineHost

MOST, MOST_LAYERS = 65_536, 32  # numbers in an architecture, and layers in a block


def load_single_file(path: Path, device: str) -> PipelineHost:
    """A single file whose header holds its architecture; raises ModelError where that is odd, or the file broken."""
    about = read_header(path).metadata
    try:
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
        from diffusers.models.attention_processor import AttnProcessor
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    except ImportError as error:
        raise ModelError(f"loading a model here needs {error.name}: pip install 'turbodistill[demo]'") from None
    try:
        model = json.loads(about[HEADER])
        _check_numbers(model)
        table = scaled_linear(model["schedule"]["steps"], model["schedule"]["start"], model["schedule"]["end"])
        prediction, size = model["prediction"], tuple(model["resolution"])
        scale = model["vae"].pop("scaling_factor")
        with torch.device("meta"):  # what does not fit the file takes no memory
            unet: Any = UNet2DConditionModel(**model["unet"])
            vae: Any = AutoencoderKL(**model["vae"], scaling_factor=scale)
        encoder = TextEncoder(json.dumps(model["text_encoder"]["tokenizer"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: the architecture in its header cannot be read ({error!r:.300}): get the file again"
        ) from None
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118 - no dict
    prefix = "cond_stage_model."
    parts = (
        ("denoiser", unet, lambda: convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config))),
        ("autoencoder", vae, lambda: convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config))),
        (
            "text encoder",
            encoder,
            lambda: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)},
        ),
    )
    for what, module, convert in parts:
        try:
            weights = convert()
            check_match(what, weights, module.state_dict())
            module.load_state_dict(weights, assign=True)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{path}: the {what} does not fit the architecture in the header: {error!s:.500}"
            ) from None
        module.to(device).eval().requires_grad_(False)
    unet.set_attn_processor(AttnProcessor())  # few tokens: the plain product is the faster one on a CPU
    architecture = about.get("modelspec.architecture", "unknown")
    name = about.get("modelspec.title", path.stem)
    return PipelineHost(
        UNetDenoiser(unet, DiscreteSchedule(table), prediction),
        vae,
        lambda texts, _size: Cond(encoder.encode(list(texts))),
        name,
        architecture,
        size,
        channels=vae.config.latent_channels,
        factor=2 ** (len(vae.config.block_out_channels) - 1),
        encoders=[encoder],
    )


def _check_numbers(values: Any, name: str = "the header") -> None:
    """Raise ValueError for a number that no architecture has: networks would be built for ever."""
    inner = values.items() if isinstance(values, dict) else ((name, v) for v in values)
    for key, value in inner:
        if isinstance(value, (dict, list)) and key != "tokenizer":
            _check_numbers(value, key)
        most = MOST_LAYERS if "layers" in key else MOST
        if isinstance(value, (int, float)) and not abs(value) <= most:
            raise ValueError(f"{key} is {value!s:.20}, at most {most} can be")
