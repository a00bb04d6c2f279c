"""Power-function averages of weights, and averages of any length put together afterwards (EDM2, arXiv 2312.02696).

A usual EMA remembers a fixed number of updates, whatever the training's length. A power-function average remembers a
fixed share of it: its standard deviation `std`, relative to the updates so far. Two are tracked in training and kept
now and then; the average of another `std` is a weighted sum of those kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TRACKED = (0.05, 0.10)  # the paper's; they reconstruct what lies between .05 and .25 well


def exponent(std: float) -> float:
    """The exponent gamma of the averaging profile t^gamma whose relative standard deviation is `std`.

    The positive root of gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + 12 - std^-2 (equation 126 of EDM2).
    Raises ValueError for a width that no exponent has.
    """
    if not 0 < std < 12**-0.5:
        raise ValueError(f"an average's relative width must lie between 0 and {12**-0.5:.3f}, not at {std}")
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots.real.max())


def keep_of(std: float, step: int) -> float:
    """The share of the old average that stays at update `step` (from 1): (1 - 1 / t)^(gamma + 1) (equation 127)."""
    return (1 - 1 / step) ** (exponent(std) + 1)


def profile_products(a: Sequence[tuple[int, float]], b: Sequence[tuple[int, float]]) -> np.ndarray:
    """Inner products of averaging profiles, (len(a), len(b)); each is (updates, std) (section C.3 of EDM2)."""
    time_a, time_b = (np.array([[t for t, _ in side]], dtype=float) for side in (a, b))
    power_a, power_b = (np.array([[exponent(s) for _, s in side]], dtype=float) for side in (a, b))
    time_a, power_a = time_a.T, power_a.T
    # The shorter of the two profiles ends first; from there on the product is nought.
    ratio = np.where(time_a < time_b, (time_a / time_b) ** power_b, (time_b / time_a) ** power_a)
    return (power_a + 1) * (power_b + 1) / ((power_a + power_b + 1) * np.maximum(time_a, time_b)) * ratio


def solve(kept: Sequence[tuple[int, float]], updates: int, std: float) -> np.ndarray:
    """Weights (len(kept),) of the kept averages whose sum is nearest to the average of `std` after `updates`."""
    return np.linalg.lstsq(profile_products(kept, kept), profile_products(kept, [(updates, std)])[:, 0], rcond=1e-10)[0]


def write(folder: Path, step: int, averages: dict[float, dict[str, Tensor]]) -> None:
    """Keep the tracked averages of one step, a float16 file each, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for std, weights in averages.items():
        path = folder / f"{step:08d}-{std:.3f}.safetensors"
        part = path.with_suffix(".part")
        save_file({k: v.half().contiguous().cpu() for k, v in weights.items()}, part)
        part.replace(path)


def saved_files(folders: Iterable[Path], until: int) -> dict[tuple[int, float], Path]:
    """The averages that were kept up to update `until`, by (update, std)."""
    found = {}
    for path in (p for folder in folders for p in folder.glob("*-*.safetensors")):
        step, std = path.stem.split("-")
        if int(step) <= until:
            found[int(step), float(std)] = path
    return dict(sorted(found.items()))


def average(files: dict[tuple[int, float], Path], updates: int, std: float) -> dict[str, Tensor]:
    """The average of relative width `std` after `updates`, float32, from those kept. Raises ValueError for none."""
    if not files:
        raise ValueError("no average has been kept yet: train for longer")
    profiles = list(files)
    total: dict[str, Tensor] = {}
    for share, path in zip(solve(profiles, updates, std), files.values(), strict=True):
        if abs(share) < 1e-6:
            continue
        for name, value in load_file(path).items():
            total[name] = total.get(name, torch.zeros(())) + float(share) * value.float()
    return total
