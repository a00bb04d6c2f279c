"""Pictures in WebDataset's archives: plain tar files whose members of one name, but for the ending, are a sample.

Nothing is extracted: a member is read where it lies in its archive, and its name names no file.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from . import captions
from .files import DataError
from .found import DAMAGED, FIELDS, HIDDEN, ODD, SECOND, SPECIAL, TWICE, UNUSED, Found, check_size
from .walk import PICTURES, is_hidden

BLOCK = 512  # bytes of a header


class Member(NamedTuple):
    """A file in an archive, and where it begins there."""

    name: str
    offset: int
    size: int


def read_tar(path: Path, name: str, found: Found) -> None:
    """Take in the pictures of an archive; what cannot be read of it is left out."""
    pictures: dict[str, list[Member]] = {}
    texts: dict[str, list[tuple[int, Member]]] = {}
    names: set[str] = set()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _members(tar, file, found, name):
                stem, suffix = os.path.splitext(member.name)
                suffix = suffix.lower()
                whole = f"{name}: {member.name}"
                if any(is_hidden(part) for part in member.name.split("/")):
                    found.leave(HIDDEN, whole)
                elif member.name in names:
                    found.leave(TWICE, whole)
                elif suffix in PICTURES:
                    pictures.setdefault(stem, []).append(member)
                elif suffix in captions.SUFFIXES:
                    texts.setdefault(stem, []).append((captions.SUFFIXES.index(suffix), member))
                else:
                    found.leave_other(whole, suffix)
                names.add(member.name)
    except (OSError, tarfile.TarError, ValueError, RecursionError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        words = f"archive {path} cannot be read to its end ({error!s:.200}): get it again (as a plain, unpacked .tar)"
        found.leave(DAMAGED, name, words)
    if pictures or texts:
        _samples(path, name, pictures, texts, found)


def _members(tar: Any, file: BinaryIO, found: Found, name: str) -> Iterator[Member]:
    """The files of an archive; raises tarfile.TarError where it is broken."""
    last, end = -1, file.seek(0, os.SEEK_END)
    while (member := tar.next()) is not None:
        tar.members = []  # which it would keep
        if member.offset <= last or member.size < 0:
            raise tarfile.ReadError("its headers lead backwards")
        last = member.offset
        found.see()
        if member.isreg() and not member.issparse():
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f"it ends within {member.name}")
            yield Member(member.name, member.offset_data, member.size)
        elif not member.isdir():
            found.leave(SPECIAL, f"{name}: {member.name}")
    # tarfile takes a header that it cannot read for the end.
    file.seek(tar.offset)
    if file.read(BLOCK).strip(b"\0"):
        raise tarfile.ReadError("a header is no header")


def _samples(
    path: Path,
    name: str,
    pictures: dict[str, list[Member]],
    texts: dict[str, list[tuple[int, Member]]],
    found: Found,
) -> None:
    """Take in each picture with its caption."""
    with path.open("rb") as file:
        for stem, members in pictures.items():
            own = [member for _, member in sorted(texts.pop(stem, []))]
            for second in own[1:]:
                found.leave(SECOND, f"{name}: {second.name}")
            folder, _, last = stem.rpartition("/")
            key = f"{folder}/" * bool(folder) + last.partition(".")[0]
            for member in members:
                whole = f"{name}: {member.name}"
                if not own and key != stem and key in pictures:  # a mask beside the picture: key.mask.png
                    found.leave(FIELDS, whole)
                    continue
                try:
                    text = _caption(file, name, own[0]) if own else None
                except DataError as error:
                    found.leave(ODD, whole, str(error))
                    continue
                found.add(whole, f"{path.name}/{member.name} {member.size}", text, partial(_opened, path, member))
    for members in texts.values():
        for rank, member in members:
            whole = f"{name}: {member.name}"
            suffix = captions.SUFFIXES[rank]
            found.leave_other(whole, suffix) if suffix == ".json" else found.leave(UNUSED, whole)


def _caption(file: BinaryIO, name: str, member: Member) -> str | None:
    whole = f"{name}: {member.name}"
    if member.size > captions.LARGEST:
        raise DataError(f"{whole} has {member.size:,} bytes: no caption has more than {captions.LARGEST:,}")
    return captions.read_caption(_read(file, member), whole, os.path.splitext(member.name)[1].lower())


def _opened(path: Path, member: Member) -> io.BytesIO:
    """A member's content; raises OSError, and DataError where it is too large."""
    check_size(member.size)
    with path.open("rb") as file:
        return io.BytesIO(_read(file, member))


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    raw = file.read(member.size)
    if len(raw) < member.size:
        raise OSError(f"the archive ends within {member.name}")
    return raw
