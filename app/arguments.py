"""What the commands take: numbers within bounds, folders that are none of somebody's files."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

from ..trainer.config import Config

SEEDS = 0, 2**63 - 1
MOST_STEPS = Config.__dataclass_fields__["student_steps"].metadata["high"]

LONGEST = 255  # bytes of a file's name


def between(low: float, high: float, kind: type = int) -> Callable[[str], float]:
    """What argparse calls for a number from `low` to `high`."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"is {text!r}: give {low} to {high}")
        return value

    return number


def place(text: str) -> Path:
    """What argparse calls for a file or a folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a path")
    if any(len(part.encode("utf-8", "surrogatepass")) > LONGEST for part in Path(text).parts):
        raise argparse.ArgumentTypeError(f"is {text[:60]!r}..., longer than a file's name can be: give a path")
    return Path(text)


def folder(text: str) -> Path:
    """What argparse calls for a folder that is written to."""
    path = place(text)
    # os.path's answers, unlike Path's, are false for what no folder can be called.
    there = next((p for p in (path.absolute(), *path.absolute().parents) if os.path.exists(p)), None)
    if there and not os.path.isdir(there):
        raise argparse.ArgumentTypeError(f"is {text!r}, but {there} is a file: give a folder")
    return path


def new_file(text: str) -> Path:
    """What argparse calls for a file that is written."""
    path = place(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"is {text!r}, a folder: give a file's name")
    folder(str(path.parent))
    return path
