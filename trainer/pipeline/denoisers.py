"""A pipeline's networks as core's Denoiser: one small adapter for each architecture."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.denoiser import Cond, Denoiser
from ...core.schedule import DiscreteSchedule, expand


class UNetDenoiser(Denoiser):
    """A diffusers UNet that predicts eps or v on a discrete schedule, as a Denoiser."""

    def __init__(self, unet, schedule: DiscreteSchedule, prediction: str):
        self.backbone, self.schedule, self.prediction = unet, schedule, prediction
        self.dtype: torch.dtype = unet.dtype

    def output(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        alpha, _ = self.schedule.alpha_sigma(sigma)
        t = self.schedule.timestep(sigma)
        added = cond.extra | ({"text_embeds": cond.pooled} if cond.pooled is not None else {})
        return self.backbone(
            (expand(alpha, x) * x).to(self.dtype), t, cond.context.to(self.dtype), added_cond_kwargs=added or None
        ).sample

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self.schedule.to_x0(self.prediction, x, self.output(x, sigma, cond).to(x.dtype), sigma)
