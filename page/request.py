"""What is asked of the background job, by a form or by a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..trainer.checks import check_prompt_place
from ..trainer.config import Config, ConfigError
from ..trainer.data.built_in import AUTO
from ..trainer.data.files import DataError, path_of
from ..trainer.data.prompts import FoundPrompts, find_prompts, prompt_lines
from ..trainer.setting import KINDS, shown
from .backend import Backend

WORK = ("pairs", "distill", "estimate")


@dataclass(frozen=True)
class Request:
    """What is asked for.

    The prompts are `prompts` (one a line), those of `prompt_file` (a text file, or pictures with their metadata), or
    the list `built_in`; where none is given, the captions of `images`, a folder of pictures. A width or height of 0 is
    the model's own. `settings` are fields of `trainer.config.Config`; the others keep their defaults.
    """

    name: str = "my-turbo"
    kind: str = "distill"
    prompts: str = ""
    prompt_file: str = ""
    built_in: str = ""
    images: str = ""
    width: int = 0
    height: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in WORK:
            raise ConfigError(f"kind is {self.kind!r:.100}: use one of {', '.join(WORK)}")
        for name in ("prompt_file", "images"):
            object.__setattr__(self, name, path_of(getattr(self, name)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """Raises ConfigError for a name that is not known, or a value of another type."""
        known = {f.name: type(f.default) for f in dataclasses.fields(cls)} | {"settings": dict}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"unknown field {name!r:.100}: known are {', '.join(known)}")
            if type(value) is not known[name]:
                raise ConfigError(f"{name} is {shown(value)}: give {KINDS[known[name]]}")
        return cls(**values)

    def config(self) -> Config:
        """The settings; with pictures, they are what the discriminator takes for real beside the teacher's."""
        config = Config.from_dict(dict(self.settings))
        return config.replace(positives="both") if self.images and config.positives == "teacher" else config

    def find_prompts(self, backend: Backend, captions: Sequence[str] = ()) -> FoundPrompts:
        """The prompts before any choice in them is drawn, from files that may be read there, or else the captions.

        Raises DataError where there are none, or a file may not be read.
        """
        folders = backend.readable_folders()
        wildcards = backend.wildcards()
        if lines := prompt_lines(self.prompts, wildcards):
            return FoundPrompts(lines)
        if self.prompt_file:
            return find_prompts(check_prompt_place(self.prompt_file, folders), wildcards=wildcards)
        if self.built_in:
            lists = backend.prompts()
            if self.built_in not in lists:
                raise DataError(f"there is no prompt list {self.built_in!r:.100}: known are {', '.join(lists)}")
            words = backend.suggestion().words if self.built_in == AUTO else ""
            return FoundPrompts(find_prompts(lists[self.built_in]).lines, words)
        if not captions:
            raise DataError("there are no prompts: write some, one a line, or name a text file or a built-in list")
        return FoundPrompts(list(captions))
