"""A frozen decoder of latents through which gradients flow, whatever program the autoencoder is of."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

MOST_PIXELS = 2**18  # that are decoded at once: one picture of 512 x 512, 64 of 64 x 64
# What of a decoder is computed again in backward, in diffusers' layout, the hosts' and that of tiny decoders.
BLOCKS = re.compile(
    r"(?:^|\.)(?:(?:resnets|block|attentions|attn|upsamplers|upsamples|layers|taesd_decoder)\.\d+|block_[12]|attn_1|upsample)$"
    r"|^\d+$"
)


def decoded_at_once(resolution: tuple[int, int]) -> int:
    """Pictures of this size (width, height) that are decoded together: large ones one by one, since each takes GB."""
    width, height = resolution
    return max(1, min(16, MOST_PIXELS // (width * height)))


ENCODES = ("encoder", "quant_conv")  # what of an autoencoder no picture is decoded by


# Where `torch.no_grad` and `torch.inference_mode` keep what they make of a function.
WRAPPER = torch.no_grad()(lambda: None).__code__.co_filename


def frozen_copy(
    network: nn.Module, device: torch.device, dtype: torch.dtype | None = None, without: Sequence[str] = ()
) -> Any:
    """A copy with gradients, `without` some parts: in float32 where `dtype` (its own) has no room for small ones.

    A host moves its own network as it likes, and computes with it in inference mode; this one stays, and is ordinary.
    """
    weights = [p for p in network.parameters() if p.is_floating_point()]
    dtype = dtype or (weights[0].dtype if weights else torch.float32)
    left: dict[int, Any] = {id(m): None for name, m in network.named_children() if name in without}
    with torch.inference_mode(False), torch.no_grad():
        ordinary = {id(p): nn.Parameter(p.detach().clone(), False) for p in weights}
        ordinary |= {id(b): b.detach().clone() for b in network.buffers()}
        copied = copy.deepcopy(network, left | ordinary)
        copied.to(device, torch.float32 if dtype == torch.float16 else dtype)
    for module in copied.modules():
        module.training = False  # by hand: some hosts' networks have a `train` that does nothing
        for name in ("forward", "decode"):
            if (method := _with_gradient(getattr(type(module), name, None))) is not None:
                setattr(module, name, MethodType(method, module))
    return copied


def _with_gradient(method: Any) -> Any:
    """A method without torch's decorators that take its gradient away; None where it has none of them."""
    inner = method
    while getattr(getattr(inner, "__code__", None), "co_filename", None) == WRAPPER:
        inner = inner.__wrapped__
    return None if inner is method else inner


def has_blocks(network: nn.Module) -> bool:
    """Whether a decoder is one whose blocks are known."""
    return any(BLOCKS.search(name) for name, _ in network.named_modules())


class Decoder:
    """Latents (B, C, H, W), as the denoiser takes them -> pictures (B, 3, height, width), float32.

    Pictures are about [0, 1]; colours beyond are left as they are, or no gradient would bring them back. A latent is
    `factor` pixels wide. `make` gives the network when it is first needed, and `decode(network, latents)` runs it. It
    is the model's `own` autoencoder, or a network besides.
    """

    def __init__(
        self,
        factor: int,
        make: Callable[[], nn.Module],
        decode: Callable[[Any, Tensor], Tensor],
        own: bool = False,
    ):
        self.factor, self._make, self._decode, self.own = factor, make, decode, own

    @cached_property
    def network(self) -> nn.Module:
        """The decoder's network, whose weights take no gradient."""
        return self._make()

    def at_once(self, latents: Tensor) -> int:
        """How many of such latents are decoded together."""
        height, width = latents.shape[-2:]
        return decoded_at_once((width * self.factor, height * self.factor))

    def check(self, channels: int) -> None:
        """Raise ValueError for a decoder whose pictures have no gradient: it would teach nothing, and say nothing."""
        device = next((p.device for p in self.network.parameters()), None)
        with torch.enable_grad():
            latents = torch.zeros(1, channels, 8, 8, device=device, requires_grad=True)
            if not self(latents).requires_grad:
                raise ValueError(
                    f"no gradient comes through the decoder of this host ({type(self.network).__name__}): leave "
                    "pixel_backbone empty, or distil on the command line"
                )

    def __call__(self, latents: Tensor) -> Tensor:
        chunks = latents.split(self.at_once(latents))
        return torch.cat([self._decode(self.network, chunk).float() for chunk in chunks])
