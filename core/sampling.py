"""One-step and few-step samplers, and the two that a teacher needs, in k-diffusion's signature.

`sample_x(model, x, sigmas, extra_args=None, callback=None, disable=None)`: `model(x, sigma)` gives
x0, `x` (B, C, H, W) is noise already at `sigmas[0]`, `sigmas` (n + 1,) falls to 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy
import torch
from torch import Tensor

from .schedule import Schedule, expand, trailing_timesteps
from .transfer import to_device


def sigmas_of(schedule: Schedule, timesteps: Sequence[float]) -> Tensor:
    """Timesteps, falling -> sigmas (n + 1,) with the final 0."""
    return torch.cat([schedule.sigma(torch.tensor(timesteps, dtype=torch.float64)), torch.zeros(1)])


def sigmas_at(table: Tensor, timesteps: Sequence[int]) -> Tensor:
    """Sigmas (n + 1,) of a host's own rising table, of any length, at timesteps of 1000, with the final 0."""
    rows = [max(round((t + 1) * len(table) / 1000) - 1, 0) for t in timesteps]
    return torch.cat([table[rows].float().cpu(), torch.zeros(1)])


def trailing_sigmas(schedule: Schedule, steps: int, start: int | None = None) -> Tensor:
    """Sigmas (steps + 1,) of trailing timesteps; for Stable Diffusion in one step [14.6146, 0]."""
    last = schedule.timesteps - 1
    return sigmas_of(schedule, trailing_timesteps(steps, last if start is None else start, schedule.timesteps))


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal (B, *shape), row k from seed k alone: a batch equals its single seeds, on any device."""
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
    return to_device(torch.stack(rows), torch.device(device))


def row_noise(x: Tensor) -> Callable[[int], Tensor]:
    """Fresh noise for each later step, `noise(i)` like x (B, ...), told by the signs of x's own rows.

    So an item of a batch is given the noise that it is given alone, and whoever begins with the same
    noise, at whatever scale and in whatever host, goes on with the same.
    """
    seeds: list[int] = []

    def noise(i: int) -> Tensor:
        if not seeds:  # once: a device is waited for
            signs = numpy.packbits(x.detach().gt(0).flatten(1).cpu().numpy(), axis=1)
            seeds.extend(int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:7], "big") for row in signs)
        return seeded_noise([seed + i for seed in seeds], x.shape[1:], x.device).to(x)

    return noise


def _levels(x: Tensor, sigmas: Tensor) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
    """The number of each step, its level and the next as (B,) tensors, and whether that is 0.

    A device is asked for its levels once: no step waits for it.
    """
    ends = [level == 0 for level in sigmas.tolist()]
    levels, ones = to_device(sigmas.to(x.dtype), x.device), x.new_ones(x.shape[0])
    for i in range(len(ends) - 1):
        yield i, levels[i] * ones, levels[i + 1] * ones, ends[i + 1]


def _report(callback: Callable | None, x: Tensor, i: int, sigma: Tensor, denoised: Tensor) -> None:
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma[0], "sigma_hat": sigma[0], "denoised": denoised})


def sample_few_step(model, x, sigmas, extra_args=None, callback=None, disable=None, schedule=None, noise=None):
    """Denoise to x0 and add fresh noise for the next level (ADD, section 4; consistency sampling).

    With one step this is `sample_one_step`. `schedule` is the model's own if not given; `noise(i)`
    draws the noise that follows step i, by default `row_noise`.
    """
    schedule = schedule or model.schedule
    noise = noise or row_noise(x)
    for i, sigma, following, last in _levels(x, sigmas):
        denoised = model(x, sigma, **(extra_args or {}))
        _report(callback, x, i, sigma, denoised)
        x = denoised
        if not last:
            x = schedule.add_noise(denoised, noise(i), following)
    return x


def sample_one_step(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """One pass at the first sigma: its x0 is the picture."""
    sigma = to_device(sigmas[0].to(x.dtype), x.device) * x.new_ones(x.shape[0])
    denoised = model(x, sigma, **(extra_args or {}))
    _report(callback, x, 0, sigma, denoised)
    return denoised


def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler's method on the probability-flow ODE (arXiv 2206.00364, algorithm 2 without churn); DDIM's step."""
    for i, sigma, following, _ in _levels(x, sigmas):
        denoised = model(x, sigma, **(extra_args or {}))
        _report(callback, x, i, sigma, denoised)
        x = x + (x - denoised) / expand(sigma, x) * expand(following - sigma, x)
    return x


def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), for variance-preserving models."""
    previous, last_step = None, x.new_ones(1)
    for i, sigma, following, last in _levels(x, sigmas):
        denoised = model(x, sigma, **(extra_args or {}))
        _report(callback, x, i, sigma, denoised)
        if last:
            return denoised
        step = (sigma / following).log()
        target = denoised
        if previous is not None:
            ratio = expand(step / last_step, x) / 2
            target = (1 + ratio) * denoised - ratio * previous
        x = expand(following / sigma, x) * x - expand(torch.expm1(-step), x) * target
        previous, last_step = denoised, step
    return x


TEACHER_SAMPLERS: dict[str, Callable] = {"euler": sample_euler, "dpmpp_2m": sample_dpmpp_2m}
