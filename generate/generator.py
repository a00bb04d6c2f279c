"""The loaded model with a student merged into its weights, kept ready between prompts: the newest prompt wins."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..core.card import StudentCard
from ..core.families import of_card
from ..core.fit import Base, check_fit
from ..core.student import Student, load_student
from ..trainer.data.prompts import drawn
from ..trainer.host import Host
from .recipe import FewStepModel
from .sample import sample_latents
from .stream import Stream

PATIENCE = 10.0  # seconds that a picture waits for the model


@dataclass(frozen=True)
class Made:
    """Pictures (N, 3, height, width) in [0, 1], the seconds from the prompt to them, and what did not fit, in words."""

    pictures: Tensor
    seconds: float
    remarks: tuple[str, ...] = ()


class Generator:
    """Makes pictures of the newest prompt; gives the bare model to whoever asks for it alone."""

    def __init__(self, host: Host):
        self.host = host
        self._lock = threading.Lock()
        self._tickets = itertools.count(1)
        self._latest = self._dropped = 0
        self._student: Student | None = None
        self._path: Path | None = None
        self._card: StudentCard | None = None
        self._warning = ""
        self._merged = ExitStack()
        self._stream: Stream | None = None

    @contextmanager
    def bare(self) -> Iterator[Host]:
        """The model as it was loaded, for whoever has it alone within."""
        with self._alone():
            self._unload()
            yield self.host

    @contextmanager
    def _alone(self, patience: float = -1) -> Iterator[None]:
        """Nobody else uses the model within; raises ValueError if that takes longer than `patience` seconds."""
        if not self._lock.acquire(timeout=patience):
            raise ValueError("the model is in use: generation waits until that has ended")
        try:
            yield
        finally:
            self._lock.release()

    def make(self, path: Path, prompt: str, seeds: Sequence[int], steps: int) -> Made | None:
        """Pictures of a prompt, one a seed, which draws its choices; None if it was dropped or overtaken as it waited.

        A student of guidance alone takes its own number of steps instead of too few. Raises CardError for a file that
        is no student of this model, DataError for a prompt that cannot be, ValueError if the model is in use.
        """
        texts = drawn([prompt] * len(seeds), seeds)
        ticket = self._latest = next(self._tickets)
        with self._alone(PATIENCE):
            if ticket != self._latest or ticket <= self._dropped:
                return None
            student, card = self._load(path)
            steps_taken = of_card(card).steps_taken(steps)
            began = time.perf_counter()
            different = list(dict.fromkeys(texts))
            cond = self.host.encode_text(different).rows(torch.tensor([different.index(text) for text in texts]))
            pictures = self.host.decode(sample_latents(self.host, student, cond, seeds, steps_taken)).cpu()
            seconds = time.perf_counter() - began
            said = check_fit(card, Base(clip_skip=self.host.clip_skip), path.name, steps=steps_taken)
            if steps_taken != steps:
                said.append(f"{path.name} is sampled as its base is: in {steps_taken} steps, not {steps}.")
            if ticket <= self._dropped:
                return None
            return Made(pictures, seconds, tuple(filter(None, (self._warning, *said))))

    @contextmanager
    def streaming(self, path: Path) -> Iterator[Stream]:
        """A student's stream, for whoever makes frames within; raises as `make`."""
        with self._alone(PATIENCE):
            student, card = self._load(path)
            if self._stream is None:
                self._stream = Stream(
                    self.host, FewStepModel(student, replace(of_card(card), name=path.name, prediction="inherit"))
                )
            yield self._stream

    def drop(self) -> None:
        """Give no pictures of the prompts that were asked for so far and are not made yet."""
        self._dropped = self._latest

    def _load(self, path: Path) -> tuple[Student, StudentCard]:
        if self._student is None or self._card is None or path != self._path:
            self._unload()
            self._student, self._card, self._warning = load_student(path, self.host.denoiser)
            self._path = path
            self._merged.enter_context(self._student.merged())
        return self._student, self._card

    def _unload(self) -> None:
        """Put the model's own weights back, and take the student's hooks out."""
        self._merged.close()
        if self._student is not None:
            self._student.release()
        self._student = self._path = self._stream = None
