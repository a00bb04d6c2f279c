"""The arithmetic of the passes."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import amp

from ...core.precision import fast_bfloat16
from ..config import Config


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """The arithmetic of the passes: `auto` is bfloat16 where the device is fast in it."""
    low = fast_bfloat16(device) if config.precision == "auto" else config.precision == "bfloat16"
    return amp.autocast(device.type, torch.bfloat16, enabled=low)
