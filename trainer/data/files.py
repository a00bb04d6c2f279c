"""Files that are written whole or not at all, and what is said of those that cannot be used."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...core.header import no_file
from ...core.rights import denied

LIBC = ctypes.CDLL(None) if os.name == "posix" else None
log = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last is a quota's, or a file system's of small files
LARGEST_TEXT = 2**26  # bytes of a text file
AGAIN = "every run makes such a file again, and only that"


class DataError(ValueError):
    """Data that cannot be used: the message names the file and says what to do."""


class OtherRun(DataError):
    """Samples on disk that another model or other settings made: they are never overwritten."""


def remedy_of(error: BaseException) -> str:
    """What to do where a file cannot be written."""
    code = getattr(error, "errno", None)
    if code in FULL or any(f"(os error {number})" in str(error) for number in FULL):  # as safetensors says it
        return "free some space or choose another folder"
    closed = code in (errno.EACCES, errno.EPERM, errno.EROFS)
    return f"choose {'a folder that you may write to' if closed else 'another folder'}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, what goes wrong with writing a file is an OSError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # a library's own file operations fail with the latter
        gone = isinstance(error, (FileNotFoundError, SafetensorError)) and not path.parent.exists()
        gone = gone and Path(getattr(error, "filename", None) or path) not in path.parents  # which cannot be made
        raise cannot_write(path, error, gone) from error


def cannot_write(path: Path, error: Exception, gone: bool = False) -> OSError:
    """What to raise where a file cannot be written, in words; `gone` says that its folder was there before."""
    again = "its folder was deleted or moved while this ran: run it again, only what is missing is made anew"
    remedy = again if gone else remedy_of(error)
    return OSError(f"cannot write {path} ({getattr(error, 'strerror', None) or error}): {remedy}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file so that a crash or a full disk leaves the old one or the new one, never a half.

    A folder that has gone is made anew. Raises OSError, which says what to do.
    """
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True) if part.parent.exists() else None
            raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Where to write a folder so that a crash or a full disk leaves the old one or the new one, never a half.

    A folder that is there is replaced. Raises OSError, which says what to do.
    """
    part, old = (path.with_name(f"{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    with writing(path):
        try:
            part.mkdir(parents=True)
            yield part
            if path.exists():
                os.replace(path, old)
            os.replace(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
    shutil.rmtree(old, ignore_errors=True)


def check_space(path: Path, needed: int) -> None:
    """Raise DataError if `needed` bytes have no room on the disk where `path` will be."""
    disk = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise DataError(
            f"{path} takes about {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there: make room, or choose "
            "another place"
        )


def reason(error: BaseException) -> str:
    """What an error says; its kind, where it says nothing."""
    return str(error) or type(error).__name__


def check_file(what: str, path: Path) -> None:
    """Raise DataError, which says what it should be, if there is no file of this name."""
    if wrong := no_file(path):
        raise DataError(f"{what} {path!s:.300} {wrong}")


def path_of(text: str) -> str:
    """A path as it was pasted, without the quotes and blanks around it."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """A text file, or what comes out of a pipe, in UTF-8, with a byte order mark or without.

    Raises DataError for anything else, and for more than `most` bytes.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
        if len(raw) > most:
            raise DataError(f"{path} has more than {most >> 20} MB: split it")
        return text_of(raw, str(path))
    except OSError as error:
        raise DataError(denied(path) or f"{path} cannot be read ({error.strerror}): check it") from None


def text_of(raw: bytes, name: str) -> str:
    """As `read_text`, of the content of a file of this name."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(f"{name} is no UTF-8 text: save it as plain text in UTF-8")
    return text


def lines_of(text: str) -> list[str]:
    """Lines as editors count them: letters such as U+2028 or a form feed end none."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; raises OSError, which says what to do."""
    with whole_file(path) as part:
        part.write_bytes(content)


def checksum(tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of tensors with their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        if tensors[name].ndim:
            digest.update(tensors[name].contiguous().view(torch.uint8).flatten().numpy().data)
    return digest.hexdigest()


def trim() -> None:
    """Give freed memory back: in glibc before 2.38 no buffer fits into the hole that an equal one left."""
    if LIBC is not None and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write tensors with a checksum, whole or not at all. `about["key"]` says how they were made."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_whole(path, save(tensors, about | {"checksum": checksum(tensors)}))
    trim()


def read_tensors(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one file, mapped into memory, and what it says of itself.

    Raises DataError if it is broken, and OtherRun if it was made in another way than `key`.
    """
    if words := denied(path):  # which is no reason to make it again
        raise PermissionError(words)
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is broken ({error}): {AGAIN}") from None
    whole = about.get("checksum") == checksum(tensors)
    if whole and key in (None, about.get("key")):
        return tensors, about
    del tensors  # or the error would hold the file mapped, and Windows would not let it be replaced
    if not whole:
        raise DataError(f"{path} is corrupt (wrong checksum): {AGAIN}")
    raise OtherRun(f"{path} was made with other settings or another model: use another folder, or delete this one")


@contextmanager
def said_of(path: Path) -> Iterator[None]:
    """Within, whatever is wrong with a file's content is a DataError that names it."""
    try:
        yield
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} holds something else ({error!s:.100}): {AGAIN}") from None


def texts_of(text: str) -> list[str]:
    """A list of texts from JSON; raises ValueError for anything else."""
    found = json.loads(text)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ValueError("no list of texts")
    return found


def check_rows(dimensions: int, rows: int, tensor: Tensor) -> None:
    """Raise ValueError for a tensor of other dimensions, or with another number of rows."""
    if tensor.ndim != dimensions or len(tensor) != rows:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} for {rows} texts")
