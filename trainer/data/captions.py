"""Captions, in whatever form they come."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .choices import LONGEST, check_texts
from .files import DataError, text_of

SUFFIXES = (".txt", ".caption", ".json")  # of a caption's file: an earlier one goes before a later one
NAMES = ("text", "caption", "prompt", "captions", "description")  # of a caption in JSON or a table, by preference
LARGEST = 2**22  # bytes of a caption's file: JSON may hold more than it


def read_caption(raw: bytes, name: str, suffix: str) -> str | None:
    """The caption in a file of this name; None for JSON that has none. Raises DataError for what is no text."""
    text = text_of(raw, name)
    try:
        if suffix != ".json":
            return caption_of(text)
        found = json.loads(text)
        if isinstance(found, dict):
            found = first_of(found, NAMES)
        return caption_of(found)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} holds no caption ({error!s:.100}): write it as plain text") from None


def first_of(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these names that a row has, in any case; None where it has none of them."""
    known = {str(name).strip().lower(): value for name, value in row.items()}
    return next((known[name] for name in names if name in known), None)


def caption_of(value: Any) -> str | None:
    """The caption that a value of a table or of JSON is: of several the first, None for nothing.

    Raises ValueError for what is no text, or no caption's length.
    """
    if isinstance(value, (list, tuple)):
        value = next((each for each in value if each), None)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no text")
    if len(value) > LONGEST:
        raise ValueError(f"{len(value)} letters, where a caption has at most {LONGEST}")
    check_texts([value])
    return value
