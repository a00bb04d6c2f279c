"""A model for plain Python and the command line: the embedded one, a diffusers folder, or a loaded pipeline."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ...core.architecture import architecture_of
from ...core.denoiser import Cond
from ...demo.files import MODEL
from ..run.memory import is_out_of_memory
from .check import check_pipeline, check_trainable
from .denoisers import as_it_samples
from .embedded import load_single_file
from .host import ModelError, PipelineHost, Size
from .kinds import channels_of, default_size, kind_of, prediction_of, schedule_of


def load_model(source: Any = None, device: str | None = None, size: Size | None = None) -> PipelineHost:
    """What can be distilled: the embedded model, a file or folder, or a pipeline of diffusers that is loaded.

    `source` is None for the embedded model, the path of another single file with its architecture in the header or of
    a diffusers folder, or a pipeline. A pipeline's weights are shared and left as they are, and where they are. `size`
    (width, height) is that of the pictures, by default the model's own. Raises ModelError for anything else, and for
    a device that is not there, with the reason.
    """
    host = host_of(source, device) if hasattr(source, "components") else _from_disk(source, device)
    return host if size is None else host.sized(*size)


def host_of(pipe: Any, device: str | None = None, name: str = "", architecture: str = "") -> PipelineHost:
    """A loaded pipeline as a host; raises ModelError for one that cannot be distilled, and says why.

    `name` and `architecture` are the model's where they are known better than by the pipeline.
    """
    kind = kind_of(pipe)
    network = check_pipeline(pipe, kind)
    check_trainable(pipe, network, kind.network[0])
    there = next(network.parameters()).device
    if device is not None and torch.device(device).type != there.type:
        raise ModelError(f"the pipeline is on {there}, and stays there: call pipe.to({device!r}) and leave device out")
    size = default_size(pipe, kind)
    encoders = [part for key, part in pipe.components.items() if key.startswith("text_encoder") and part is not None]

    def encode(prompts: Sequence[str], size: Size) -> Cond:
        with ExitStack() as stack:
            for encoder in encoders:
                stack.enter_context(as_it_samples(encoder))
            return kind.encode(pipe, prompts, size)

    make: Any = kind.denoiser
    denoiser = make(network, schedule_of(pipe, kind, size), prediction_of(pipe, kind))
    found = architecture or architecture_of({name: p.shape for name, p in network.named_parameters()}) or "unknown"
    if not kind.flows and network.config.addition_embed_type is None:
        denoiser.lora_style = "diffusers"
    return PipelineHost(
        denoiser,
        pipe.vae,
        encode,
        name or Path(pipe.name_or_path or "").name or type(pipe).__name__,
        found,
        size,
        channels=channels_of(network, kind),
        factor=pipe.vae_scale_factor,
        multiple=kind.multiple,
        schedule=(lambda size: schedule_of(pipe, kind, size)) if kind.flows else None,
        pipe=pipe,
    )


def _from_disk(path: str | Path | None, device: str | None) -> PipelineHost:
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
    modules: list[nn.Module] = [pipe.unet, pipe.vae, pipe.text_encoder]
    for module in modules:
        module.float().eval().requires_grad_(False)  # files in float16 come as that
    try:
        return host_of(pipe, name=path.name)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
