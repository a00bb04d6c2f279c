"""A pipeline's autoencoder between pictures and the latents that its network takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...core.decoder import decoded_at_once


class Autoencoder:
    """Any of diffusers' autoencoders of pictures, and those of video for one frame; `vae` stays as it is.

    Stable Diffusion XL's does not fit into float16 (`force_upcast`): a copy in float32 computes in its place.
    """

    def __init__(self, vae: Any):
        self.vae, self._copy = vae, None

    @property
    def networks(self) -> list[Any]:
        """The autoencoder, and its copy where there is one."""
        return [self.vae] if self._copy is None else [self.vae, self._copy]

    @property
    def network(self) -> Any:
        """What computes."""
        if self.vae.dtype != torch.float16 or not getattr(self.vae.config, "force_upcast", False):
            return self.vae
        if self._copy is None:
            self._copy = copy.deepcopy(self.vae).float()
        return self._copy

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Latents (B, C, H, W) -> pictures (B, 3, height, width) about [0, 1], float32, with gradients."""
        vae = self.network
        mean, spread, scale = _statistics(vae)
        z = latents.to(vae.device, vae.dtype) * spread / scale + mean
        with _frozen(vae):
            images = [self._decode(vae, chunk) for chunk in z.split(decoded_at_once(size))]
        return torch.cat(images).float() / 2 + 0.5

    @staticmethod
    def _decode(vae: Any, z: Tensor) -> Tensor:
        found = vae.decode(z.unsqueeze(2) if _has_frames(vae) else z, return_dict=False)[0]
        return found[:, :, 0] if _has_frames(vae) else found

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, height, width) in [0, 1] -> latents (B, C, H, W), each the mean."""
        vae = self.network
        x = images.to(vae.device, vae.dtype) * 2 - 1
        with _frozen(vae):
            found = vae.encode(x.unsqueeze(2) if _has_frames(vae) else x, return_dict=False)[0]
        z = found.mode() if hasattr(found, "mode") and not isinstance(found, Tensor) else found
        z = z[:, :, 0] if _has_frames(vae) else z
        mean, spread, scale = _statistics(vae)
        return (z - mean) * scale / spread


def _statistics(vae: Any) -> tuple[Tensor | float, Tensor | float, float]:
    """Mean and spread of an autoencoder's own latents, and the factor that its network's latents have besides."""
    mean, spread = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
    scale = getattr(vae.config, "scaling_factor", None) or 1.0
    if mean is None or spread is None:
        return getattr(vae.config, "shift_factor", None) or 0.0, 1.0, scale
    return _by_channel(mean, vae), _by_channel(spread, vae), scale


def _by_channel(values: Any, vae: Any) -> Tensor:
    return torch.tensor(values, device=vae.device, dtype=vae.dtype).reshape(1, -1, 1, 1)


def _has_frames(vae: Any) -> bool:
    """Whether it is one of video, whose latents have a dimension of time."""
    return hasattr(vae.config, "temperal_downsample")


@contextmanager
def _frozen(vae: Any) -> Iterator[None]:
    """Within, no weight of the autoencoder takes a gradient, and its maps keep their order; all is put back.

    The attention of its decoder leaves the channels last: a CPU's group norm is slow backwards then, above all in
    bfloat16.
    """
    flags = [(p, p.requires_grad) for p in vae.parameters()]
    middle = getattr(getattr(vae, "decoder", None), "mid_block", None)
    hook = middle and middle.register_forward_hook(
        lambda _module, _args, maps: maps.contiguous() if isinstance(maps, Tensor) else None
    )
    modes = [(m, m.training) for m in vae.modules() if m.training]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for m, _ in modes:
            m.training = False
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for m, mode in modes:
            m.training = mode
        if hook:
            hook.remove()
