"""The arithmetic of the passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import amp, nn

from ...core.denoiser import Denoiser
from ...core.exclusive import exclusive
from ...core.precision import cast_once, fast_bfloat16, output_in_float32
from ..config import Config, ConfigError

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def low_precision(config: Config, device: torch.device) -> torch.dtype | None:
    """What passes compute in on this device; None for that of the weights, float32 as a rule.

    `auto` is bfloat16 where the device is fast in it.
    """
    if config.precision == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else None
    return LOW.get(config.precision)


def stored_precision(backbone: nn.Module) -> torch.dtype:
    """What a network's weights are in, by the first of them."""
    return next((p.dtype for p in backbone.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def autocast(config: Config, *denoisers: Denoiser) -> Iterator[None]:
    """Within, passes of these denoisers are in the settings' precision; their eps and v come out in float32.

    Raises ConfigError where this torch has no such precision for the device.
    """
    device = denoisers[0].device
    low = low_precision(config, device)
    with ExitStack() as stack:
        try:
            stack.enter_context(amp.autocast(device.type, low or torch.bfloat16, enabled=low is not None))
        except RuntimeError:  # an older torch knows autocast for some kinds of devices alone, Apple's not among them
            if low is not None:
                raise ConfigError(
                    f"precision is {config.precision!r}, which this torch does not have on {device.type}: use float32"
                ) from None
        for backbone in {id(d.backbone): d.backbone for d in denoisers}.values():
            if low is not None or stored_precision(backbone) in LOW.values():
                stack.enter_context(output_in_float32(backbone))
        yield


@contextmanager
def cast_frozen(config: Config, denoiser: Denoiser) -> Iterator[None]:
    """Within, the denoiser's frozen weights are in the settings' precision, so that `autocast` need not cast them."""
    low = low_precision(config, denoiser.device)
    if low is None:
        yield
        return
    with ExitStack() as stack:
        with exclusive(denoiser.backbone):
            stack.enter_context(cast_once(denoiser.backbone, low))
        try:
            yield
        finally:
            with exclusive(denoiser.backbone):
                stack.close()


@contextmanager
def as_sampled(config: Config, denoiser: Denoiser) -> Iterator[None]:
    """As `autocast`, for pictures as the host makes them: `auto` leaves weights of half precision as they are."""
    if config.precision == "auto" and stored_precision(denoiser.backbone) in LOW.values():
        yield
        return
    with autocast(config, denoiser):
        yield


def grad_scaler(config: Config, device: torch.device, backbone: nn.Module | None = None) -> amp.GradScaler:
    """What keeps float16's small gradients from becoming 0 (arXiv 1710.03740, section 3.2); else it does nothing."""
    computed = low_precision(config, device) or (stored_precision(backbone) if backbone else None)
    enabled = computed == torch.float16
    if not hasattr(amp, "GradScaler"):  # torch before 2.3 has the one for CUDA alone
        return torch.cuda.amp.GradScaler(enabled=enabled)
    return amp.GradScaler(device.type, enabled=enabled)
