"""A training's state on disk: its tensors as safetensors, all else as JSON in the header.

Reading it runs no code. `torch.load(weights_only=True)` could in versions that hosts still ship: CVE-2025-32434 (before
2.6) and CVE-2026-24747 (before 2.10).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ...core.sharded import is_sharded, own_part, whole
from ..data.files import whole_file
from ..data.tensor_file import Entry, write_safetensors

KEY = "turbodistill.state"  # of the JSON in the header
TENSOR, PAIRS = "$tensor", "$pairs"  # what stands for a tensor by its name, and for a dict whose keys are no texts


def write_state(path: Path, state: dict[str, Any], writes: bool = True) -> None:
    """Write dicts and lists of tensors and plain values, whole or not at all; raises OSError.

    A process that only has parts of its sharded tensors gives them, and `writes` nothing.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    text = json.dumps(_packed(state, "state", tensors, names))
    entries = [Entry(name, tuple(t.shape), t.dtype, lambda t=t: whole(t).cpu()) for name, t in tensors.items()]
    if not writes:
        for tensor in filter(is_sharded, tensors.values()):
            whole(tensor)
        return

    def write() -> None:
        with whole_file(path) as part:
            for _ in write_safetensors(part, entries, {KEY: text}):
                pass

    try:
        write()
    except OSError:
        if path.parent.exists():
            raise
        write()  # its folder was deleted meanwhile: that is made anew


def read_state(path: Path) -> dict[str, Any]:
    """What was written, with tuples as lists; whatever an odd file makes the libraries raise is raised."""
    with safe_open(path, "pt") as file:
        # Copied: the optimizers keep what they are given, and Windows replaces no file that is mapped.
        return _unpacked(json.loads(file.metadata()[KEY]), lambda name: file.get_tensor(name).clone())


def read_values(path: Path) -> dict[str, Any]:
    """As `read_state`, with None in place of each tensor: only the header is read."""
    with safe_open(path, "pt") as file:
        return _unpacked(json.loads(file.metadata()[KEY]), lambda name: None)


def _packed(value: Any, name: str, tensors: dict[str, Tensor], names: dict[tuple[Any, ...], str]) -> Any:
    """The value as JSON knows it; its tensors are put into `tensors`, each once."""
    if isinstance(value, Tensor):
        value = value.detach()
        # The format knows no shared memory: tied weights are one tensor there.
        part = own_part(value)
        place = (part.data_ptr(), value.dtype, tuple(value.shape), value.stride()) if part.numel() else (name,)
        if place not in names:
            names[place] = name
            tensors[name] = value
        return {TENSOR: names[place]}
    if isinstance(value, dict):
        pairs = [[key, _packed(each, f"{name}.{key}", tensors, names)] for key, each in value.items()]
        return dict(pairs) if all(isinstance(key, str) for key in value) else {PAIRS: pairs}
    if isinstance(value, (list, tuple)):
        return [_packed(each, f"{name}.{i}", tensors, names) for i, each in enumerate(value)]
    return value


def _unpacked(value: Any, tensor: Callable[[str], Tensor | None]) -> Any:
    """The inverse of `_packed`; `tensor` gives that of a name."""
    if isinstance(value, list):
        return [_unpacked(each, tensor) for each in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensor(value[TENSOR])
    pairs = value[PAIRS] if PAIRS in value else value.items()
    return {key: _unpacked(each, tensor) for key, each in pairs}
