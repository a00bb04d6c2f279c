"""What lies in a run's folder of what was asked, so that it can go on later, and the list of runs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.card import CardError, read_card
from ..trainer.checks import check_name
from ..trainer.config import Config, ConfigError, check_resumable
from ..trainer.data.files import write_whole
from ..trainer.data.lock import in_use
from ..trainer.run.training import HISTORY, STATE
from .request import Request

RECORD = "run.json"
TAIL = 4096  # bytes of a history that hold its last row


@dataclass(frozen=True)
class Record:
    """What was asked, of which checkpoint, and how it ended.

    `pairs` is the key of its teacher pairs: another one is another model, or other prompts. `student`
    is the file in the Lora folder.
    """

    request: Request
    checkpoint: str
    pairs: str = ""
    state: str = "working"
    error: str = ""
    student: str = ""
    changed: float = field(default_factory=time.time)

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        write_whole(folder / RECORD, json.dumps(asdict(self), indent=1).encode())

    def ended(self, state: str, error: str = "", student: str = "") -> Record:
        return replace(self, state=state, error=error, student=student or self.student, changed=time.time())


def read_record(folder: Path) -> Record | None:
    """The record of a run; None where there is none that can be read."""
    try:
        values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        record = Record(**values | {"request": Request.from_dict(dict(values["request"]))})
        record.request.config()
        texts = (record.checkpoint, record.pairs, record.state, record.error, record.student)
        return record if all(isinstance(text, str) for text in texts) and math.isfinite(record.changed) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def check_settings(folder: Path, config: Config) -> None:
    """Raise ConfigError if a training that was begun in the folder cannot go on with these settings."""
    if (folder / STATE).exists() and (record := read_record(folder)):
        check_resumable(record.request.config().to_dict(), config)


def check_pairs(folder: Path, key: str) -> Record | None:
    """The record of a training that would go on; raises ConfigError if it was of another model, or other prompts."""
    record = read_record(folder)
    if record and (folder / STATE).exists() and record.pairs not in ("", key):
        raise ConfigError(
            f"{record.request.name} was begun with {record.checkpoint}, or with other prompts, sizes or pairs: load "
            "that checkpoint and ask for the same, or give this run another name"
        )
    return record


def student_path(folder: Path, name: str, record: Record | None) -> Path:
    """Where the student of a run goes: where it lies already, else a name that is free."""
    if record and record.student and Path(record.student).parent == folder and _ours(Path(record.student)):
        return Path(record.student)
    number = 1
    while (path := folder / f"{name}{f'-{number}' if number > 1 else ''}.safetensors").exists():
        number += 1
    return path


def _ours(path: Path) -> bool:
    try:
        return bool(read_card(path))
    except (CardError, OSError):
        return False


@dataclass(frozen=True)
class Run:
    """A run on disk: its name, how far it is, and what was asked."""

    name: str
    state: str  # working, done, stopped, cancelled, failed, broken off, or runs elsewhere
    update: int
    updates: int
    changed: float
    record: Record

    def in_words(self) -> str:
        far = f"update {self.update} of {self.updates}" if self.update else "no update yet"
        return f"{self.name}: {self.state}, {far}"

    def to_dict(self) -> dict[str, Any]:
        record: Mapping[str, Any] = asdict(self.record)
        asked = {k: record[k] for k in ("request", "checkpoint", "error", "student")}
        return {k: getattr(self, k) for k in ("name", "state", "update", "updates", "changed")} | asked


def listed(folder: Path, running: str = "") -> list[Run]:
    """The runs that were asked for here, the newest first; `running` is the name of the one that goes on now."""
    found = []
    for place in folder.iterdir() if folder.is_dir() else ():
        if record := read_record(place):
            state = record.state
            if state == "working" and place.name != running:
                # A program that was ended by force had no time to say so, and keeps no lock.
                state = "runs elsewhere" if in_use(place) else "broken off"
            updates = record.request.config().updates
            found.append(Run(place.name, state, _last_update(place / HISTORY), updates, record.changed, record))
    return sorted(found, key=lambda run: run.changed, reverse=True)


def asked(folder: Path, name: str) -> Request:
    """What was asked of the run of this name; raises ConfigError where there is none."""
    record = read_record(folder / check_name(name))
    if record is None:
        raise ConfigError(f"there is no run {name!r} that could go on: choose one of the list")
    return record.request


def _last_update(history: Path) -> int:
    """The update of the last row, which the first column tells; 0 where there is none."""
    try:
        with history.open("rb") as file:
            file.seek(max(file.seek(0, 2) - TAIL, 0))
            rows = file.read().decode(errors="replace").splitlines()[1:]
    except OSError:
        return 0
    return next((int(first[:20]) for row in reversed(rows) if (first := row.partition(",")[0])[:20].isdecimal()), 0)
