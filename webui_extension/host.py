"""The WebUI's folders, files and lock."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
from modules import paths, progress, sd_models, shared
from modules.call_queue import queue_lock

from ..core.architecture import SD1
from ..core.clip_skip import OWN
from ..trainer.checks import is_inside

lock = queue_lock  # held by whoever makes pictures: `with lock`
FOLDER = "turbodistill_folder"  # our settings among the host's
READABLE = "turbodistill_readable_folders"
NOT_SAVED = "do_not_save_to_config"  # on a component: the host does not keep its first value in a file


@contextmanager
def held(why: Callable[[], str]) -> Iterator[None]:
    """Our lock on the model, long: within, what would wait for it is told why.

    A picture of the page waits, and its progress says so. A setting that loads another model is refused.
    """
    with lock:
        waiting, change = progress.ProgressResponse, shared.opts.set

        class Waiting(waiting):
            def __init__(self, **given: Any):
                super().__init__(**given | ({"textinfo": why()} if given.get("queued") else {}))

        def refuse(key: str, value: Any, is_api: bool = False, run_callbacks: bool = True) -> bool:
            option = shared.opts.data_labels.get(key)
            waits = getattr(getattr(option, "onchange", None), "__qualname__", "").startswith("wrap_queued_call.")
            if not (waits and run_callbacks) or shared.opts.data.get(key) == value:
                return change(key, value, is_api, run_callbacks)
            words = f"{key} stays as it is. {why()}"
            if is_api:
                raise fastapi.HTTPException(409, words)
            gr.Warning(words)
            return False

        progress.ProgressResponse = Waiting
        vars(shared.opts)["set"] = refuse
        try:
            yield
        finally:
            progress.ProgressResponse = waiting
            del vars(shared.opts)["set"]


def output_folder() -> Path:
    """Where what we write is kept: as the settings say, else beside the host's folders of pictures."""
    folder = getattr(shared.opts, FOLDER, "").strip()
    return Path(os.path.expanduser(folder)) if folder else Path(paths.data_path) / "outputs" / "turbodistill"


def listens_to_others() -> bool:
    """Whether other computers can reach the WebUI."""
    given = shared.cmd_opts
    address = getattr(given, "server_name", None) or "127.0.0.1"
    opened = (getattr(given, name, None) for name in ("listen", "share", "ngrok"))
    return any(opened) or address not in ("127.0.0.1", "localhost", "::1")


def readable_folders() -> list[Path] | None:
    """Below which files may be named: any where only the owner can, else the WebUI's own and those of our setting."""
    if not listens_to_others():
        return None
    listed = getattr(shared.opts, READABLE, "").split(";")
    return [Path(paths.data_path), *(Path(os.path.expanduser(folder.strip())) for folder in listed if folder.strip())]


def wildcard_folders() -> list[Path]:
    """Where wildcard files lie: the WebUI's own folder, and those of the extensions that read such files."""
    data, chosen = Path(paths.data_path), getattr(shared.opts, "wildcard_dir", None)
    extensions = data / "extensions"
    folders = [
        data / "wildcards",
        Path(chosen) if chosen else extensions / "sd-dynamic-prompts" / "wildcards",
        extensions / "stable-diffusion-webui-wildcards" / "wildcards",
    ]
    allowed = readable_folders()  # a setting can be changed from where the page is
    return [folder for folder in folders if is_inside(Path(os.path.abspath(folder)), allowed)]


def clip_skip(model: Any, architecture: str) -> int:
    """The clip skip that prompts are read with, as `core.clip_skip` counts; 0 where it is not known.

    AUTOMATIC1111 has it for Stable Diffusion 1 alone, Forge for all; below XL's own nothing is taken.
    """
    own, chosen = OWN.get(architecture, 0), int(getattr(shared.opts, "CLIP_stop_at_last_layers", 0) or 0)
    if not (own and chosen):
        return 0
    if architecture == SD1 or hasattr(model, "set_clip_skip"):
        return max(chosen, own)
    return 0 if getattr(shared.opts, "sdxl_clip_l_skip", False) is True and chosen != own else own


def lora_folder() -> Path:
    """The WebUI's folder of LoRAs."""
    return Path(shared.cmd_opts.lora_dir)


def checkpoint_info():
    """What the host knows of the checkpoint that is loaded, or else chosen; None where there is none."""
    loaded = getattr(sd_models.model_data.sd_model, "sd_checkpoint_info", None)
    return loaded or sd_models.checkpoint_aliases.get(shared.opts.sd_model_checkpoint)


def checkpoint_file() -> Path | None:
    """The file of that checkpoint; None where there is none."""
    info = checkpoint_info()
    return Path(info.filename) if info else None


def _networks():
    """The module of the host's own Lora extension; None where it is switched off."""
    return sys.modules.get("networks")


def lora_files() -> dict[str, Path]:
    """Every LoRA's file, by its name and by its alias."""
    networks = _networks()
    if networks is None:
        return {}
    known = networks.available_network_aliases | networks.available_networks  # a name counts more than an alias
    return {name: Path(entry.filename) for name, entry in known.items()}


def lora_metadata() -> dict[str, Mapping[str, Any]]:
    """Every LoRA's metadata as the host has read it, by name."""
    networks = _networks()
    return {name: entry.metadata or {} for name, entry in networks.available_networks.items()} if networks else {}


def refresh_loras() -> None:
    """Make the host look again which LoRAs there are."""
    if networks := _networks():
        networks.list_available_networks()
