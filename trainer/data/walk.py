"""The files below a folder, as far as they can be pictures, and not those of a whole disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from .captions import SUFFIXES
from .files import DataError
from .found import CLOSED, HIDDEN, LINKED, SPECIAL, Found

PICTURES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl"}
ARCHIVES = {".tar", ".parquet", ".arrow"}
READ = {*PICTURES, *ARCHIVES, *SUFFIXES, ".jsonl", ".csv"}
SYSTEM = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
MANY = 100_000  # files after which a share of them must be of use
SHARE = 100  # one of so many


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's own, such as `._a.png`, which macOS leaves beside `a.png`."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM


def files_below(folder: Path, found: Found) -> list[str]:
    """The files of a folder and those below, sorted; neither hidden ones nor those of linked folders.

    A link to a file is that file. Raises DataError for more than can be meant: a disk, or somebody's home.
    """
    files: list[str] = []
    useful = 0
    for place, folders, names in os.walk(folder, onerror=lambda error: found.leave(CLOSED, str(error.filename))):
        for name in [name for name in folders if is_hidden(name) or os.path.islink(os.path.join(place, name))]:
            folders.remove(name)  # os.walk goes into none of these
            found.leave(HIDDEN if is_hidden(name) else LINKED, os.path.join(place, name))
        for name in names:
            if is_hidden(name):
                found.leave(HIDDEN, os.path.join(place, name))
                continue
            file, suffix = os.path.join(place, name), os.path.splitext(name)[1].lower()
            if suffix in READ and not os.path.isfile(file):  # a pipe would not end
                found.leave(SPECIAL, file)
                continue
            files.append(file)
            useful += suffix in PICTURES | ARCHIVES
        found.see(len(folders) + len(names))
        if found.seen > MANY and useful * SHARE < found.seen:
            raise DataError(
                f"{folder} holds {useful} pictures among more than {MANY:,} other files and folders: give the folder "
                "in which the pictures lie"
            )
    return sorted(files)


def below(folder: str, name: str, where: str) -> str:
    """The path of a picture that a table names; raises DataError for one that lies elsewhere."""
    path = os.path.join(folder, name)
    if "\\" in name and not os.path.exists(path):
        path = os.path.join(folder, name.replace("\\", "/"))  # as Windows writes it
    if not os.path.abspath(path).startswith(os.path.join(os.path.abspath(folder), "")):
        raise DataError(f"{where} names {name[:200]!r}, which is not in its folder: move it there")
    return path


def stamp(place: Path) -> str:
    """What changes when a file of a folder, or a file, does; raises DataError as `files_below`."""
    files = [str(place)] if os.path.isfile(place) else files_below(place, Found(str(place)))
    return hashlib.sha256("\n".join(_lines(files)).encode("utf-8", "surrogatepass")).hexdigest()


def _lines(files: list[str]) -> Iterator[str]:
    for file in files:
        try:
            about = os.stat(file)
        except OSError:  # a link that leads nowhere
            continue
        yield f"{file} {about.st_mtime_ns} {about.st_size}"
