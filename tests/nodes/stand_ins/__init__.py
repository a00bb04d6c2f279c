"""Stand-ins for what our nodes use of ComfyUI, so that they are tested where it is not installed.

Written from its interfaces: each does what the class or function of the same name does there, as far
as our nodes rely on it, and refuses what that one refuses. A file here stands for some of its modules.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import turbodistill

from . import api, loading, models, sampling, server
from .api import ComfyExtension, ComfyNode  # noqa: F401 - these and the next are what tests ask for most
from .loading import BASE, CLIP, VAE  # noqa: F401
from .models import (  # noqa: F401
    CONST,
    EDM,
    EPS,
    V_PREDICTION,
    X0,
    BaseModel,
    LatentFormat,
    ModelPatcher,
    ModelPatcherDynamic,
    ModelSamplingDiscrete,
    ModelSamplingDiscreteDistilled,
    ModelSamplingDiscreteFlow,
    ModelType,
    model_sampling,
)
from .toy import Pictures, Text  # noqa: F401


def modules() -> dict[str, dict[str, object]]:
    """Module name -> what our nodes may find in it."""

    def found(module, *names):
        return {name: getattr(module, name) for name in names}

    declared = found(api, "Schema", "Hidden", "ComfyNode", "NodeOutput")
    return {
        "aiohttp": {"web": SimpleNamespace(**found(server, "Response", "json_response"))},
        "comfy": {},
        "comfy.conds": found(models, "CONDRegular", "CONDCrossAttn"),
        "comfy.latent_formats": found(models, "LatentFormat"),
        "comfy.lora": found(models, "model_lora_keys_unet", "load_lora"),
        "comfy.model_base": found(models, "ModelType", "BaseModel"),
        "comfy.model_management": {
            "in_training": False,
            "get_torch_device": lambda: models.CPU,
            "get_total_memory": lambda device: 8 * 1024**3,
            "intermediate_device": lambda: models.CPU,
            "is_device_cpu": lambda device: device.type == "cpu",
            "load_models_gpu": models.load_models_gpu,
            "soft_empty_cache": lambda force=False: None,
            "unet_dtype": lambda device=None, model_params=0, supported_dtypes=(), weight_dtype=None: torch.float32,
            "unet_manual_cast": lambda weight_dtype, inference_device, supported_dtypes=(): None,
            "unet_offload_device": lambda: models.CPU,
        }
        | found(
            server,
            "InterruptProcessingException",
            "interrupt_current_processing",
            "throw_exception_if_processing_interrupted",
        ),
        "comfy.cli_args": {"args": SimpleNamespace(listen="127.0.0.1")},
        "comfy.model_patcher": found(models, "ModelPatcher"),
        "comfy.model_sampling": found(models, "EPS", "V_PREDICTION", "EDM", "CONST", "X0"),
        "comfy.sample": found(sampling, "prepare_noise", "fix_empty_latent_channels"),
        "comfy.sampler_helpers": found(sampling, "convert_cond"),
        "comfy.samplers": found(sampling, "process_conds", "KSAMPLER", "CFGGuider", "ksampler", "calculate_sigmas"),
        "comfy.sd": found(loading, "CLIP", "VAE", "save_checkpoint"),
        "comfy.sd1_clip": found(loading, "token_weights", "escape_important", "unescape_important"),
        "comfy.supported_models": {},
        "comfy.supported_models_base": found(loading, "BASE", "ClipTarget"),
        "comfy.utils": {"PROGRESS_BAR_ENABLED": True} | found(server, "ProgressBar"),
        "comfy_api": {},
        "comfy_api.latest": {
            "io": SimpleNamespace(**declared, Custom=api.kind, **api.SOCKETS),
            "ui": SimpleNamespace(**found(api, "PreviewImage", "PreviewText")),
        }
        | found(api, "ComfyExtension"),
        "comfy_execution": {},
        "comfy_execution.graph_utils": found(api, "ExecutionBlocker"),
        "folder_paths": found(server, "filename_list_cache", "folder_names_and_paths")
        | found(server, "get_filename_list", "get_folder_paths", "get_full_path")
        | {f"get_{place}_directory": server.get_directory(place) for place in ("input", "output", "temp")},
        "latent_preview": {"prepare_callback": lambda model, steps: lambda step, x0, x, total: None},
        "server": found(server, "PromptServer"),
    }


OURS = "turbodistill.nodes"


def _ours_and_theirs() -> list[str]:
    return [n for n in sys.modules if n in modules() or n == OURS or n.startswith(OURS + ".")]


@contextmanager
def installed():
    """Our nodes over the stand-ins, as a namespace of their modules; both are gone from sys.modules at the end."""
    kept = {name: sys.modules.pop(name) for name in _ours_and_theirs()}
    package = turbodistill.__dict__.pop("nodes", None)
    try:
        for name, content in modules().items():
            sys.modules[name] = module = ModuleType(name)
            vars(module).update(content)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        folder = Path(turbodistill.__file__).parent / "nodes"
        files = sorted(p.relative_to(folder).with_suffix("") for p in folder.rglob("*.py") if p.stem != "__init__")
        yield SimpleNamespace(**{f.name: importlib.import_module(".".join((OURS, *f.parts))) for f in files})
    finally:
        for name in _ours_and_theirs():
            del sys.modules[name]
        turbodistill.__dict__.pop("nodes", None)
        sys.modules.update(kept)
        if package is not None:
            turbodistill.nodes = package
