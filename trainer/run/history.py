"""The losses of a run on disk, as they come."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.files import write_whole, writing
from ..loop.distill import Step
from ..loop.health import Health

log = logging.getLogger(__name__)


def read_rows(path: Path, update: int) -> list[dict[str, str]]:
    """The rows up to an update; what is cut short or no number is left out, and the rest stays."""
    if not path.exists():
        return []
    rows: list[dict[str, str]] = []
    try:
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if _is_whole(row) and 0 < int(row["update"]) <= update]
    except (ValueError, csv.Error) as error:
        log.warning("%s cannot be read to its end (%s)", path, error)
    return rows


def _is_whole(row: dict[str, str]) -> bool:
    """Whether a row has an update and nothing but numbers."""
    try:
        int(row["update"])
        return None not in row.values() and all(value == "" or float(value) is not None for value in row.values())
    except (ValueError, KeyError, TypeError):
        return False


class History:
    """Losses and health of every update that looks at them, in a CSV file that grows as training goes."""

    def __init__(self, path: Path, update: int):
        self.path = path
        self.columns: list[str] = []
        rows = read_rows(path, update)
        # A run killed after its last saved state repeats some updates: their rows are dropped, as is a row cut short.
        if rows:
            self.columns = list(rows[0])
            self._write(rows, "w")
        elif path.exists():
            path.unlink()

    def add(self, step: Step, measured: Health) -> None:
        row = {"update": step.update, "seconds": round(step.seconds, 4), **measured.numbers, **step.losses}
        if not set(row) <= set(self.columns) or not self.path.exists():  # its folder may have been deleted
            old = []
            if self.path.exists():
                with self.path.open(newline="") as file:
                    old = list(csv.DictReader(file))
            self.columns += [c for c in row if c not in self.columns]
            self._write([*old, row], "w")
        else:
            self._write([row], "a")

    def _write(self, rows: Sequence[dict[str, Any]], mode: str) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)
        if mode == "w":
            write_whole(self.path, text.getvalue().encode())
        else:
            with writing(self.path), self.path.open("a", newline="") as file:
                file.write(text.getvalue())
