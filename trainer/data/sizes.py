"""Several sizes of pictures in one training: each has teacher pairs of its own, and a batch is of one size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..host import Host
from ..sizes import BUCKETS, size_in_words, sizes_of
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


def with_buckets(config: Config, found: Found | None, resolution: tuple[int, int]) -> Config:
    """The settings with the sizes that the pictures fit, of the area of `resolution`, where they ask for buckets.

    As in aspect ratio bucketing: sides are multiples of 64 (of 8 for small pictures), no side is more than twice the
    other. The eight most frequent shapes count, but those that less than a twentieth of the pictures have only where
    there is no other. Pictures that cannot be read are told when they are encoded.
    """
    if config.sizes != BUCKETS or found is None:
        return config
    area = math.prod(resolution)
    step = 64 if area >= 512**2 else 8
    sides = range(step, math.isqrt(2 * area) + 1, step)
    shapes = [(width, height) for width in sides if (height := area // width // step * step) in sides]
    fitting: Counter[tuple[int, int]] = Counter()
    for picture in found.pictures:
        with suppress(DataError):
            fitting[_nearest(shape_of(picture), shapes)] += 1
    frequent = [shape for shape, count in fitting.most_common(8) if count * 20 >= fitting.total()]
    return config.replace(sizes=size_in_words(sorted(frequent or [shape for shape, _ in fitting.most_common(8)])))


def _nearest(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The shape whose proportion is nearest to that of `size`, the first of equals."""
    width, height = size
    return min(shapes, key=lambda other: abs(math.log(width * other[1] / height / other[0])))


def pictures_by_size(found: Found, sizes: Sequence[tuple[int, int]]) -> list[Found]:
    """Pictures of one's own, each among those of the size whose shape is nearest to its own.

    One that cannot be read counts as the first size's, where it is told when it is encoded.
    """
    parts = [Found(found.place) for _ in sizes]
    for picture in found.pictures:
        try:
            nearest = _nearest(shape_of(picture), sizes) if len(sizes) > 1 else sizes[0]
        except DataError:
            nearest = sizes[0]
        parts[sizes.index(nearest)].pictures.append(picture)
    return parts
