"""How frames hang together: flicker beside sharpness, since a cross-fade has neither flicker nor detail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import high_frequencies


@dataclass(frozen=True)
class Temporal:
    """Measures of one film of frames between two ends.

    `flicker` is the mean second difference of pixels, x 1000, over the frames between; `feature_flicker` that of a
    network's features. `sharpness` is the power in high frequencies of the middle third over that of the ends: below 1
    it ghosts. `ends` is the mean difference of the first and last frame from the given pictures, x 1000.
    """

    flicker: float
    feature_flicker: float
    sharpness: float
    ends: float


def second_difference(x: Tensor) -> float:
    """Mean of |x[t + 1] - 2 x[t] + x[t - 1]| over frames (T, ...), T at least 3: 0 where all moves evenly."""
    return float((x[2:] - 2 * x[1:-1] + x[:-2]).abs().mean())


def temporal(frames: Tensor, features: Tensor, first: Tensor, last: Tensor) -> Temporal:
    """The measures of frames (T, 3, H, W) in [0, 1] with features (T, d), made between two pictures (3, H, W).

    Raises ValueError for fewer than five frames.
    """
    count = len(frames)
    if count < 5:
        raise ValueError(f"there are {count} frames: give five or more, of which the middle is measured")
    middle = frames[count // 3 : count - count // 3]
    ends = torch.stack([first, last])
    apart = torch.stack([frames[0] - first, frames[-1] - last]).abs().mean()
    return Temporal(
        1000 * second_difference(frames[1:-1]),
        second_difference(features[1:-1]),
        high_frequencies(middle) / max(high_frequencies(ends), 1e-9),
        1000 * float(apart),
    )
