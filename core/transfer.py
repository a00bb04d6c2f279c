"""Copies to the device that do not wait for it, so that it is never idle."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """The tensor in the computer's memory; of a device's, a copy that is there once the device has come so far.

    Only `to_device` may read it before that.
    """
    return tensor.to("cpu", non_blocking=tensor.device.type == "cuda")  # others do not keep the order


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. To a CUDA device it goes by pinned memory, in the background."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
