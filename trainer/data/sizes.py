"""Several sizes of pictures in one training: each has teacher pairs of its own, and a batch is of one size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..host import Host
from ..sizes import sizes_of
from .files import DataError
from .found import Found
from .images import shape_of


@dataclass(frozen=True)
class OfSize:
    """The share of a training that is of one size: its host, settings and prompts, and where its pairs lie."""

    host: Host
    config: Config
    prompts: Sequence[str]
    folder: Path


def by_size(host: Host, config: Config, prompts: Sequence[str], folder: Path) -> list[OfSize]:
    """The shares of all sizes that the settings name; a training of the host's own size is one share.

    Each has as many pairs, and begins at another of the prompts, wherever more pairs may end later. Raises ValueError
    for a size that this model cannot make.
    """
    sizes = sizes_of(config.sizes)
    if not sizes:
        return [OfSize(host, config, prompts, folder)]
    shares: list[OfSize] = []
    for i, (width, height) in enumerate(sizes):
        count = config.pairs // len(sizes) + (i < config.pairs % len(sizes))
        begin = i * len(prompts) // len(sizes)
        own = config.replace(sizes="", pairs=count)
        place = folder / f"{width}x{height}" if len(sizes) > 1 else folder
        turned = [*prompts[begin:], *prompts[:begin]]
        shares.append(OfSize(host.sized(width, height), own, turned, place))
    return shares


def pictures_by_size(found: Found, sizes: Sequence[tuple[int, int]]) -> list[Found]:
    """Pictures of one's own, each among those of the size whose shape is nearest to its own.

    One that cannot be read counts as the first size's, where it is told when it is encoded.
    """
    parts = [Found(found.place) for _ in sizes]
    for picture in found.pictures:
        try:
            width, height = shape_of(picture) if len(sizes) > 1 else sizes[0]
        except DataError:
            width, height = sizes[0]
        shapes = [abs(math.log(width * other[1] / height / other[0])) for other in sizes]
        parts[shapes.index(min(shapes))].pictures.append(picture)
    return parts
