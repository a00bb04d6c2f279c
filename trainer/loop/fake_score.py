"""The fake score (the student's own) for distribution matching: a second LoRA on the teacher's weights.

As in VSD (arXiv 2305.16213, section 3) it needs no second copy of the model; as in DMD (2311.18828)
it learns all the time to denoise what the student makes just now.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import losses
from ...core.student import Student
from ...core.transfer import to_device
from ..config import Config
from .batch import Batch
from .optimizer import adam


class FakeScore:
    """The LoRA, as a denoiser of the student's pictures, and its optimizer."""

    def __init__(self, student: Student, config: Config):
        with torch.random.fork_rng():  # a host's own randomness stays as it was
            torch.manual_seed(config.seed + 1)
            self.denoiser = Student(student.teacher, config.fake_score_rank)
        self.optimizer = adam(self.denoiser.trained, config.lr_fake_score, (0.9, 0.99))

    def loss(self, pictures: Tensor, batch: Batch) -> Tensor:
        """Denoising of the student's `pictures` (B, C, H, W) at levels and with noise of their own."""
        schedule = self.denoiser.schedule
        draws = torch.Generator().manual_seed(batch.seed + 1)
        levels = 0.02 + 0.96 * batch.drawn(lambda shape: torch.rand(shape, generator=draws), pictures.shape[:1])
        drawn = batch.drawn(lambda shape: torch.randn(shape, generator=draws), pictures.shape)
        noise = to_device(drawn, pictures.device)
        sigma = to_device(schedule.sigma(levels * (schedule.timesteps - 1)), pictures.device)
        return losses.denoising(self.denoiser, pictures.detach(), noise, sigma, batch.cond)

    def state_dict(self) -> dict:
        return {"lora": self.denoiser.trained.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved: dict) -> None:
        self.denoiser.trained.load_state_dict(saved["lora"])
        self.optimizer.load_state_dict(saved["optimizer"])
