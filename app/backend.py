"""A model that plain Python has loaded, as what the training tab and the API work on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..core.card import CardError, read_card
from ..demo.files import PROMPTS
from ..generate.generator import Generator
from ..trainer.data.built_in import AUTO, LISTS, Suggestion, suggest
from ..trainer.host import Host
from ..trainer.pipeline.host import PipelineHost


class EmbeddedBackend:
    """The model of a generate page, with `folder` for runs, pairs and students.

    `shipped` are students that lie elsewhere, by name; `own` says that the model is the embedded one,
    `reached` that other machines reach the pages.
    """

    name = "TurboDistill"
    usage = "choose {name} in the generate page"
    limits: dict[str, Any] = {}  # noqa: RUF012 - a constant
    page_fields: dict[str, Any] = {}  # noqa: RUF012 - a constant

    def __init__(self, host: PipelineHost, folder: Path, shipped: dict[str, Path], own: bool, reached: bool = False):
        self.reached = reached
        self.host, self.folder, self.shipped, self.own = host, folder, shipped, own
        self.generator = Generator(host)
        self.sizes = host.resolution
        self.example = "fox face, animal-mammal, in glossy 3d fluent style" if own else "a red fox in a forest, photo"
        self.settings: dict[str, Any] = {} if own else {"batch_size": 4, "gradient_checkpointing": True}

    def checkpoint(self) -> str:
        return self.host.name

    def runs_folder(self) -> Path:
        return self.folder / "runs"

    def students_folder(self) -> Path:
        return self.folder / "students"

    def students(self) -> dict[str, Path]:
        """Those that were distilled here and those that were there before, by name, the newest first."""
        found = {path.stem: path for path in self.students_folder().glob("*.safetensors") if _is_student(path)}
        newest = sorted(found, key=lambda name: found[name].stat().st_mtime, reverse=True)
        return self.shipped | {name: found[name] for name in newest if name not in self.shipped}

    def prompts(self) -> dict[str, Path]:
        return {"the embedded model's": PROMPTS} if self.own else {AUTO: LISTS[self.suggestion().name], **LISTS}

    def suggestion(self) -> Suggestion:
        return suggest(self.host.name, self.host.architecture)

    def wildcards(self) -> list[Path]:
        return [self.folder / "wildcards"]

    @contextmanager
    def open(self, width: int, height: int) -> Iterator[Host]:
        sized = self.host.sized(width, height)
        with self.generator.bare():
            yield sized

    def readable_folders(self) -> list[Path] | None:
        return [self.folder] if self.reached else None

    def refusal(self) -> str:
        return ""

    def free_memory(self) -> int | None:
        device = self.host.denoiser.device
        return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None

    def saved(self, path: Path) -> None:
        """Nothing keeps a list."""


def _is_student(path: Path) -> bool:
    try:
        return bool(read_card(path))
    except (CardError, OSError):
        return False
