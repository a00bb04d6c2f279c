"""diffusers' configurations of Stable Diffusion's scheduler and pipeline, for a student's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...core.architecture import SD1
from ...core.card import StudentCard
from ...core.schedule import LAST_TIMESTEP, TIMESTEPS, scaled_linear, zero_terminal
from ...trainer.checkpoint.single_file import pipeline_config
from ...trainer.pipeline.stock import BETAS, discrete_settings
from .tensors import ExportError


def scheduler(card: StudentCard, base: Mapping[str, Any]) -> dict[str, Any]:
    """A stock scheduler that samples the student as its card says; `base` is the base's own configuration, or part."""
    if card.prediction == "flow":
        raise ExportError(f"a UNet's student that predicts {card.prediction} has no scheduler in diffusers")
    usual = pipeline_config(SD1)["scheduler"][1]  # SD2's and SDXL's betas are the same
    config = {name: usual[name] for name in BETAS if name in usual} | dict(base)
    if config["beta_schedule"] != usual["beta_schedule"] or config.get("trained_betas") is not None:
        if card.timesteps[0] != LAST_TIMESTEP:
            raise ExportError(
                f"the base's beta_schedule {config['beta_schedule']!r:.60} is another than Stable Diffusion's"
            )
        table = torch.ones(TIMESTEPS)  # not looked at
    else:
        table = scaled_linear(TIMESTEPS, config["beta_start"], config["beta_end"])
        table = zero_terminal(table) if config.get("rescale_betas_zero_snr") else table
    name, settings = discrete_settings(card, config, table)
    return {"_class_name": name, "steps_offset": 1, **settings}


def index(architecture: str, scheduler: str) -> dict[str, Any]:
    """model_index.json, with the class of the scheduler."""
    config = pipeline_config(architecture)
    parts: dict[str, Any] = {"_class_name": config["pipeline"], "_diffusers_version": "0.31.0"}
    for name, (_, kind, _) in config["text_encoders"].items():
        parts[name] = ["transformers", kind]
        parts[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    parts |= {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    return parts | {name: [None, None] if value is None else value for name, value in config["options"].items()}
