"""A model for plain Python and the command line: the embedded one, or a diffusers folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...core.architecture import architecture_of
from ...core.denoiser import Cond
from ...core.schedule import DiscreteSchedule
from ...demo.files import MODEL
from ..run.memory import is_out_of_memory
from .embedded import load_single_file
from .host import ModelError, PipelineHost


def load_model(path: str | Path | None = None, device: str | None = None) -> PipelineHost:
    """The embedded model, another single file with its architecture in the header, or a diffusers folder.

    Raises ModelError for anything else, and for a device that is not there, with the reason.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"device {device!r} cannot be used ({reason}): leave it out, or install a torch for it"
        ) from None
    path = MODEL if path is None else Path(path)
    if not os.path.exists(path):  # unlike Path's, false for what no file can be called
        raise ModelError(f"model {path!s:.300} does not exist: check the name")
    try:
        return _load_folder(path, device) if path.is_dir() else load_single_file(path, device)
    except ModelError:
        raise
    except Exception as error:  # there is no end to what the libraries below raise for odd files
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{path} cannot be loaded as a model ({type(error).__name__}: {error!s:.300}): get it again"
        ) from None


def _check_index(path: Path) -> None:
    """Raise ModelError for a folder of another kind of pipeline, before any of its weights is read."""
    try:
        index = dict(json.loads((path / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return  # diffusers says what is wrong with it
    if "unet" not in index or "text_encoder_2" in index:
        raise ModelError(
            f"{path} is a folder of {index.get('_class_name')!s:.60}, the command line loads Stable Diffusion 1.x and "
            "2.x: distil it in ComfyUI or the WebUI"
        )


def _load_folder(path: Path, device: str) -> PipelineHost:
    """A Stable Diffusion 1.x or 2.x pipeline folder."""
    _check_index(path)
    try:
        import diffusers
        import transformers

        library: Any = diffusers
        kinds: dict[str, Any] = {
            "unet": library.UNet2DConditionModel,
            "vae": library.AutoencoderKL,
            "text_encoder": transformers.CLIPTextModel,
        }
        parts = {}
        for name, kind in kinds.items():
            # What a file lacks would else be random.
            parts[name], info = kind.from_pretrained(
                path, subfolder=name, local_files_only=True, output_loading_info=True
            )
            if missing := sorted(info["missing_keys"]):
                raise ValueError(f"{len(missing)} weights of {name} are missing, such as {missing[0]}")
        pipe = library.StableDiffusionPipeline.from_pretrained(
            path, local_files_only=True, safety_checker=None, **parts
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{path} is no Stable Diffusion folder that diffusers can load: {error!s:.500}") from None
    pipe.to(device)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.float().eval().requires_grad_(False)  # files in float16 come as that

    def encode_text(prompts: list[str]) -> Cond:
        tokens = pipe.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=pipe.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return Cond(pipe.text_encoder(tokens.input_ids.to(device))[0])

    kind = {"epsilon": "eps", "v_prediction": "v"}.get(pipe.scheduler.config.prediction_type)
    if kind is None:
        raise ModelError(
            f"{path} predicts {pipe.scheduler.config.prediction_type!r:.100}: known are epsilon and v_prediction"
        )
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    side = pipe.unet.config.sample_size * factor
    return PipelineHost(
        pipe.unet,
        pipe.vae,
        encode_text,
        DiscreteSchedule(pipe.scheduler.alphas_cumprod),
        kind,
        path.name,
        architecture_of({name: parameter.shape for name, parameter in pipe.unet.named_parameters()}) or "unknown",
        (side, side),
    )
