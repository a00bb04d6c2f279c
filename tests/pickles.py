"""Pickles that tell of it when somebody runs them, in every format that torch and numpy have for one."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def plain(path: Path) -> bytes:
    return pickle.dumps(Runs(path))


def archive(path: Path) -> bytes:
    """As torch writes it since 1.6."""
    file = io.BytesIO()
    torch.save({"config": {}, "student": Runs(path)}, file)
    return file.getvalue()


def stream(path: Path) -> bytes:
    """As torch wrote it before."""
    file = io.BytesIO()
    torch.save({"config": {}, "student": Runs(path)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def tape(path: Path) -> bytes:
    """As torch wrote it at first, which torch below 2.6 runs even where it is told to read weights only."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            content = plain(path) if name != "sys_info" else pickle.dumps({"little_endian": sys.byteorder == "little"})
            about = tarfile.TarInfo(name)
            about.size = len(content)
            made.addfile(about, io.BytesIO(content))
    return file.getvalue()


def array(path: Path) -> bytes:
    """As numpy writes an array of objects."""
    file = io.BytesIO()
    np.save(file, np.array([Runs(path)], dtype=object), allow_pickle=True)
    return file.getvalue()


KINDS = {kind.__name__: kind for kind in (plain, archive, stream, tape, array)}
