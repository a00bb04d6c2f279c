"""What the training tab and the API need of wherever the checkpoint is loaded: a WebUI, or the embedded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from ..trainer.data.built_in import Suggestion
from ..trainer.host import Host


class Backend(Protocol):
    """A program with a model loaded, and its folders."""

    @property
    def name(self) -> str:
        """AUTOMATIC1111, Forge, TurboDistill."""
        ...

    @property
    def sizes(self) -> tuple[int, int]:
        """Width and height that the loaded model is made for, in pixels."""
        ...

    @property
    def usage(self) -> str:
        """How a student is used, in words with {name} for its name."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Where a form begins with another value than the trainer's."""
        ...

    @property
    def limits(self) -> Mapping[str, Mapping[str, Any] | None]:
        """Settings that are narrower here than the trainer's: what differs of bounds and help; None is not offered."""
        ...

    @property
    def page_fields(self) -> Mapping[str, Any]:
        """The components of txt2img by the names in `take_over.READ`; none where there is no such page."""
        ...

    def checkpoint(self) -> str:
        """The title of what is loaded, "" where nothing is."""
        ...

    def refusal(self) -> str:
        """Why nothing can be distilled in this program, whatever is loaded; "" where it can."""
        ...

    def runs_folder(self) -> Path:
        """Where runs are kept; their teacher pairs lie in `pairs` beside it."""
        ...

    def students_folder(self) -> Path:
        """Where students are found by name: the Lora folder."""
        ...

    def prompts(self) -> dict[str, Path]:
        """The built-in prompt lists that suit the model, by name; `auto` among them is that of `suggestion`."""
        ...

    def suggestion(self) -> Suggestion:
        """Which of the lists suits the model best, and why."""
        ...

    def wildcards(self) -> Sequence[Path]:
        """Folders of wildcard files, which need not be there."""
        ...

    def open(self, width: int, height: int) -> AbstractContextManager[Host]:
        """The loaded model, trainable: waits until nothing else uses it, and restores everything at the end.

        Raises ValueError, in words, where no checkpoint is loaded or the size cannot be.
        """
        ...

    def readable_folders(self) -> Sequence[Path] | None:
        """Below which files may be named; None, any, where nobody but the owner can reach the pages."""
        ...

    def free_memory(self) -> int | None:
        """Bytes of the device that could be used, the model's own included; None where it does not know."""
        ...

    def saved(self, path: Path) -> None:
        """A student was put there: refresh the lists."""
        ...
