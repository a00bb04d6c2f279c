"""The arithmetic of the passes: bfloat16 where the device is fast in it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import amp

from .config import Config


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """The arithmetic of the passes: `auto` is bfloat16 where the device is fast in it."""
    if config.precision == "auto":
        low = torch.cuda.is_bf16_supported() if device.type == "cuda" else fast_bfloat16_cpu()
    else:
        low = config.precision == "bfloat16"
    return amp.autocast(device.type, torch.bfloat16, enabled=low)


def fast_bfloat16_cpu() -> bool:
    """Whether this CPU has bfloat16 instructions; without them bfloat16 is slower than float32."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())
