"""The prompts that somebody's own pictures were made with, from their metadata."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .choices import LONGEST, check_texts, literal
from .files import DataError, check_file
from .found import Found, open_file, printable
from .images import UNREADABLE, opened
from .infotext import MadeWith, read_made_with
from .walk import files_below

ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp")
MOST = 100_000  # pictures


def is_pictures(place: Path) -> bool:
    """Whether prompts there are those of pictures: a folder, or one picture."""
    return os.path.isdir(place) or place.suffix.lower() in ENDINGS


def read_picture_prompts(place: Path) -> tuple[list[str], str]:
    """The prompts of a folder's pictures, or of one picture, each once; and how many had none, in words.

    Their braces are letters: nothing is drawn in them. No pixel is decoded. Raises DataError where no picture says what
    it was made with.
    """
    folder = os.path.isdir(place)
    if not folder:
        check_file("picture", place)
    files = files_below(place, Found(f"folder {place!s:.300}")) if folder else [str(place)]
    files = [file for file in files if os.path.splitext(file)[1].lower() in ENDINGS]
    if len(files) > MOST:
        raise DataError(f"{place} holds {len(files):,} pictures: give a folder of at most {MOST:,}")
    made = list(_made_with(files))
    prompts = list(dict.fromkeys(literal(each.prompt) for each in made))
    if not files:
        raise DataError(
            f"prompt file {place!s:.300} is a folder: give a file with one prompt a line, or a folder of pictures "
            f"({', '.join(ENDINGS)}) with their prompts in them"
        )
    if not prompts:
        raise DataError(
            f"{place!s:.300}: none of its {len(files):,} pictures says the prompt that it was "
            "made with. Give pictures as A1111, Forge or ComfyUI saved them, or a text file with one prompt a line"
        )
    without = len(files) - len(made)
    left = f"; {without:,} have none that can be read, and are left out" if without else ""
    words = f"{len(prompts):,} prompts of {len(made):,} pictures in {place!s:.300}{left}"
    return prompts, ". ".join((words, *_advice(made)))


def _made_with(files: list[str]) -> Iterator[MadeWith]:
    """What the pictures say that say it."""
    for file in files:
        try:
            with open_file(file) as raw, opened(raw) as image:
                found = read_made_with(image)
            if found and len(found.prompt) <= LONGEST:
                check_texts([found.prompt])
                yield found
        except (*UNREADABLE, LookupError, TypeError, ArithmeticError, struct.error):  # no end to what is wrong in EXIF
            continue


def _advice(made: list[MadeWith]) -> Iterator[str]:
    """The settings that most of the pictures have, in words."""
    common = {}
    for name in ("steps", "cfg", "sampler", "negative"):
        counts = Counter(value for each in made if (value := getattr(each, name)))
        if counts and counts.most_common(1)[0][1] * 2 >= len(made):
            common[name] = printable(counts.most_common(1)[0][0][:300])
    words = [
        f"{common['steps']} steps" if "steps" in common else "",
        f"guidance {common['cfg']}" if "cfg" in common else "",
        f"sampler {common['sampler']}" if "sampler" in common else "",
        f"negative prompt {common['negative']!r}" if "negative" in common else "",
    ]
    if any(words):
        yield f"Most were made with {', '.join(filter(None, words))}: the teacher pairs can be made so too"
