"""What prompts are conditioned on, encoded once for each distinct prompt and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...core.denoiser import Cond
from ..host import Host
from .files import DataError, OtherRun, check_rows, log, read_tensors, said_of, texts_of, write_tensors
from .stored import StoredCond

SHARD = 64  # prompts in a file
PATTERN = "prompts-*.safetensors"


class Conditioning:
    """The conditioning of `prompts`, encoded in their order, a file at a time, when first asked for.

    `key` says what made them. Files of another key are made again if `replace_others`, else OtherRun is raised;
    so are broken ones.
    """

    def __init__(self, host: Host, prompts: Sequence[str], folder: Path, key: str, replace_others: bool = False):
        self._host, self._folder, self._key, self._replace = host, folder, key, replace_others
        self.prompts = list(dict.fromkeys(prompts))
        self._row = {prompt: row for row, prompt in enumerate(self.prompts)}
        self._parts: list[Cond] = []

    def of(self, prompts: Sequence[str]) -> StoredCond:
        """The conditioning of some of the prompts; raises as `Host.encode_text` does, and OSError."""
        rows = [self._row[prompt] for prompt in prompts]
        while len(self._parts) <= max(rows) // SHARD:
            self._parts.append(self._part(len(self._parts) * SHARD))
        return StoredCond(self._parts, torch.tensor(rows))

    def _part(self, first: int) -> Cond:
        wanted = self.prompts[first : first + SHARD]
        path = self._folder / f"prompts-{first:07d}.safetensors"
        stored, known = self._stored(path)
        if stored is not None and known[: len(wanted)] == wanted:
            return stored
        parts = []
        if stored is not None and known == wanted[: len(known)]:  # more pairs are wanted than before
            parts.append(stored.map(torch.clone))
        del stored  # a file that is mapped cannot be replaced on Windows
        fresh = wanted[len(known) :] if parts else wanted
        parts.append(half(self._host.encode_text(fresh).to("cpu")))
        write_tensors(path, _to_tensors(Cond.cat(parts)), {"key": self._key, "prompts": json.dumps(wanted)})
        return _read(path, self._key)[0]

    def _stored(self, path: Path) -> tuple[Cond | None, list[str]]:
        """What a file holds already, and of which prompts."""
        if not path.exists():
            return None, []
        try:
            return _read(path, self._key)
        except DataError as error:
            if isinstance(error, OtherRun) and not self._replace:
                raise
            log.warning("%s", error)
            return None, []


def read_conditioning(folder: Path, key: str, prompts: Sequence[str]) -> StoredCond:
    """The conditioning of the given prompts, as `Conditioning` has stored it; raises DataError if one is missing."""
    parts: list[Cond] = []
    row: dict[str, int] = {}
    for path in sorted(folder.glob(PATTERN)):
        try:
            cond, texts = _read(path, key)
        except OtherRun:  # left over from other settings
            continue
        parts.append(cond)
        row |= {text: len(row) + i for i, text in enumerate(texts)}
    missing = next((prompt for prompt in prompts if prompt not in row), None)
    if missing is not None:
        raise DataError(
            f"{folder} holds no conditioning of prompt {missing[:80]!r}: run again, only what is missing is made"
        )
    return StoredCond(parts, torch.tensor([row[prompt] for prompt in prompts]))


def half(cond: Cond) -> Cond:
    """Token states and pooled text in half precision, unless one of their numbers is too large for it."""
    pooled = None if cond.pooled is None else _half(cond.pooled)
    extra = {n: _half(v) if v.ndim > 2 and v.is_floating_point() else v for n, v in cond.extra.items()}
    return replace(cond, context=_half(cond.context), pooled=pooled, extra=extra)


def _half(tensor: Tensor) -> Tensor:
    short = tensor.half()
    return short if short.isfinite().all() else tensor


def _to_tensors(cond: Cond) -> dict[str, Tensor]:
    pooled = {} if cond.pooled is None else {"pooled": cond.pooled}
    more = {"extra": cond.extra, "lengths": cond.lengths}
    named = {f"{kind}.{name}": value for kind, values in more.items() for name, value in values.items()}
    return {"context": cond.context} | pooled | named


def _read(path: Path, key: str) -> tuple[Cond, list[str]]:
    tensors, about = read_tensors(path, key)
    named = [(*name.partition(".")[::2], value) for name, value in tensors.items()]
    extra, lengths = ({name: value for kind, name, value in named if kind == of} for of in ("extra", "lengths"))
    with said_of(path):
        context, pooled, prompts = tensors["context"], tensors.get("pooled"), texts_of(about["prompts"])
        check_rows(3, len(prompts), context)
        if pooled is not None:
            check_rows(2, len(prompts), pooled)
        for tokens in lengths.values():
            check_rows(1, len(prompts), tokens)
        return Cond(context, pooled, extra, lengths), prompts
