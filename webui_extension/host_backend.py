"""The WebUI that we are in, as what the training tab and the API work on."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from modules import devices, sd_models
from safetensors import SafetensorError, safe_open

from ..core.architecture import architecture_of_file
from ..core.card import header
from ..page import job
from ..trainer.data.built_in import AUTO, LISTS, Suggestion, suggest
from ..trainer.groups import PLAIN_ONLY
from ..trainer.host import Host
from . import host, host_kind, host_page, host_training

# How names of tensors begin that models made for 1024 pixels alone have: text encoders of SDXL, blocks of SD3 and Flux.
LARGE = ("conditioner.embedders.", "model.diffusion_model.joint_blocks.", "model.diffusion_model.double_blocks.")
UNET = ("down_blocks.", "unet.down_blocks.")  # as diffusers names them; Stable Diffusion's own name: input_blocks


class HostBackend:
    """AUTOMATIC1111 or Forge, with its chosen checkpoint."""

    settings = {"batch_size": 4, "gradient_checkpointing": True}  # noqa: RUF012 - a constant
    usage = "in a prompt: <lora:{name}:1>"
    # A full copy is the network alone, which no WebUI loads; and the autoencoder has no gradients here.
    limits: dict[str, Any] = {  # noqa: RUF012 - a constant
        "rank": {"low": 1, "help": "LoRA rank. Higher learns more detail and takes more memory."},
        "lr": {"help": "Learning rate of the student. 1e-5 to 5e-4; the optimizer prodigy needs 1."},
        **dict.fromkeys(PLAIN_ONLY),
    }

    @property
    def name(self) -> str:
        return host_kind.name()

    @property
    def page_fields(self) -> dict[str, Any]:
        return host_page.fields()

    @property
    def sizes(self) -> tuple[int, int]:
        """Width and height that the chosen checkpoint is made for."""
        info = _chosen()
        side = 1024 if info and _large(Path(info.filename)) else 512
        return side, side

    def checkpoint(self) -> str:
        info = _chosen()
        return info.name_for_extra if info else ""

    def refusal(self) -> str:
        if host_kind.is_forge() and not host_kind.memory_management():
            return (
                "This kin of Forge keeps its models in a way that is not known here: distil in AUTOMATIC1111, Forge or "
                "ComfyUI. Their students can be sampled here."
            )
        info = _chosen()
        if info and host_kind.has_fused_rope() and _is_transformer(Path(info.filename)):
            return host_kind.NO_GRADIENT.format(info.name)
        return ""

    def runs_folder(self) -> Path:
        return host.output_folder() / "runs"

    def students_folder(self) -> Path:
        return host.lora_folder()

    def prompts(self) -> dict[str, Path]:
        return {AUTO: LISTS[self.suggestion().name], **LISTS}

    def suggestion(self) -> Suggestion:
        info = _chosen()
        return _suggested(Path(info.filename), info.name_for_extra) if info else suggest()

    def wildcards(self) -> list[Path]:
        return host.wildcard_folders()

    @contextmanager
    def open(self, width: int, height: int) -> Iterator[Host]:
        """The loaded model as the trainer's host, once no generation runs; all of it is restored at the end.

        Raises ValueError where no checkpoint is loaded, it cannot be distilled, or the size cannot be.
        """
        with host.held(_why):
            ours = _ours()
            try:
                with ours.trainable(host_training.loaded(), width, height) as opened:
                    yield opened
            finally:
                gc.collect()
                devices.torch_gc()

    def readable_folders(self) -> list[Path] | None:
        return host.readable_folders()

    def free_memory(self) -> int | None:
        """Bytes of the device that nothing else than the model uses."""
        device = torch.device(devices.device)
        model = sd_models.model_data.sd_model
        if device.type != "cuda" or model is None:
            return None
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)

    def saved(self, path: Path) -> None:
        host.refresh_loras()


def _why() -> str:
    """Why others wait for the model, in words."""
    now = job.running()
    which = f" ({now.in_words()})" if now else ""
    return f"A distillation runs{which}: wait, or end it in the tab TurboDistill"


def _chosen() -> Any:
    """What the host knows of the chosen checkpoint, which Forge loads when it is needed; None where there is none."""
    parameters = getattr(sd_models.model_data, "forge_loading_parameters", {})
    return parameters.get("checkpoint_info") or host.checkpoint_info()


def _ours() -> Any:
    """Our module for the host that we are in: neither could be imported in the other."""
    return importlib.import_module(".host_forge" if host_kind.is_forge() else ".host_a1111", __package__)


def _suggested(file: Path, name: str) -> Suggestion:
    """The built-in prompt list for a checkpoint."""
    try:
        return _suggested_then(file, name, file.stat().st_mtime_ns)
    except OSError:
        return suggest(name)


@lru_cache(maxsize=2)
def _suggested_then(file: Path, name: str, _changed: int) -> Suggestion:
    metadata, shapes = header(file)
    return suggest(name, architecture_of_file(shapes), metadata)


def _large(file: Path) -> bool:
    """Whether a checkpoint's file is one of those made for 1024 x 1024."""
    return any(name.startswith(LARGE) for name in _names(file))


def _is_transformer(file: Path) -> bool:
    """Whether a checkpoint's file holds a transformer, not a UNet."""
    names = _names(file)
    return bool(names) and not any("input_blocks." in name or name.startswith(UNET) for name in names)


def _names(file: Path) -> tuple[str, ...]:
    """The names of a checkpoint's tensors; none where it is no safetensors file, or is gone."""
    try:
        return _names_then(file, file.stat().st_mtime_ns)
    except (OSError, SafetensorError):
        return ()


@lru_cache(maxsize=2)  # an idle page asks every second
def _names_then(file: Path, _changed: int) -> tuple[str, ...]:
    with safe_open(file, "pt") as opened:
        return tuple(opened.keys())
