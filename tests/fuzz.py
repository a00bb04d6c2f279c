"""Odd input by a seed, and the rule for whatever takes it: it ends in a value or in an error of ours, in words."""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

TRIES = int(os.environ.get("FUZZ", "1500"))  # inputs of all together, about
MEMORY = 2 << 30  # bytes that they may take
ODD = [
    "", "\0", "\u2028", "\ufeff", "\ud800", "NaN", "1e999", "-1", "9" * 400, "9" * 5000, "null", "true", "[" * 3000,
    "{}", "..", "~", "~no-such-user/x", "/dev/null", "a" * 5000, "<b>&\"'", "{a|", "%s{0}", "\r\n", "con", "-0.0",
]  # fmt: skip
VALUES = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, -(2**64), 10**400, 1.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), [], {}, [[]], [None], {"a": 1}, *ODD,
]  # fmt: skip


def bytes_of(draws: random.Random, sample: bytes) -> bytes:
    """Something like `sample`: bytes changed, cut, doubled or put in between."""
    raw = bytearray(sample)
    for _ in range(draws.randint(1, 6)):
        at = draws.randint(0, len(raw))
        kind = draws.randrange(4)
        if kind == 0 and at < len(raw):
            raw[at] = draws.randrange(256)
        elif kind == 1:
            del raw[at : at + draws.choice((1, 8, 200))]
        elif kind == 2:
            raw[at:at] = draws.choice(ODD).encode("utf-8", "surrogatepass")
        else:
            raw[at:at] = raw[max(at - draws.choice((1, 8, 64)), 0) : at]
    return bytes(raw)


def values_of(draws: random.Random, sample: dict[str, Any], odd: float = 0.2) -> dict[str, Any]:
    """A record like `sample`: values of other kinds, also further in, keys that are gone or new."""
    made = copy.deepcopy(sample)
    for _ in range(draws.randint(1, 3)):
        name = draws.choice([*made, "nobody_knows"])
        if isinstance(made.get(name), dict) and draws.random() < 0.7:
            made[name] = values_of(draws, made[name], odd)
        elif draws.random() < odd:
            made.pop(name, None)
        else:
            made[name] = draws.choice(VALUES)
    return made


def tensors_of(draws: random.Random, sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors like `sample`: of other shapes and kinds, some gone, some new."""
    made = dict(sample)
    for _ in range(draws.randint(0, 2)):
        name = draws.choice([*made, "other"])
        if draws.random() < 0.3:
            made.pop(name, None)
        else:
            shape = [draws.choice((0, 1, 2, 3)) for _ in range(draws.randrange(6))]
            made[name] = torch.zeros(shape, dtype=draws.choice((torch.half, torch.float, torch.int64, torch.bool)))
    return made or {"other": torch.zeros(1)}


@contextmanager
def bounded(memory: int = MEMORY) -> Iterator[None]:
    """Within, this process cannot take more than so much memory beyond what it has; where the system knows bounds."""
    if resource is None or not Path("/proc/self/statm").exists():
        yield
        return
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def endures(
    parse: Callable[..., Any], tries: int, ours: tuple[type[Exception], ...], *given: Any, fresh: Path | None = None
) -> int:
    """How many of so many odd inputs `parse(draws, *given)` refuses, all of them by an error of ours, in words.

    `fresh` is a folder that is empty before each. None may take more than ten seconds of the processor, or MEMORY.
    """
    refused = 0
    with bounded():
        for k in range(tries):
            draws, began = random.Random(f"{parse.__name__} {k}"), time.process_time()
            for path in sorted(fresh.rglob("*"), reverse=True) if fresh else ():
                path.unlink() if path.is_file() else path.rmdir()
            try:
                parse(draws, *given)
            except ours as error:
                refused += 1
                words = str(error)
                assert 5 < len(words) < 1500 and " " in words, f"input {k} of {parse.__name__}: {words[:200]}"
            except Exception as error:
                pytest.fail(f"input {k} of {parse.__name__} ends in {type(error).__name__}: {str(error)[:300]}")
            assert time.process_time() - began < 10, f"input {k} of {parse.__name__} takes too long"
    return refused
