"""What a run yields, and what a front end asks of it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...core.card import StudentCard
from ..loop.distill import Step
from .memory import Memory


class Interrupted(Exception):
    """The user ended a run before its time, after everything was saved; front ends raise it.

    `status` is what a command that `number`, a signal's, has ended gives to its shell.
    """

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(number)
        self.status = 128 + number


@dataclass
class Control:
    """What a front end asks of a run while it goes; may be set from another thread."""

    stop: bool = False  # end after this update and keep the best student
    preview: bool = False  # make a preview after this update


@dataclass(frozen=True)
class PairsMade:
    """`done` of `total` teacher pairs (or pictures encoded, by `what`) are on disk."""

    done: int
    total: int
    what: str
    newest: Tensor  # latents (n, C, H, W)


@dataclass(frozen=True)
class Preview:
    """The student's and the teacher's latents (N, C, H, W) for the same prompts and noise."""

    update: int
    student: Tensor
    teacher: Tensor
    prompts: list[str]
    seeds: list[int]  # of the noise, as every host draws it


@dataclass(frozen=True)
class Selected:
    """A measurement on the held-out pairs; `best` if no earlier student scored lower."""

    update: int
    score: float
    best: bool


@dataclass(frozen=True)
class Warned:
    """Something that the user should know, in words."""

    update: int
    text: str


@dataclass(frozen=True)
class Planned:
    """What was chosen for a card's memory (the setting `vram`), in words."""

    text: str


@dataclass(frozen=True)
class Begun:
    """Training begins, or goes on, at `update`; what memory it will take."""

    update: int
    memory: Memory


@dataclass(frozen=True)
class Finished:
    """The end: the student file, its card, and the score by which it was chosen, if one was taken."""

    path: Path
    card: StudentCard
    score: float | None


Event = PairsMade | Planned | Begun | Step | Preview | Selected | Warned | Finished
