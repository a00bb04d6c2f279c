"""Light heads on frozen features, conditioned on text, noise level and, where there is one, an image.

Independent heads per tapped block as in LADD, projection conditioning as in StyleGAN-T and ADD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d, Linear, SiLU
from torch.nn.utils.parametrizations import spectral_norm


def noise_embedding(sigma: Tensor, dim: int = 32) -> Tensor:
    """Sigma (B,) -> sines and cosines of log(sigma) / 4 (B, dim), as EDM feeds noise levels."""
    level = sigma.float().clamp(min=1e-4).log().div(4).unsqueeze(1)
    frequencies = torch.exp(torch.linspace(0, math.log(16), dim // 2, device=sigma.device))
    return torch.cat([(level * frequencies).sin(), (level * frequencies).cos()], 1)


class Head(nn.Module):
    """Feature map (B, C, H, W) and condition (B, E) -> one logit a position (B, H W)."""

    def __init__(self, channels: int, condition: int, width: int):
        super().__init__()
        self.inner = spectral_norm(Conv2d(channels, width, 1))
        self.residual = spectral_norm(Conv2d(width, width, 3, padding=1))
        self.project = Linear(condition, width)
        self.out = spectral_norm(Conv2d(width, 1, 1))

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        h = F.leaky_relu(self.inner(features), 0.2)
        h = (h + F.leaky_relu(self.residual(h), 0.2)) * math.sqrt(0.5)
        matched = (h * self.project(condition)[:, :, None, None]).sum(1, keepdim=True) / math.sqrt(h.shape[1])
        return (self.out(h) + matched).flatten(1)


class Discriminator(nn.Module):
    """One head per feature map; `forward` gives a list of K logits (B, N_k).

    `channels` are the K maps' channels; `text` and `image` the sizes of the condition vectors, 0 for
    none. Features are standardised per channel by statistics of the first real batch, so that no
    head starts saturated, whatever the scale of the teacher's activations.
    """

    def __init__(self, channels: Sequence[int], text: int, image: int = 0, width: int = 64):
        super().__init__()
        self.text, self.image = text, image
        embedded = 128
        self.condition = nn.Sequential(Linear(text + image + 32, embedded), SiLU(), Linear(embedded, embedded))
        self.heads = nn.ModuleList(Head(c, embedded, width) for c in channels)
        for k, c in enumerate(channels):
            self.register_buffer(f"mean_{k}", torch.zeros(c))
            self.register_buffer(f"std_{k}", torch.ones(c))
        self.register_buffer("calibrated", torch.tensor(False))
        self._calibrated = False  # what the device says, which is asked only where this is False
        self.register_load_state_dict_post_hook(lambda *_: self._ask_again())

    def _ask_again(self) -> None:
        self._calibrated = False

    @torch.no_grad()
    def calibrate(self, features: Sequence[Tensor], whole: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        """Take mean and spread per channel from K maps of real pictures (B, C_k, H_k, W_k), once.

        Of maps whose other rows are elsewhere `whole` gives all.
        """
        if self._calibrated or self.calibrated:
            self._calibrated = True
            return
        for k, f in enumerate(map(whole, features)):
            getattr(self, f"mean_{k}").copy_(f.mean((0, 2, 3)))
            if f[:, 0].numel() > 1:  # of one value (a tiny picture, alone in its batch) there is no spread
                getattr(self, f"std_{k}").copy_(f.std((0, 2, 3)).clamp(min=1e-3))
        self.calibrated.fill_(True)

    def standardise(self, features: Sequence[Tensor]) -> list[Tensor]:
        """K feature maps -> the heads' inputs, on which R1 is taken."""
        return [
            (f - getattr(self, f"mean_{k}")[:, None, None]) / getattr(self, f"std_{k}")[:, None, None]
            for k, f in enumerate(features)
        ]

    def forward(
        self, inputs: Sequence[Tensor], sigma: Tensor, text: Tensor, image: Tensor | None = None
    ) -> list[Tensor]:
        """Standardised maps, noise level (B,), text (B, text), image (B, image) -> K logits (B, N_k)."""
        parts = [F.layer_norm(text.float(), text.shape[-1:]), noise_embedding(sigma)]
        if self.image:
            parts.append(text.new_zeros(len(text), self.image) if image is None else image.float())
        condition = self.condition(torch.cat(parts, 1))
        return [head(x, condition) for head, x in zip(self.heads, inputs, strict=True)]
