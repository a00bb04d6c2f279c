"""Tensors in safetensors files: read one by one when they are asked for, written one after the other.

So that neither a checkpoint that is read nor the one that is written ever lies in memory as a whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...core.header import DTYPES, Header, read_header
from ...trainer.data.files import DataError

NAMES = {value: key for key, value in DTYPES.items()}
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


@dataclass(frozen=True)
class Entry:
    """A tensor of a file that is to be written: what it will be, and what makes it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> Iterator[int]:
    """Write a safetensors file tensor by tensor; yields the bytes of each after it is written.

    The library itself writes only what lies in memory as a whole. The format: eight bytes with the header's length,
    the header as JSON (types, shapes, places), then the numbers without a gap.
    """
    # The largest numbers first: each then lies at a multiple of its own size, as readers expect that map the file.
    entries = sorted(entries, key=lambda e: -e.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata)}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.make()
            assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, entry.name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            yield entry.nbytes


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
