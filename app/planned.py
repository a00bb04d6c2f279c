"""The plan of `turbodistill distill --vram`: printed before a training begins."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ..trainer.config import Config
from ..trainer.host import Host
from ..trainer.run.estimate import planned, timed
from ..trainer.run.plan import Plan


def print_plan(host: Host, config: Config, prompts: Sequence[str], images: Path | None, given: Collection[str]) -> Plan:
    """Settings for a card of `config.vram` GB, printed with what they take of memory, time and disk; as `planned`."""
    found, prepared, measured = planned(host, config, prompts, images, given)
    print(found.in_words())
    if found.fits:
        print(timed(prepared, found.config, found.memory, measured).without_memory())
    return found
