"""Prompts from a text, a file, a built-in list or pictures, with choices in them, so that a few lines make many."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .built_in import AUTO, LISTS, Suggestion, suggest
from .choices import check_choices, check_texts, expand
from .files import DataError, check_file, lines_of, log, path_of, read_text
from .picture_prompts import is_pictures, read_picture_prompts
from .wildcards import FOLDER, Wildcards


class FoundPrompts(NamedTuple):
    """Prompts with their choices not yet drawn, and what there is to tell of where they come from; or ""."""

    lines: list[str]
    words: str = ""


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


def is_built_in(source: str | Path) -> bool:
    """Whether this names a built-in list, or the one that suits the model: a file of that name goes before."""
    return str(source) in (AUTO, *LISTS) and not os.path.exists(source)


def listed(name: str) -> list[str]:
    """The prompts of the built-in list of that name."""
    return prompt_lines(read_text(LISTS[name]))


def suggested(suggestion: Suggestion) -> FoundPrompts:
    """The built-in list that suits a model, and why it is that one."""
    return FoundPrompts(listed(suggestion.name), suggestion.words)


def find_prompts(
    source: str | Path, suggestion: Suggestion | None = None, wildcards: Sequence[str | Path] = ()
) -> FoundPrompts:
    """Prompts from a text file, one a line, from pictures' metadata, or of a built-in list.

    `source` is a text file or a pipe, a folder of pictures or one picture, or `prose`, `tags` or `auto`, which takes
    the `suggestion`. `wildcards` are further folders of wildcard files, after `wildcards` beside the text file. Raises
    DataError as `prompt_lines`, and for what is not there or holds no prompt.
    """
    if is_built_in(source):
        return suggested(suggestion or suggest()) if str(source) == AUTO else FoundPrompts(listed(str(source)))
    path = Path(path_of(str(source)))
    if is_pictures(path) and os.path.exists(path):
        return FoundPrompts(*read_picture_prompts(path))
    if os.path.isfile(path) or not os.path.exists(path):  # else it is a pipe
        check_file("prompt file", path)
    prompts = prompt_lines(read_text(path), [path.parent / FOLDER, *wildcards])
    if not prompts:
        raise DataError(f"prompt file {path} holds no prompt: write one a line")
    return FoundPrompts(prompts)


def read_prompts(source: str | Path = AUTO, model: object = None, wildcards: Sequence[str | Path] = ()) -> list[str]:
    """The prompts of `source`, for `distill`; `auto` is the built-in list that suits the `model` of `load_model`.

    `source` and `wildcards` are as in `find_prompts`; which list it was, and what was left out, is logged. Raises
    DataError.
    """
    suggestion = suggest(getattr(model, "name", ""), getattr(model, "architecture", ""))
    found = find_prompts(source, suggestion, wildcards)
    if found.words:
        log.warning("%s", found.words)
    return found.lines


def prompt_lines(text: str, wildcards: Sequence[str | Path] = ()) -> list[str]:
    """The lines of a text that are prompts, not empty and not begun with #, with what their wildcards stand for.

    `wildcards` are the folders of those. Raises DataError as `check_choices` and `Wildcards.put_into`.
    """
    prompts = [line for raw in lines_of(text) if (line := raw.strip()) and not line.startswith("#")]
    check_choices(prompts)
    return Wildcards(wildcards).put_into(prompts)
