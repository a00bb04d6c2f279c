"""Pictures by a student, on whatever model is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..core.denoiser import Cond
from ..core.exclusive import exclusive
from ..core.sampling import seeded_noise
from ..core.schedule import TIMESTEPS
from ..core.student import Student
from ..trainer.config import MOST_SEED
from ..trainer.data.prompts import drawn
from ..trainer.host import Host
from .recipe import FewStepModel

BATCH_SIZE = 16


@torch.no_grad()
def sample_latents(
    host: Host,
    student: Student | FewStepModel,
    cond: Cond,
    seeds: Sequence[int],
    steps: int | None = None,
    **start: Any,
) -> Tensor:
    """Latents (B, C, H, W) of B conditions and as many seeds, by the student as it stands (merged or not).

    `start` is the `picture` and the `strength` of a FewStepModel.
    """
    device = host.denoiser.device
    noise = seeded_noise(seeds, host.latent_shape, device)
    return student.generate(noise, cond.to(device), steps, **start)


def check_numbers(count: int, seed: int = 0, steps: int | None = None, batch_size: int = BATCH_SIZE) -> None:
    """Raise ValueError for numbers with which no `count` pictures can be made."""
    made = 1 if steps is None else steps
    bounds = {"seed": (seed, 0, MOST_SEED), "steps": (made, 1, TIMESTEPS), "batch_size": (batch_size, 1, math.inf)}
    for name, (value, low, high) in bounds.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)  # numpy's are, too
        if not whole or not low <= value <= high:
            upper = "or more" if high == math.inf else f"to {high}"
            raise ValueError(f"{name} is {value!r:.80}: give a whole number, {low} {upper}")
    if seed + count - 1 > MOST_SEED:
        raise ValueError(f"seed is {seed}: of {count} pictures the last would have one above {MOST_SEED}, the largest")


@torch.no_grad()
def sample(
    host: Host,
    student: Student | FewStepModel,
    prompts: Iterable[str],
    seed: int = 0,
    steps: int | None = None,
    batch_size: int = BATCH_SIZE,
    **start: Any,
) -> Iterator[Tensor]:
    """Pictures (3, height, width) in [0, 1] on the CPU, one a prompt in their order; prompt k has seed `seed + k`.

    A student takes one step where no `steps` are given; one of `guidance_only`, and a FewStepModel, as many as it was
    made for. A FewStepModel takes the latents (1, C, H, W) of a `picture` to begin from, with a `strength`.

    A picture depends on its prompt and seed alone, not on the batch: of {red|blue} in a prompt its seed draws one. The
    model is as before between two pictures; threads that sample or distil the same model wait for each other. Raises
    ValueError for numbers out of bounds, for more steps than the student was trained for, for prompts that are none,
    and for a student that is on another model than `host`.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is {prompts[:80]!r}: give a list of prompts")
    prompts = list(prompts)
    check_numbers(len(prompts), seed, steps, batch_size)
    _check_base(host, student)
    if isinstance(student, Student):
        if start:
            raise ValueError(f"a student is sampled without {', '.join(start)}: leave it out; size is load_model's")
        if student.trained_steps and steps and steps > student.trained_steps:
            raise ValueError(f"steps is {steps}: the student was trained for {student.trained_steps} at most")
    prompts = drawn(prompts, range(seed, seed + len(prompts)))
    for first in range(0, len(prompts), batch_size):
        texts = prompts[first : first + batch_size]
        seeds = range(seed + first, seed + first + len(texts))
        with exclusive(host.denoiser.backbone):
            # A student's LoRA stays beside the weights: for a batch or two, merging takes longer than it saves, and its
            # copy of the weights doubles the memory.
            with student.merged() if isinstance(student, FewStepModel) else nullcontext():
                latents = sample_latents(host, student, host.encode_text(texts), seeds, steps, **start)
            pictures = host.decode(latents).cpu()
        yield from pictures


def _check_base(host: Host, student: Student | FewStepModel) -> None:
    """Raise ValueError for a student that is on another model: its base's pass, with this one's texts and decoder."""
    made = student.denoiser if isinstance(student, FewStepModel) else student
    base = made.teacher if isinstance(made, Student) else made
    if base.backbone is not host.denoiser.backbone:
        raise ValueError(
            f"the student is on another model than {host.name}, which is given: load its file on this one with "
            "load_student(path, model), which says whether it fits"
        )
