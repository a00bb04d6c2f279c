"""The plan of `turbodistill distill --vram`: printed before a training begins."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ..trainer.config import Config
from ..trainer.host import Host
from ..trainer.run.estimate import planned, timed
from ..trainer.run.plan import Plan
from ..trainer.run.training import going_on


def print_plan(
    host: Host, config: Config, prompts: Sequence[str], images: Path | None, given: Collection[str], folder: Path
) -> Plan:
    """Settings for a card of `config.vram` GB, printed with what they take of memory, time and disk; as `planned`.

    A training in `folder` goes on with its optimizer.
    """
    config, settled = going_on(config, folder, given)
    found, prepared, measured = planned(host, config, prompts, images, given, settled)
    print(found.in_words())
    if found.fits:
        print(timed(prepared, found.config, found.memory, measured).without_memory())
    return found
