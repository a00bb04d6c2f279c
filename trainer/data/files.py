"""Files that are written whole or not at all, and what is said of those that cannot be used."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

log = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be used: the message names the file and says what to do."""


class OtherRun(DataError):
    """Samples on disk that another model or other settings made: they are never overwritten."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file so that a crash or a full disk leaves the old one or the new one, never a half.

    Raises OSError, which says what to do.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True) if part.parent.exists() else None
        if not isinstance(error, (OSError, SafetensorError)):  # a library's own file operations fail with the latter
            raise
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path} ({reason}): free some space or choose another folder") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; raises OSError, which says what to do."""
    with whole_file(path) as part:
        part.write_bytes(content)


def checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(torch.uint8).numpy().tobytes() if tensors[name].ndim else b"")
    return digest.hexdigest()
