"""Prompts from files, with choices in them, so that a few lines make many: `a {red|blue} fox, {photo|oil painting}`."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from .files import DataError, check_file, lines_of, path_of, read_text

ANYTHING = Path(__file__).with_name("anything.txt")  # prompts for any model that knows the world
LONGEST = 2**16  # letters of a prompt or a caption
BRACE = re.compile(r"([{}])")


def expand(line: str, draws: random.Random) -> str:
    """The line with one alternative of each choice; an empty one leaves a word out."""
    levels = [""]  # the text so far, outside and in each choice that is open: choices may hold choices
    for part in BRACE.split(line):
        if part == "{":
            levels.append("")
        elif part == "}" and len(levels) > 1:
            chosen = draws.choice(levels.pop().split("|"))
            levels[-1] += chosen
        else:
            levels[-1] += part
    return re.sub(r" +(,|$)", r"\1", re.sub(r" {2,}", " ", "{".join(levels))).strip()


def draw_prompts(lines: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """`count` prompts, the lines in turn, with their choices drawn; more of the same seed begin with the same ones.

    Raises DataError for a text in place of a list, for no line, and as `check_texts`.
    """
    if isinstance(lines, str):
        raise DataError(f"prompts is {lines[:80]!r}: give a list of prompts")
    if not lines:
        raise DataError("no prompts to make teacher pairs from: give at least one")
    check_texts(lines)
    draws = random.Random(seed)
    return [expand(lines[k % len(lines)], draws) for k in range(count)]


def drawn(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Each prompt with its choices drawn by the seed of its own picture; raises DataError as `check_choices`."""
    check_choices(prompts)
    return [expand(prompt, random.Random(seed)) for prompt, seed in zip(prompts, seeds, strict=True)]


def read_prompts(path: str | Path) -> list[str]:
    """Lines of a text file or a pipe, empty ones and those that begin with # left out.

    Raises DataError for a missing file, one without a prompt, and as `check_choices`.
    """
    path = Path(path_of(str(path)))
    if os.path.isfile(path) or os.path.isdir(path) or not os.path.exists(path):  # else it is a pipe
        check_file("prompt file", path)
    prompts = prompt_lines(read_text(path))
    if not prompts:
        raise DataError(f"prompt file {path} holds no prompt: write one a line")
    return prompts


def prompt_lines(text: str) -> list[str]:
    """The lines of a text that are prompts: not empty, and not begun with #; raises DataError as `check_choices`."""
    prompts = [line for raw in lines_of(text) if (line := raw.strip()) and not line.startswith("#")]
    check_choices(prompts)
    return prompts


def check_choices(prompts: Sequence[str]) -> None:
    """Raise DataError for half a choice, and as `check_texts`."""
    check_texts(prompts)
    for prompt in prompts:
        depths = list(accumulate(1 if brace == "{" else -1 for brace in BRACE.findall(prompt)))
        if depths and (min(depths) < 0 or depths[-1]):
            raise DataError(
                f"prompt {prompt[:80]!r} has a brace without its other one: write choices as "
                "{red|blue}, or leave it out"
            )


def check_texts(prompts: Sequence[str]) -> None:
    """Raise DataError for what no text encoder can read: no text, too long, or half a letter (a lone surrogate)."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise DataError(f"prompt {prompt!r:.80} is no text: give prompts as texts")
        if len(prompt) > LONGEST:
            raise DataError(f"prompt {prompt[:40]!r}... has {len(prompt):,} letters: give at most {LONGEST:,}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            half = prompt[error.start]
            raise DataError(
                f"prompt {prompt[:80]!r} is no valid text: {half!r} is half a letter, or a byte that is not UTF-8. "
                "Type that letter again"
            ) from None
