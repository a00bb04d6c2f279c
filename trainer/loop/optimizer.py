"""The optimizer of everything that is trained."""

from __future__ import annotations

import torch
from torch import nn


def adam(module: nn.Module, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW without weight decay, as one kernel where torch has that for the device: several times as fast."""
    parameters = list(module.parameters())
    try:
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0, fused=True)
    except RuntimeError:  # an older torch, or a device without it
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0)


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step can be left out on the device, by `found_inf`, without asking it, as fused kernels do."""
    return bool(optimizer.defaults.get("fused"))
