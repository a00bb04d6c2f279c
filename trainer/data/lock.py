"""One run at a time in a folder: a lock of the operating system's, which dies with the process that holds it."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .files import DataError, cannot_write, log

LOCK = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)
PLACE = 2**20  # the locked byte: on Windows nobody else can read it, and the owner's name lies before


class InUse(DataError):
    """Another run has this folder: the message says which."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, nobody else who asks for it gets the folder, which is made: no other process, and no other thread.

    A killed process leaves no lock. Where a network folder knows none, that is logged, and it goes on without. Raises
    InUse, and OSError where nothing can be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        _write_owner(file)
        yield
    finally:
        with suppress(OSError):  # Windows does not remove what is open, and forgets the lock of what is closed
            path.unlink()
        file.close()
        if os.name == "nt":
            with suppress(OSError):
                path.unlink()


def in_use(folder: Path) -> bool:
    """Whether somebody has the folder; False where nobody knows."""
    try:
        file = (folder / LOCK).open("r+b")
    except OSError:
        return False
    with file:
        try:
            _lock(file)
        except OSError as error:
            return error.errno in HELD
    return False


def _open(path: Path) -> BinaryIO:
    """The lock's file, locked; raises InUse."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
        try:
            _lock(file)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file  # not one that its last owner has removed meanwhile
        except OSError as error:
            if error.errno not in HELD:
                log.warning("%s cannot be locked (%s): let no two runs use it at once", path.parent, error.strerror)
                return file
            with file:
                raise InUse(
                    f"{path.parent} is in use by {_owner(file)}: wait until that run has ended, cancel it, or use "
                    "another name or folder"
                ) from None
        file.close()


def _write_owner(file: BinaryIO) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M")}
    file.seek(0)
    file.truncate(0)
    file.write(json.dumps(owner).encode())
    file.flush()


def _owner(file: BinaryIO) -> str:
    """Who has a lock, in words."""
    try:
        owner = json.loads(file.read(1000))
        return f"process {int(owner['pid'])} on {owner['host']!s:.100} since {owner['since']!s:.20}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another run"


if os.name == "nt":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        """Raises OSError, of an errno in HELD where another has it."""
        file.seek(PLACE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        finally:
            file.seek(0)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        """Raises OSError, of an errno in HELD where another has it."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
