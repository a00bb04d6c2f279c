"""What ComfyUI's page and disk are told: messages, routes, pictures, folders."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
from aiohttp import web
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image
from server import PromptServer
from torch import Tensor

from ...trainer.checks import check_inside, check_name, foreign
from ...trainer.data.files import path_of

SMALL = 128  # pixels; smaller pictures are kept without loss
READABLE = "turbodistill_readable_folders"  # the entry in extra_model_paths.yaml
WILDCARDS = "wildcards"  # as other nodes call their folder, too


def send(event: str, message: dict[str, Any]) -> None:
    """A message to every open page."""
    PromptServer.instance.send_sync(event, message)


def route(method: str, path: str, answer: Callable[..., Any]) -> None:
    """`answer(*path parts)` gives JSON values, or None for an empty answer; KeyError is 404, ValueError 409.

    Other sites' pages are refused, of which ComfyUI lets some through: sandboxed ones, and all with `--listen`.
    """

    async def handle(request: web.Request) -> web.Response:
        if words := foreign(request.headers):
            return web.json_response({"error": words}, status=403)
        try:
            body = answer(*request.match_info.values())
        except KeyError as error:
            return web.json_response({"error": str(error)}, status=404)
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=409)
        return web.Response(status=204) if body is None else web.json_response(body)

    PromptServer.instance.routes.route(method, path)(handle)


def check_cancel() -> None:
    """Raise ComfyUI's own exception if the user has pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def is_cancel(error: BaseException) -> bool:
    """Whether an error is ComfyUI's cancel."""
    return isinstance(error, comfy.model_management.InterruptProcessingException)


def free_memory(model) -> int | None:
    """Bytes of the MODEL's device that could be used, its own included; None on a CPU."""
    device = model.load_device
    if comfy.model_management.is_device_cpu(device):
        return None
    return comfy.model_management.get_total_memory(device)


class Progress:
    """ComfyUI's own progress bar of the running node.

    Newer cores send a bar's value only once it passes what they sent last: every phase has a bar of its own.
    """

    def __init__(self):
        self._phase = ""
        self._bar: Any = None

    def show(self, phase: str, done: int, total: int) -> None:
        """So much of a phase is done."""
        if phase != self._phase:
            self._phase, self._bar = phase, comfy.utils.ProgressBar(total)
        self._bar.update_absolute(done, total)


def blocked(words: str) -> ExecutionBlocker:
    """An output that is not there: nodes that take it do not run, and the page says why."""
    return ExecutionBlocker(words)


def empty_cache() -> None:
    """Give memory that nothing uses back to the device."""
    comfy.model_management.soft_empty_cache(True)


def output_folder() -> Path:
    """Where runs and pairs lie."""
    return Path(folder_paths.get_output_directory()) / "turbodistill"


def readable_folders() -> list[Path] | None:
    """Below which files may be named; None, any, where ComfyUI listens to its own machine alone.

    Its input and output, and what its owner lists in extra_model_paths.yaml, which no page can write.
    """
    addresses = (getattr(comfy.cli_args.args, "listen", None) or "127.0.0.1").split(",")
    if all(address.strip() in ("127.0.0.1", "::1", "localhost") for address in addresses):
        return None
    listed, _ = folder_paths.folder_names_and_paths.get(READABLE, ([], set()))
    return [Path(folder_paths.get_input_directory()), Path(folder_paths.get_output_directory()), *map(Path, listed)]


def input_path(text: str) -> Path:
    """What a widget names: a path in ComfyUI's input folder, or a whole one; raises DataError if it may not be read."""
    return check_inside(Path(folder_paths.get_input_directory()) / path_of(text), readable_folders())


def student_folders() -> list[Path]:
    """Where ComfyUI lists LoRAs, and students that are full copies."""
    return [Path(place) for kind in ("loras", "diffusion_models") for place in folder_paths.get_folder_paths(kind)]


def wildcard_folders() -> list[Path]:
    """Where wildcard files lie: in the input folder, in ComfyUI's own, and where extra_model_paths.yaml says so."""
    listed, _ = folder_paths.folder_names_and_paths.get(WILDCARDS, ([], set()))
    own = (folder_paths.get_input_directory(), getattr(folder_paths, "base_path", None))
    return [*(Path(place) / WILDCARDS for place in own if place), *map(Path, listed)]


def _writable_folder(folder: str) -> Path:
    """The first of the places for a kind of model, by ComfyUI's order, in which files can be made.

    One of extra_model_paths.yaml may lie on a disk that is shared to be read. Those that are there come first.
    """
    places = [Path(place) for place in folder_paths.get_folder_paths(folder)]
    for place in sorted(places, key=lambda place: not place.is_dir()):
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=place):  # flags do not tell of a disk that can only be read
                return place.resolve()
    raise PermissionError(
        f"no file can be made in {', '.join(map(str, places))}: allow it, or name another folder for {folder} in "
        "extra_model_paths.yaml"
    )


def save_path(folder: str, name: str) -> tuple[Path, str]:
    """Where a new file `name`.safetensors goes in one of ComfyUI's model folders, and what its lists call it.

    With a number if there is such a file. Raises ValueError for a name that leads out of the folder, PermissionError
    where none of the folders can be written to.
    """
    base = _writable_folder(folder)
    parts = name.strip().removesuffix(".safetensors").split("/")
    try:
        wanted = base.joinpath(*map(check_name, parts)).with_name(f"{parts[-1]}.safetensors")
    except ValueError as error:
        raise ValueError(
            f"name is {name[:100]!r}: give one that stays in models/{folder}, with / for subfolders ({error})"
        ) from None
    names = chain([wanted.stem], (f"{wanted.stem}-{k}" for k in count(2)))
    path = next(path for path in (wanted.with_name(f"{n}.safetensors") for n in names) if not path.exists())
    return path, str(path.relative_to(base))


def refresh(folder: str) -> None:
    """Forget what was listed of a model folder, so that a new file is found."""
    folder_paths.filename_list_cache.pop(folder, None)


def show(pictures: Tensor) -> list[dict[str, str]]:
    """Pictures (N, 3, H, W) in [0, 1] as temporary files; where the page finds each."""
    subfolder = "turbodistill"
    folder = Path(folder_paths.get_temp_directory()) / subfolder
    folder.mkdir(parents=True, exist_ok=True)
    places = []
    for picture in pictures:
        pixels = (picture.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()
        image = Image.fromarray(np.ascontiguousarray(pixels))
        name = f"{uuid.uuid4().hex}.{'png' if max(image.size) <= SMALL else 'webp'}"
        image.save(folder / name, quality=90)
        places.append({"filename": name, "subfolder": subfolder, "type": "temp"})
    return places
