"""Tables of pictures and captions: `metadata.jsonl`, `metadata.csv`, `metadata.parquet`."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .captions import NAMES, caption_of, first_of
from .columns import parquet_rows
from .files import DataError, lines_of, read_text
from .found import MISSING, ODD, Found, open_file
from .walk import below

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # an earlier one goes before a later one
FILES = ("file_name", "filename", "file", "image", "path")  # columns of a picture's place, by preference
SEPARATORS = ",;\t"  # of a CSV; some spreadsheets write the second
LARGEST = 2**29  # bytes of a table of text


def read_table(table: Path, name: str, found: Found) -> set[str]:
    """Take in the pictures of a table's rows; returns the paths that they name. Raises DataError for no table."""
    named: set[str] = set()
    folder = str(table.parent)
    for number, row in enumerate(_rows(table), 1):
        found.see()
        where = f"{name}, row {number}"
        try:
            if isinstance(row, ValueError):
                raise row
            file = first_of(row, FILES)
            text = caption_of(first_of(row, NAMES))
            if file is None or not any(name.strip().lower() in NAMES for name in filter(None, row)):
                columns = ", ".join(map(str, row))
                raise ValueError(f"it has {columns:.150}")
            if not isinstance(file, str):
                raise ValueError(f"{file!r:.40} is no file's name")
            path = below(folder, file, where)
            named.add(os.path.normpath(path))
            size = _size(path)
            if size is None:
                found.leave(MISSING, f"{file} ({where})")
            else:
                found.add(path, f"{os.path.basename(path)} {size}", text, partial(open_file, path))
        except DataError as error:
            found.leave(ODD, where, str(error))
        except (ValueError, AttributeError, TypeError) as error:
            words = f"{table}, row {number}: every row must have {FILES[0]} and {NAMES[0]} ({error!s:.200})"
            found.leave(ODD, where, words)
    return named


def _size(path: str) -> int | None:
    """A file's bytes; None where there is no such file."""
    try:
        about = os.stat(path)
    except (OSError, ValueError):  # also what no file can be called
        return None
    return about.st_size if stat.S_ISREG(about.st_mode) else None


def _rows(table: Path) -> Iterator[Any]:
    """The rows as dicts, or what else stands there; a ValueError for each that cannot be read."""
    if table.suffix.lower() == ".parquet":
        yield from parquet_rows(table, (*FILES, *NAMES))
        return
    text = read_text(table, LARGEST)
    if table.suffix.lower() == ".csv":
        try:
            header = text.partition("\n")[0]
            separator = max(SEPARATORS, key=header.count)
            yield from csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
        except csv.Error as error:
            yield ValueError(str(error))
        return
    for line in lines_of(text):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield ValueError(str(error))
