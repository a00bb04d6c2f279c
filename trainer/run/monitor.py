"""A run as a page shows it: in words, curves, warnings and pictures, as plain JSON values.

ComfyUI's panel and the WebUI's tab both draw snapshots of this, and only draw.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

from ..config import Config
from ..loop.distill import Step
from ..loop.health import OF_DISCRIMINATORS, RANGES, Health
from . import words
from .events import Begun, Control, Event, Finished, PairsMade, Planned, Preview, Selected, Warned

ROWS = 1000  # that are kept of a history; when twice as many have come, every second one goes
POINTS = 150  # of a curve that a page draws, at most
PARTS = 30  # of a curve: each point is the mean over one
SHOWN = 24  # previews that are kept
NEWEST = 8  # teacher pictures that are shown while they are made

# Latents (N, C, H, W) -> one place a picture where the page finds it, in the host's own words.
Show = Callable[[Tensor], list[Any]]


class Monitor:
    """Follows a run's events; `snapshot` may be asked for from any thread.

    `free` is the device's memory in bytes, the model's included, where the host knows it.
    `show` makes pictures of latents for the page; it may take a while, and is called outside of the lock.
    """

    def __init__(self, kind: str, name: str, config: Config, show: Show, free: int | None = None):
        self.kind, self.name, self.config, self.show, self.free = kind, name, config, show, free
        self.control = Control()
        self._lock = threading.Lock()
        self._state, self._what, self._error, self._memory = "working", "", "", ""
        self._done, self._total, self._unit = 0, 0, ""
        self._spent = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)  # (amount, seconds) of late progress
        self._rows: list[dict[str, Any]] = []
        self._every = 1
        self._scores: list[tuple[int, float]] = []
        self._best: dict[str, Any] | None = None
        self._warnings: list[str] = []
        self._previews: list[dict[str, Any]] = []
        self._pictures: list[Any] = []
        self._teacher: list[Any] = []

    @property
    def running(self) -> bool:
        """Whether a training runs that can be asked for a preview or its end."""
        return self._state == "working" and self._what == "training"

    def follow(self, event: Event, seconds: float) -> None:
        """Take in an event, `seconds` after the one before it."""
        shown = self._shown(event) if isinstance(event, Preview) else None
        with self._lock:
            if isinstance(event, PairsMade):
                self._progress(event.what, event.done, event.total, event.what.split()[-1], seconds)
            elif isinstance(event, Planned):
                self._memory = event.text
            elif isinstance(event, Begun):
                self._memory = "; ".join(filter(None, (self._memory, event.memory.in_words(self.free))))
                self._progress("training", event.update, self.config.updates, "updates", 0.0)
            elif isinstance(event, Step):
                self._progress("training", event.update, self.config.updates, "updates", event.seconds)
                self._spent = event.spent
                if event.health:
                    self._add(event.update, event.losses, event.health.numbers)
            elif isinstance(event, Selected) and math.isfinite(event.score):  # JSON has no other numbers
                self._scores.append((event.update, event.score))
                if event.best:
                    self._best = {"update": event.update, "score": event.score}
            elif isinstance(event, Warned):
                self._warnings.append(words.warning(event.update, event.text))
            elif shown is not None:
                self._previews = [*self._previews, shown][-SHOWN:]
            elif isinstance(event, Finished):
                early = self.control.stop and self._done < self._total
                self._state = "stopped" if early else "done"

    def warn(self, text: str) -> None:
        """Add a warning that is no event of the run."""
        with self._lock:
            self._warnings.append(text)

    def end(self, state: str, error: str = "") -> None:
        """`done`, `cancelled` or `failed`, with what went wrong in words."""
        with self._lock:
            self._state, self._error = state, error

    def recall(self, rows: Sequence[dict[str, str]]) -> None:
        """Take in the history of a run that goes on: rows of `history.csv`."""
        health = [f.name for f in fields(Health)]
        with self._lock:
            for row in rows:
                numbers = {k: float(v) for k, v in row.items() if v != "" and k not in ("update", "seconds")}
                losses = {k: v for k, v in numbers.items() if k not in health}
                self._add(int(row["update"]), losses, {k: numbers[k] for k in health if k in numbers})

    def _share(self) -> float | None:
        """How much of what it is at is done, 0 to 1; None before that is known."""
        if self._state in ("done", "stopped") or not self._total:
            return 1.0 if self._total else None
        by_time = self._spent / (60 * self.config.minutes) if self.config.minutes and self._what == "training" else 0.0
        return min(max(self._done / self._total, by_time), 1.0)

    def _shown(self, event: Preview) -> dict[str, Any]:
        self._teacher = self._teacher or self.show(event.teacher)
        student = self.show(event.student)
        about = {"update": event.update, "prompts": event.prompts, "seeds": event.seeds}
        return about | {"teacher": self._teacher, "student": student}

    def newest(self, latents: Tensor) -> None:
        """Show some of these pairs."""
        pictures = self.show(latents[-NEWEST:])
        with self._lock:
            self._pictures = [*self._pictures, *pictures][-NEWEST:]

    def _progress(self, what: str, done: int, total: int, unit: str, seconds: float) -> None:
        if what != self._what:
            self._recent.clear()
        elif done > self._done:
            self._recent.append((done - self._done, seconds))
        self._what, self._done, self._total, self._unit = what, done, total, unit

    def _add(self, update: int, losses: dict[str, float], health: dict[str, float]) -> None:
        if update % self._every:
            return
        if not any(
            name.startswith("discriminator") for name in losses
        ):  # there was none yet: its measures mean nothing
            health = {k: v for k, v in health.items() if k not in OF_DISCRIMINATORS}
        self._rows.append({"update": update, "losses": losses, "health": health})
        if len(self._rows) >= 2 * ROWS:
            self._every *= 2
            self._rows = [row for row in self._rows if row["update"] % self._every == 0]

    def snapshot(self) -> dict[str, Any]:
        """All that a page shows."""
        with self._lock:
            rows, scores, best = list(self._rows), list(self._scores), self._best
            amount, took = (sum(column) for column in zip(*self._recent, strict=True)) if self._recent else (0, 0)
            rate = took / amount if amount else None
            left = None if rate is None else rate * (self._total - self._done)
            if left is not None and self.config.minutes and self._what == "training":
                left = min(left, max(60 * self.config.minutes - self._spent, 0))
            shown = {
                "kind": self.kind,
                "name": self.name,
                "state": self._state,
                "what": self._what,
                "done": self._done,
                "total": self._total,
                "unit": self._unit,
                "share": self._share(),
                "rate": rate,
                "time_left": left,
                "headline": words.headline(self.kind, self.name, self._state, self._what, best),
                "figures": words.figures(self._state, self._done, self._total, self._unit, rate, left, best),
                "memory": self._memory,
                "warnings": list(self._warnings),
                "error": self._error,
                "best": best,
                "previews": list(self._previews),
                "pictures": list(self._pictures),
                "ranges": {name: [low, high] for name, (low, _, high, _) in RANGES.items()},
            }
        return shown | {"mean_of": math.ceil(len(rows) / PARTS), "history": _history(rows, scores)}


def _history(rows: Sequence[dict[str, Any]], scores: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """The curves, of POINTS points at most."""
    ends = [len(rows) * (k + 1) // POINTS for k in range(POINTS)] if len(rows) > POINTS else range(1, len(rows) + 1)
    return {
        "update": [rows[end - 1]["update"] for end in ends],
        "losses": _means([row["losses"] for row in rows], ends),
        "health": _means([row["health"] for row in rows], ends),
        "scores": {"update": [update for update, _ in scores], "score": [score for _, score in scores]},
    }


def _means(rows: Sequence[dict[str, float]], ends: Sequence[int]) -> dict[str, list[float | None]]:
    """Rows of names and values as columns: of the rows up to each end the mean of the last PARTS-th of all.

    What such a part lacks, or is no number, is None.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = np.array([[row.get(name, math.nan) for name in names] for row in rows]).reshape(len(rows), len(names))
    known = np.isfinite(table)
    width = math.ceil(len(rows) / PARTS)
    columns: dict[str, list[float | None]] = {name: [] for name in names}
    for end in ends:
        part = slice(max(end - width, 0), end)
        counts = known[part].sum(0)
        sums = np.where(known[part], table[part], 0.0).sum(0)
        # A curve has a gap where it has no value, not where a part before it had one.
        for name, total, count, here in zip(names, sums, counts, known[end - 1], strict=True):
            columns[name].append(float(f"{total / count:.5g}") if here else None)
    return columns
