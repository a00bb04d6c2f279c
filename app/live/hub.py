"""Everybody who watches the Live page, and the one thread that draws for all of them, a frame each in turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.card import CardError
from ...generate.generator import Generator
from ...generate.stream import Changes, together
from .messages import Asked, file_of, packed

log = logging.getLogger(__name__)
MOST_VIEWERS = 16


class Full(RuntimeError):
    """There are as many viewers as can be."""


@dataclass(eq=False)
class Viewer:
    """One page: its newest input, which waits here for its turn, and its newest frame, which waits to be sent.

    Neither is ever a queue: what is older is forgotten, so that a page that does not read holds nobody up.
    """

    loop: asyncio.AbstractEventLoop
    changes: Changes = field(default_factory=Changes)
    inbox: tuple[Asked, float] | None = None  # and when it came
    outbox: bytes | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    dropped: int = 0  # inputs that a newer one has overtaken

    def offer(self, message: bytes) -> None:
        """Give it a frame to send, from any thread."""

        def put() -> None:
            self.outbox = message
            self.ready.set()

        with contextlib.suppress(RuntimeError):  # the server has ended
            self.loop.call_soon_threadsafe(put)

    async def next(self) -> bytes:
        """The newest frame, once there is one."""
        await self.ready.wait()
        self.ready.clear()
        message, self.outbox = self.outbox, None
        assert message is not None
        return message


class Hub:
    """Draws for all viewers on one generator; `students` gives the files by name."""

    def __init__(self, generator: Generator, students: Callable[[], dict[str, Path]]):
        self.generator, self.students = generator, students
        self._viewers: list[Viewer] = []
        self._waits = threading.Condition()
        self._thread: threading.Thread | None = None
        self._files = ThreadPoolExecutor(1, "live-files")  # the next frame is drawn meanwhile

    def join(self, loop: asyncio.AbstractEventLoop) -> Viewer:
        """A new viewer; raises Full."""
        with self._waits:
            if len(self._viewers) >= MOST_VIEWERS:
                raise Full(f"{MOST_VIEWERS} pages are open already: close one")
            viewer = Viewer(loop)
            self._viewers.append(viewer)
            if self._thread is None:
                self._thread = threading.Thread(target=self._draw, name="live", daemon=True)
                self._thread.start()
            return viewer

    def leave(self, viewer: Viewer) -> None:
        with self._waits:
            if viewer in self._viewers:
                self._viewers.remove(viewer)
            self._waits.notify()

    def ask(self, viewer: Viewer, asked: Asked) -> None:
        """A viewer's newest input; one that waits yet is forgotten."""
        with self._waits:
            viewer.dropped += viewer.inbox is not None
            viewer.inbox = asked, time.perf_counter()
            self._waits.notify()

    def _draw(self) -> None:
        """The thread: round by round, as long as somebody watches."""
        while True:
            with self._waits:
                while self._viewers and not any(viewer.inbox for viewer in self._viewers):
                    self._waits.wait()
                if not self._viewers:
                    self._thread = None
                    return
                turn = [(viewer, *viewer.inbox) for viewer in self._viewers if viewer.inbox]
                for viewer, *_ in turn:
                    viewer.inbox = None
            for student in dict.fromkeys(asked.student for _, asked, _ in turn):
                self._round([each for each in turn if each[1].student == student], student)

    def _round(self, turn: Sequence[tuple[Viewer, Asked, float]], student: str) -> None:
        """A frame for each of these viewers, of one student."""
        changed = []
        for viewer, asked, came in turn:
            if viewer.changes.needs(asked.shot):
                changed.append((viewer, asked, came))
            else:  # the same picture again would only cost others their turn
                viewer.offer(packed({"number": asked.number, "same": True, "dropped": viewer.dropped}))
        most = together(self.generator.host.resolution)
        for first in range(0, len(changed), most):
            self._together(changed[first : first + most], student)

    def _together(self, turn: Sequence[tuple[Viewer, Asked, float]], student: str) -> None:
        began = time.perf_counter()
        try:
            path = self.students().get(student)
            if path is None:
                raise ValueError(f"there is no student {student!r:.100}: choose one that is there")
            with self.generator.streaming(path) as stream:
                frames = stream.make([asked.shot for _, asked, _ in turn])
        except (CardError, ValueError, OSError) as error:
            self._failed(turn, student, str(error))
            return
        except Exception as error:
            log.exception("a live frame failed")
            self._failed(turn, student, f"the frame failed ({type(error).__name__}): {error!s:.300}")
            return
        self._files.submit(self._send, turn, frames, began)

    def _failed(self, turn: Sequence[tuple[Viewer, Asked, float]], student: str, words: str) -> None:
        """Say it to the one whose input it was: of several each is tried by itself."""
        if len(turn) > 1:
            for each in turn:
                self._together([each], student)
            return
        for viewer, asked, _ in turn:
            viewer.changes.last = None
            viewer.offer(packed({"number": asked.number, "error": words}))

    def _send(self, turn: Sequence[tuple[Viewer, Asked, float]], frames: Any, began: float) -> None:
        stages = {name: round(1000 * seconds, 2) for name, seconds in frames.stages.items()}
        for (viewer, asked, came), picture in zip(turn, frames.pictures, strict=True):
            begun = time.perf_counter()
            file, kind = file_of(picture)
            told = {
                "number": asked.number, "type": kind, "dropped": viewer.dropped, "together": len(turn),
                "stages": {
                    "waited": round(1000 * (began - came), 2), **stages,
                    "file": round(1000 * (time.perf_counter() - begun), 2),
                },
            }  # fmt: skip
            viewer.offer(packed(told, file))
