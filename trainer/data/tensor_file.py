"""A safetensors file that is written tensor by tensor, so that what is written need not lie in memory as a whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.header import DTYPES

NAMES = {value: key for key, value in DTYPES.items()}


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
