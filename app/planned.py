"""The plan of `turbodistill distill --vram`: printed before a training begins."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ..trainer.config import Config
from ..trainer.host import Host
from ..trainer.loop.optimizer import has_eight_bits
from ..trainer.run.estimate import Prepared, needs, timed
from ..trainer.run.memory import GB
from ..trainer.run.plan import Plan, check_full, plan


def planned(
    host: Host, config: Config, prompts: Sequence[str], images: Path | None, vram: float, given: Collection[str]
) -> Plan:
    """Settings for a card of `vram` GB, printed with what they take of memory, time and disk.

    Raises ConfigError for a full copy that no settings make fit, DataError as `estimate`.
    """
    card, eight_bits = int(vram * GB), has_eight_bits()
    if config.rank == 0:
        check_full(host.denoiser.backbone, config, card, eight_bits and "optimizer" not in given)
    prepared = Prepared.of(host, config, prompts, images)
    measured = needs(prepared)
    found = plan(measured, prepared.config, card, given, eight_bit_moments=eight_bits)
    print(found.in_words())
    if found.fits:
        print(timed(prepared, found.config, found.memory, measured).without_memory())
    return found
