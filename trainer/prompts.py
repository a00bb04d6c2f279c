"""Prompts with choices in them, so that a few lines make many: `a {red|blue} {fox|owl}, {photo|oil painting}`."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

ANYTHING = Path(__file__).with_name("anything.txt")  # prompts for any model that knows the world
DEMO = Path(__file__).parents[1] / "demo" / "prompts.txt"
CHOICE = re.compile(r"\{([^{}]*)\}")  # the innermost, so that choices may hold choices


def expand(line: str, draws: random.Random) -> str:
    """The line with one alternative of each choice; an empty one leaves a word out."""
    while match := CHOICE.search(line):
        chosen = draws.choice(match[1].split("|"))
        line = line[: match.start()] + chosen + line[match.end() :]
    return re.sub(r" +(,|$)", r"\1", re.sub(r" {2,}", " ", line)).strip()


def generate(lines: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """`lines` as they are if none has a choice; else `count` prompts, the lines in turn, the same for the same seed."""
    if not any(CHOICE.search(line) for line in lines):
        return list(lines)
    draws = random.Random(seed)
    return [expand(lines[k % len(lines)], draws) for k in range(count)]
