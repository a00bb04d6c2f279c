"""Sizes of pictures in pixels, as settings name them."""

from __future__ import annotations

import re

from .setting import ConfigError

SMALLEST, LARGEST = 16, 4096  # pixels of a side
MOST_SIZES = 16
BUCKETS = "buckets"  # in place of sizes: those that the pictures of an image folder fit


def check_size(width: int, height: int) -> None:
    """Raise ConfigError for a size in pixels that no model here can make."""
    for name, side in (("width", width), ("height", height)):
        if not SMALLEST <= side <= LARGEST or side % 8:
            raise ConfigError(f"{name} is {side}: give a multiple of 8 from {SMALLEST} to {LARGEST}")


def sizes_of(text: str) -> list[tuple[int, int]]:
    """Width and height of each size in "1024x1024, 832x1216", each once; raises ConfigError for one that cannot be."""
    if text.strip() == BUCKETS:
        raise ConfigError("sizes is 'buckets', which takes them from an image folder, and there is none: write them")
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        sides = re.fullmatch(r"(\d{1,6}) ?[xX×] ?(\d{1,6})", part)
        if not sides:
            raise ConfigError(f"sizes has {part!r:.40}: write width x height, such as 1024x1024, 832x1216")
        width, height = map(int, sides.groups())
        check_size(width, height)
        found.append((width, height))
    found = list(dict.fromkeys(found))
    if len(found) > MOST_SIZES:
        raise ConfigError(f"sizes has {len(found)}: give at most {MOST_SIZES}")
    return found


def size_in_words(sizes: list[tuple[int, int]]) -> str:
    """Sizes as settings name them."""
    return ", ".join(f"{width}x{height}" for width, height in sizes)
