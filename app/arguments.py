"""What the commands take: numbers within bounds, folders that are none of somebody's files."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

SEEDS = 0, 2**63 - 1
MOST_STEPS = 8


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


def folder(text: str) -> Path:
    """What argparse calls for a folder that is written to."""
    path = Path(text)
    if os.path.exists(path) and not os.path.isdir(path):  # unlike Path's, false for what no folder can be called
        raise argparse.ArgumentTypeError(f"is {text!r}, a file: give a folder")
    return path
