"""A run as a front end follows it: what is told to its monitor, how often, and how it ended."""

from __future__ import annotations

import time
from pathlib import Path

from ..loop.distill import Diverged
from . import history
from .events import Begun, Event, PairsMade
from .memory import OutOfMemory, advice, is_out_of_memory
from .monitor import Monitor
from .training import HISTORY

PICTURES_EVERY = 5.0  # seconds between looks at the pairs that are made
PLAIN = (ValueError, OSError, Diverged, OutOfMemory)  # their messages say what to do
DOING = {"pairs": "making teacher pairs", "distill": "showing pictures", "estimate": "measuring memory"}


class Session:
    """Feeds a monitor with a run's events; `folder` is that of a training, whose history it takes up."""

    def __init__(self, monitor: Monitor, folder: Path | None = None):
        self.monitor, self.folder = monitor, folder
        self._last = time.monotonic()
        self._pictured = 0.0

    def take(self, event: Event) -> None:
        """Tell the monitor of one event, and of its pictures now and then."""
        if isinstance(event, Begun) and event.update and self.folder:
            self.monitor.recall(history.read_rows(self.folder / HISTORY, event.update))
        now = time.monotonic()
        self.monitor.follow(event, now - self._last)
        if isinstance(event, PairsMade) and (now - self._pictured >= PICTURES_EVERY or event.done == event.total):
            self.monitor.newest(event.newest)
            self._pictured = time.monotonic()
        self._last = time.monotonic()

    def failed(self, error: BaseException) -> str:
        """End as failed; what went wrong, in words."""
        if isinstance(error, PLAIN):
            text = str(error)
        elif is_out_of_memory(error):
            text = advice(DOING[self.monitor.kind])
        else:
            text = f"{type(error).__name__}: {error}"
        self.monitor.end("failed", text)
        return text

    def close(self) -> None:
        """Let go of the model: pages may ask for long after the run."""
        self.monitor.show = lambda latents: []
