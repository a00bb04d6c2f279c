"""ComfyUI's CLIP_VISION (CLIP, SigLIP, DINO) as what judges a student's pictures."""

from __future__ import annotations

import torch
from torch import nn

from ...core.card import fingerprint
from ...core.decoder import frozen_copy
from ...core.vision import Eye


def eye_name(clip_vision) -> str:
    """What a run calls it: other weights are another one."""
    kind = getattr(clip_vision, "model_type", type(clip_vision.model).__name__)
    return f"CLIP Vision {kind} {fingerprint(clip_vision.model)[:12]}"


def eye_of(clip_vision, device: torch.device) -> Eye:
    """A frozen copy of its network with gradients, which sees squares of one size, as in ComfyUI.

    Raises ValueError for a network that has no square patches.
    """
    first = next((m for m in clip_vision.model.modules() if isinstance(m, nn.Conv2d)), None)
    patch = first.kernel_size[0] if first else 0
    side = clip_vision.image_size
    if not patch or not isinstance(side, int) or side % patch or patch != getattr(first, "stride", (0,))[0]:
        raise ValueError(
            f"this CLIP_VISION is a {type(clip_vision.model).__name__}, which sees no squares of one size in patches: "
            "connect CLIP's, SigLIP's or DINO's"
        )
    network = frozen_copy(clip_vision.model, device)
    for norm in (m for m in network.modules() if isinstance(m, nn.LayerNorm)):  # blocks add to what these keep
        norm.register_forward_pre_hook(lambda _norm, args: (args[0].clone(), *args[1:]))
    return Eye(network, patch, clip_vision.image_mean, clip_vision.image_std, side, square=True)
