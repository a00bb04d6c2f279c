"""The vision transformer that judges decoded pictures: the one that comes with the clone, or one of your own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

EMBEDDED = "embedded"
FOLDER = Path(__file__).parents[1] / "demo" / "vision"


def load_vision(name: str) -> tuple[nn.Module, int]:
    """A frozen vision transformer in float32, and the side of its patches in pixels.

    `name` is "embedded", a folder in transformers' layout, or a hub's name. Raises ValueError for one
    that cannot be had, or that has no patches.
    """
    try:
        from transformers import AutoModel

        network = AutoModel.from_pretrained(FOLDER if name == EMBEDDED else name, dtype=torch.float32)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"vision is {name!r}, which cannot be loaded: {error}") from None
    patch = getattr(network.config, "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(f"vision is {name!r}, a {type(network).__name__} without patches: use a vision transformer")
    return network, patch
