"""diffusers' configurations of Stable Diffusion's parts, read from the shapes of a single file's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ...core.architecture import SD1, SD2, SDXL
from ...core.card import StudentCard
from ...core.naming import layers_of
from ...core.schedule import scaled_linear, zero_terminal
from ...trainer.pipeline.stock import discrete_settings
from .tensors import ExportError

Shapes = Mapping[str, tuple[int, ...]]
SCALES = {SD1: 0.18215, SD2: 0.18215, SDXL: 0.13025}  # of latents
PIPELINES = {SD1: "StableDiffusionPipeline", SD2: "StableDiffusionPipeline", SDXL: "StableDiffusionXLPipeline"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LAST = 999  # the last timestep, which is pure noise
HEADS = 8  # of each attention in Stable Diffusion 1; in later ones each head has 64 channels
HEAD_WIDTH = 64


def unet(shapes: Shapes, architecture: str, side: int) -> dict[str, Any]:
    """UNet2DConditionModel's configuration; `shapes` by single-file names, `side` of the latents."""
    layers = layers_of(shapes)
    count = (max(int(n.split(".")[1]) for n in shapes if n.startswith("input_blocks.")) + layers) // (layers + 1)
    firsts = [1 + b * (layers + 1) for b in range(count)]
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in firsts]
    depths = [_depths(shapes, "input", range(i, i + layers)) for i in firsts]
    ups = [_depths(shapes, "output", range(b * (layers + 1), (b + 1) * (layers + 1))) for b in range(count)]
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": side,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "layers_per_block": layers,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if _depth(shapes, "middle_block.1") else "UNetMidBlock2D",
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in ups],
        "cross_attention_dim": next(s[1] for n, s in shapes.items() if n.endswith("attn2.to_k.weight")),
        "attention_head_dim": HEADS if architecture == SD1 else [max(w // HEAD_WIDTH, 1) for w in widths],
        "use_linear_projection": any(n.endswith(".proj_in.weight") and len(s) == 2 for n, s in shapes.items()),
    }
    if any(d not in (0, 1) for d in depths + ups):
        config["transformer_layers_per_block"] = [d or 1 for d in depths]
    if ups != depths[::-1]:
        config["reverse_transformer_layers_per_block"] = [d or 1 for d in ups]
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return config


def _depths(shapes: Shapes, side: str, numbers: range) -> int | list[int]:
    """How many transformer blocks each layer of a block has; one number where they are equal, 0 for none."""
    depths = [_depth(shapes, f"{side}_blocks.{i}.1") for i in numbers]
    return depths[0] if len(set(depths)) == 1 else depths


def _depth(shapes: Shapes, module: str) -> int:
    numbers = [re.match(rf"{re.escape(module)}\.transformer_blocks\.(\d+)\.", n) for n in shapes]
    return 1 + max((int(m[1]) for m in numbers if m), default=-1)


def vae(shapes: Shapes, architecture: str, side: int) -> dict[str, Any]:
    """AutoencoderKL's configuration; `shapes` without prefix, `side` of pictures."""
    levels = 1 + max((int(n.split(".")[2]) for n in shapes if n.startswith("encoder.down.")), default=-1)
    if not levels or "decoder.conv_in.weight" not in shapes:
        raise ExportError("the base holds no autoencoder of Stable Diffusion: give a base that does")
    blocks = [int(n.split(".")[4]) for n in shapes if n.startswith("encoder.down.0.block.")]
    config = {
        "_class_name": "AutoencoderKL",
        "sample_size": side,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": 1 + max(blocks),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "scaling_factor": SCALES[architecture],
    }
    return config | ({"force_upcast": True} if architecture == SDXL else {})


def text_encoder(shapes: Shapes, activation: str, projected: bool) -> dict[str, Any]:
    """A CLIP's configuration, by transformers' names of its weights."""
    at = "text_model.encoder.layers."
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return {
        "architectures": [kind],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{at}0.mlp.fc1.weight"][0],
        "num_hidden_layers": 1 + max(int(n.split(".")[3]) for n in shapes if n.startswith(at)),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": activation,
        "projection_dim": shapes["text_projection.weight"][0] if projected else width,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def scheduler(card: StudentCard, base: Mapping[str, Any]) -> dict[str, Any]:
    """A stock scheduler that samples the student as its card says; `base` is the base's own configuration, or part."""
    if card.prediction == "flow":
        raise ExportError(f"a UNet's student that predicts {card.prediction} has no scheduler in diffusers")
    config = {**BETAS, **base}
    if config["beta_schedule"] != BETAS["beta_schedule"] or config.get("trained_betas") is not None:
        if card.timesteps[0] != LAST:
            raise ExportError(
                f"the base's beta_schedule {config['beta_schedule']!r:.60} is another than Stable Diffusion's"
            )
        table = torch.ones(LAST + 1)  # not looked at
    else:
        table = scaled_linear(LAST + 1, config["beta_start"], config["beta_end"])
        table = zero_terminal(table) if config.get("rescale_betas_zero_snr") else table
    name, settings = discrete_settings(card, config, table)
    return {"_class_name": name, "steps_offset": 1, **settings}


def index(architecture: str, encoders: Mapping[str, bool], scheduler: str) -> dict[str, Any]:
    """model_index.json; `encoders` says of each text encoder whether it has a projection."""
    parts: dict[str, Any] = {"_class_name": PIPELINES[architecture], "_diffusers_version": "0.31.0"}
    for name, projected in encoders.items():
        parts[name] = ["transformers", "CLIPTextModelWithProjection" if projected else "CLIPTextModel"]
        parts[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    parts |= {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if architecture == SDXL:
        return parts | {"force_zeros_for_empty_prompt": True}
    return parts | {"safety_checker": [None, None], "requires_safety_checker": False}
