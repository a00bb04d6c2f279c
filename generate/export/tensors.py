"""Tensors in safetensors files, read one by one when they are asked for.

So that a checkpoint never lies in memory as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...core.header import DTYPES, Header, read_header
from ...trainer.data.files import DataError

MAPPED = 2**29  # bytes read from a file before it is opened anew: the pages of a mapped file count as memory


class ExportError(DataError):
    """What cannot be exported or uploaded: the message says why and what to do."""


class Weights(Mapping[str, Tensor]):
    """The tensors of one or more safetensors files by name, each read when it is asked for.

    `shapes` and `dtypes` are known from the headers. Raises ExportError for a file that is none, or broken off.
    """

    def __init__(self, *files: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}
        self.headers: list[Header] = []
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._read: dict[Path, int] = {}
        for file in files:
            header = read_header(file, ExportError)
            self.headers.append(header)
            self.metadata |= header.metadata
            self.shapes |= header.shapes
            for name, dtype in header.dtypes.items():
                if dtype not in DTYPES:
                    raise ExportError(f"{file}: {name} is stored as {dtype}, known are {', '.join(DTYPES)}")
                self.dtypes[name], self._where[name] = DTYPES[dtype], file

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, mapped into memory: copy what is kept."""
        file = self._where[name]
        if self._read.get(file, 0) > MAPPED:
            del self._open[file]
            self._read[file] = 0
        if file not in self._open:
            self._open[file] = safe_open(file, "pt")
        self._read[file] = self._read.get(file, 0) + self.nbytes(name)
        return self._open[file].get_tensor(name)

    def nbytes(self, name: str) -> int:
        """The size of a tensor in its file."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def starting(self, prefix: str) -> dict[str, str]:
        """The names with this prefix, by what follows it."""
        return {name.removeprefix(prefix): name for name in self.shapes if name.startswith(prefix)}


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A weight in another precision; raises ExportError for what is no number, or too large for it."""
    if not tensor.is_floating_point():
        return tensor
    made = tensor.to(dtype)
    if bool(made.isfinite().all()):
        return made
    if not bool(tensor.float().isfinite().all()):
        raise ExportError(f"{name} holds what is no number (NaN or infinity): get the file again, or train it again")
    raise ExportError(
        f"{name} reaches {float(tensor.float().abs().max()):.3g}, too large for {short(dtype)}: use --dtype bfloat16 "
        "or float32"
    )


def short(dtype: torch.dtype) -> str:
    """A dtype as the options have it."""
    return str(dtype).removeprefix("torch.")
