"""Captioned pictures as people have them: folders, tables, WebDataset's archives, Hugging Face's datasets."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

from ...core.rights import denied
from . import captions
from .columns import Reader, has_pyarrow, read_columns
from .files import DataError, path_of
from .found import NEEDS, ODD, SECOND, SPLIT, UNCAPTIONED, UNNAMED, UNUSED, Found, open_file
from .tables import TABLES, read_table
from .tars import read_tar
from .walk import ARCHIVES, PICTURES, files_below

# The split that a file of a dataset is of, by its name or its folder's.
OF_SPLIT = re.compile(r"(?:^|[-_./\\])(train(?:ing)?|val(?:id(?:ation)?)?|dev|eval|test(?:ing)?)(?=[-_./\\]|$)", re.I)


def check_place(place: str | Path) -> None:
    """Raise DataError for what is neither a folder nor an archive, without reading it."""
    path = Path(path_of(str(place)))
    # Unlike Path's, these are false for what no folder can be called.
    if os.path.isdir(path) or (os.path.isfile(path) and path.suffix.lower() in ARCHIVES):
        return
    if not os.path.exists(path):
        raise DataError(f"image folder {denied(path) or f'{path!s:.300} does not exist: check the name'}")
    raise DataError(f"image file {path!s:.300} is no folder: give one, or a {', '.join(sorted(ARCHIVES))} file")


def read_pictures(place: str | Path, broken: str = "stop") -> Found:
    """The pictures of a folder, an archive or a parquet file with their captions, and what is left out.

    In a folder, captions are in a table (`metadata.jsonl`, `.csv` or `.parquet`) or in a file beside each picture;
    archives and datasets in it are read as well. No picture is opened. Raises DataError where there is none, and, if
    `broken` is "stop", where a caption, a row or an archive cannot be used.
    """
    path = Path(path_of(str(place)))
    check_place(path)
    folder = os.path.isdir(path)
    found = Found(f"image {'folder' if folder else 'file'} {path!s:.300}")
    files = files_below(path, found) if folder else [str(path)]
    _read_loose(files, found)
    _read_archives([file for file in files if _suffix(file) in ARCHIVES and _name(file) not in TABLES], path, found)
    found.check(broken)
    return found


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _name(file: str) -> str:
    return os.path.basename(file).lower()


def _read_loose(files: list[str], found: Found) -> None:
    """Take in the pictures that are files of their own, with their captions."""
    tables = _tables(files, found)
    named = {path for table in tables.values() for path in read_table(Path(table), table, found)}
    captions_of: dict[str, list[str]] = {}  # each path without its ending
    beside: set[str] = set()  # such paths of pictures that have their captions beside them
    pictures = []
    for file in files:
        stem, suffix = os.path.splitext(file)[0], _suffix(file)
        if suffix in captions.SUFFIXES:
            captions_of.setdefault(stem, []).append(file)
        elif suffix in PICTURES and os.path.normpath(file) not in named:
            if _ruled(file, tables):
                found.leave(UNNAMED, file)
            else:
                pictures.append(file)
                beside.add(stem)
        elif suffix not in PICTURES | ARCHIVES and _name(file) not in TABLES and os.path.normpath(file) not in named:
            found.leave_other(file, suffix)
    for texts in captions_of.values():
        texts.sort(key=_rank)
    for file in pictures:
        _read_beside(file, captions_of.get(os.path.splitext(file)[0], []), found)
    for stem, texts in captions_of.items():
        for file in texts[1:] if stem in beside else texts:
            if stem not in beside and _suffix(file) == ".json":
                found.leave_other(file, ".json")
            else:
                found.leave(SECOND if stem in beside else UNUSED, file)


def _tables(files: list[str], found: Found) -> dict[str, str]:
    """The tables that count, by their folders: one rules all folders below."""
    tables: dict[str, str] = {}
    for file in sorted((file for file in files if _name(file) in TABLES), key=_order):
        if _ruled(file, tables):
            found.leave(SECOND, file)
        else:
            tables[os.path.dirname(file)] = file
    return tables


def _rank(file: str) -> int:
    return captions.SUFFIXES.index(_suffix(file))


def _order(table: str) -> tuple[int, int]:
    """Of tables, those further up go before others, and then as TABLES says."""
    return table.count(os.sep), TABLES.index(_name(table))


def _ruled(file: str, tables: dict[str, str]) -> bool:
    """Whether a table in its folder, or in one above, says which pictures count."""
    return any(file.startswith(os.path.join(folder, "")) for folder in tables)


def _read_beside(file: str, beside: list[str], found: Found) -> None:
    """Take in a picture with the first of the captions beside it."""
    if not beside:
        found.leave(UNCAPTIONED, file)
        return
    caption = beside[0]
    try:
        if os.path.getsize(caption) > captions.LARGEST:
            raise DataError(f"{caption} is larger than a caption: the most is {captions.LARGEST:,} bytes")
        text = captions.read_caption(Path(caption).read_bytes(), caption, _suffix(caption))
        size = os.path.getsize(file)
    except OSError as error:
        found.leave(ODD, file, f"{error.filename or caption} cannot be read ({error.strerror}): check it")
    except DataError as error:
        found.leave(ODD, file, str(error))
    else:
        found.add(file, f"{os.path.basename(file)} {size}", text, partial(open_file, file))


def _read_archives(files: list[str], place: Path, found: Found) -> None:
    """Take in the pictures of archives and datasets: of the training split, where there is one."""
    splits = {file: OF_SPLIT.findall(os.path.relpath(file, place.parent))[-1:] for file in files}
    trains = any(split and split[0].lower().startswith("train") for split in splits.values())
    reader = Reader()
    for file in files:
        if trains and splits[file] and not splits[file][0].lower().startswith("train"):
            found.leave(SPLIT, file)
        elif _suffix(file) == ".tar":
            read_tar(Path(file), file, found)
        elif has_pyarrow():
            read_columns(Path(file), file, found, reader)
        else:
            found.leave(NEEDS, file)
