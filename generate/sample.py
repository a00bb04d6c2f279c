"""Pictures by a student, on whatever model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core.denoiser import Cond
from ..core.exclusive import exclusive
from ..core.sampling import seeded_noise
from ..core.student import Student
from ..trainer.data.prompts import check_texts
from ..trainer.host import Host
from .recipe import FewStepModel

BATCH_SIZE = 16


@torch.no_grad()
def sample_latents(
    host: Host, student: Student | FewStepModel, cond: Cond, seeds: Sequence[int], steps: int = 1, **start: Any
) -> Tensor:
    """Latents (B, C, H, W) of B conditions and as many seeds, by the student as it stands (merged or not).

    `start` is the `picture` and the `strength` of a FewStepModel.
    """
    device = host.denoiser.device
    noise = seeded_noise(seeds, host.latent_shape, device)
    return student.generate(noise, cond.to(device), steps, **start)


@torch.no_grad()
def sample(
    host: Host,
    student: Student | FewStepModel,
    prompts: Sequence[str],
    seed: int = 0,
    steps: int = 1,
    batch_size: int = BATCH_SIZE,
    **start: Any,
) -> Iterator[Tensor]:
    """Pictures (3, height, width) in [0, 1] on the CPU, one a prompt in their order; prompt k has seed `seed + k`.

    A FewStepModel takes the latents (1, C, H, W) of a `picture` to begin from, with a `strength`.

    A picture depends on its prompt and seed alone, not on the batch. The model is as before between two pictures;
    threads that sample or distil the same model wait for each other.
    Raises ValueError for steps or a batch size below 1, for a text in place of a list, and for one that is no text.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is {prompts[:80]!r}: give a list of prompts")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps is {steps} and batch_size {batch_size}: give at least 1")
    check_texts(prompts)
    for first in range(0, len(prompts), batch_size):
        texts = list(prompts[first : first + batch_size])
        seeds = range(seed + first, seed + first + len(texts))
        with exclusive(host.denoiser.backbone):
            # A student's LoRA stays beside the weights: for a batch or two, merging takes longer than it saves, and its
            # copy of the weights doubles the memory.
            with student.merged() if isinstance(student, FewStepModel) else nullcontext():
                latents = sample_latents(host, student, host.encode_text(texts), seeds, steps, **start)
            pictures = host.decode(latents).cpu()
        yield from pictures
