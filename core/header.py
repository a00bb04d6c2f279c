"""The header of a safetensors file: the names, shapes and types of its tensors, which themselves stay in the file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .rights import RIGHTS, denied

# safetensors' names of types -> torch's, as far as this torch has them.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, theirs)
    for name, theirs in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U8": "uint8",
        "BOOL": "bool",
    }.items()
    if hasattr(torch, theirs)
}
Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by their names


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its first tensor.

    `shapes` and `dtypes` are by the tensors' names; a dtype is safetensors' name of it, such as F16.
    """

    path: Path
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]


def read_header(path: str | Path, error: type[ValueError]) -> Header:
    """The header of a safetensors file; raises `error` as `opened` does."""
    with opened(path, error) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not iterable in safetensors 0.4.2
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        return Header(Path(path), file.metadata() or {}, shapes, dtypes)


def no_file(path: str | Path) -> str:
    """What is wrong with a path where a file is wanted, and what to do; "" for a file."""
    if denied(path):
        return RIGHTS
    # Unlike Path's, these are false for what no file can be called.
    if os.path.isfile(path):
        return ""
    if os.path.isdir(path):
        return "is a folder: give a file"
    return "is no regular file: give one" if os.path.exists(path) else "does not exist: check the name"


@contextmanager
def opened(path: str | Path, error: type[ValueError]) -> Iterator[Any]:
    """A safetensors file; raises `error` for a file that is missing, unreadable, truncated, or of another kind."""
    if wrong := no_file(path):
        raise error(f"{path!s:.300} {wrong}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as reason:
        raise error(
            f"{path} is no complete safetensors file ({reason}). If the download broke off, get it again; "
            "pickle files (.ckpt, .pt) are not loaded, since they can run code"
        ) from None
    except OSError as reason:
        raise error(f"{path} cannot be read ({reason.strerror or reason}): check it") from None
