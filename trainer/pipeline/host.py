"""A loaded model of diffusers' classes, as the trainer's host: its own weights, left as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.card import StudentCard, fingerprint
from ...core.denoiser import Cond
from ...core.schedule import Schedule
from ..checkpoint.errors import ModelError
from .autoencoder import Autoencoder
from .denoisers import NetworkDenoiser

Size = tuple[int, int]  # width, height in pixels


class PipelineHost:
    """A network, an autoencoder and a text encoder, as `trainer.host.Host` asks for them.

    `encode(prompts, size)` makes conditions, `factor` is how many pixels a latent is wide, and `multiple` what both
    sides of a picture must be multiples of. `schedule(size)` gives the noise levels where they depend on the size.
    `pipe` is the pipeline that all of it comes from, if there is one, and `student` the card of one that is merged into
    the network. `text_hash` says that texts are read in another way than the model's own, such as by its `clip_skip`.
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        vae: Any,
        encode: Callable[[Sequence[str], Size], Cond],
        name: str,
        architecture: str,
        size: Size,
        *,
        channels: int,
        factor: int,
        multiple: int = 1,
        schedule: Callable[[Size], Schedule] | None = None,
        pipe: Any = None,
        student: StudentCard | None = None,
        clip_skip: int = 0,
        text_hash: str = "",
    ):
        self.denoiser, self.vae, self.pipe = denoiser, vae, pipe
        self.name, self.architecture, self.student = name, architecture, student
        self._autoencoder, self._encode, self._schedule = Autoencoder(vae), encode, schedule
        self._channels, self._factor, self._multiple = channels, factor, multiple
        self.base_hash, self.text_hash, self.clip_skip = fingerprint(denoiser.backbone), text_hash, clip_skip
        self.sampling = None
        self._resize(size)

    def _resize(self, size: tuple[int, ...]) -> None:
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise ModelError(f"the size is {size!r:.80}: give width and height in pixels")
        width, height = size
        multiple = self._factor * self._multiple
        if width % multiple or height % multiple:
            raise ModelError(f"{width} x {height} pixels: give multiples of {multiple}, which this model works in")
        self.resolution = size
        self.latent_shape = (self._channels, height // self._factor, width // self._factor)
        if self._schedule is not None:
            self.denoiser = copy.copy(self.denoiser)
            self.denoiser.schedule = self._schedule(size)

    def sized(self, *size: int) -> PipelineHost:
        """The same model at another width and height of pictures; raises ModelError where it does not work in them."""
        other = copy.copy(self)
        other._resize(size)
        return other

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        return self._encode(prompts, self.resolution)

    def decoder(self, latents: Tensor) -> Tensor:
        return self._autoencoder.decode(latents, self.resolution)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        return self._autoencoder.encode(images)
