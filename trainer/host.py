"""What a trainer needs of wherever the checkpoint is loaded: ComfyUI, a WebUI, or plain diffusers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from ..core.decoder import Decoder
from ..core.denoiser import Cond, Denoiser
from ..core.vision import Eye


class HostSampling(Protocol):
    """A host's own sampler and noise levels, for the teacher in place of the settings' sampler and steps."""

    sigmas: Tensor  # (n + 1,), falling to 0
    recipe: dict[str, str]  # what tells it from others: "sampler" and "steps", in words

    def __call__(self, model: Callable[[Tensor, Tensor], Tensor], noise: Tensor, seeds: list[int], /) -> Tensor:
        """Standard normal noise (B, C, H, W) and the seed of each row -> latents (B, C, H, W), by `model(x, sigma)`.

        A row depends on its noise and seed alone.
        """
        ...


class Host(Protocol):
    """A loaded checkpoint: its denoiser, and text and pictures in and out of it."""

    @property
    def denoiser(self) -> Denoiser: ...

    @property
    def sampling(self) -> HostSampling | None:
        """How the teacher makes pictures here, where it is not by the settings."""
        ...

    own: bool  # whether the model is this program's own, to place and pack it; else the host does that by itself
    name: str
    architecture: str  # a ModelSpec architecture: stable-diffusion-v1, ...
    base_hash: str
    text_hash: str  # of a text encoder that is not the base's own; "" where it is
    clip_skip: int  # as `core.clip_skip` counts; 0 where there is none, or it is not known
    latent_shape: tuple[int, int, int]  # (C, H, W) at the resolution worked at
    resolution: tuple[int, int]  # (width, height) in pixels

    @property
    def beside(self) -> tuple[int, int]:
        """Bytes of the text encoders' weights, and of the autoencoder's, that lie beside the denoiser's in a training.

        None where the host takes them away by itself.
        """
        ...

    def aside(self, decodes: bool = False) -> AbstractContextManager[None]:
        """Within, those wait in the computer's memory when they do not work; at the end they are back.

        The autoencoder stays if it `decodes` in every update. Where the host takes them away by itself it does nothing.
        """
        ...

    def sized(self, width: int, height: int, /) -> Host:
        """The same model at another size of pictures in pixels; raises ValueError for one that it cannot make."""
        ...

    def encode_text(self, prompts: list[str]) -> Cond:
        """Prompts -> a batch of conditions; the empty prompt is the unconditional one."""
        ...

    @property
    def decoder(self) -> Decoder:
        """As `decode`, but with gradients. Raises ValueError, in words, where that cannot be had."""
        ...

    eye: Eye | None  # what judges decoded pictures in place of the network that the settings name

    @property
    def tiny_decoder(self) -> Decoder:
        """A small one that comes near it (TAESD's kind); raises ValueError where none is at hand."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) as the denoiser takes them -> pictures (B, 3, height, width) in [0, 1]."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, height, width) in [0, 1] -> latents (B, C, H, W)."""
        ...
