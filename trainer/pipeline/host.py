"""A loaded model of diffusers' classes, as the trainer's host: its own weights, left as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...core.card import StudentCard, fingerprint
from ...core.decoder import Decoder
from ...core.denoiser import Cond
from ...core.schedule import Schedule
from ...core.vision import Eye
from ..checkpoint.errors import ModelError
from .aside import Aside
from .autoencoder import Autoencoder
from .denoisers import NetworkDenoiser
from .tiny_decoder import decoded, load_tiny

Size = tuple[int, int]  # width, height in pixels


class PipelineHost:
    """A network, an autoencoder and a text encoder, as `trainer.host.Host` asks for them.

    `encode(prompts, size)` makes conditions, `factor` is how many pixels a latent is wide, and `multiple` what both
    sides of a picture must be multiples of. `schedule(size)` gives the noise levels where they depend on the size.
    `pipe` is the pipeline that all of it comes from, if there is one, and `student` the card of one that is merged into
    the network. `text_hash` says that texts are read in another way than the model's own, such as by its `clip_skip`.
    `encoders` are the text encoders' networks.
    """

    own = True
    eye: Eye | None = None

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
        encoders: Sequence[nn.Module] = (),
    ):
        self.denoiser, self.vae, self.pipe = denoiser, vae, pipe
        self.name, self.architecture, self.student = name, architecture, student
        self._autoencoder, self._encode, self._schedule = Autoencoder(vae), encode, schedule
        self._channels, self._factor, self._multiple = channels, factor, multiple
        self.base_hash, self.text_hash, self.clip_skip = fingerprint(denoiser.backbone), text_hash, clip_skip
        self.sampling = None
        self._encoders, self._decoders = Aside(lambda: encoders), Aside(lambda: self._autoencoder.networks)
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

    @property
    def beside(self) -> tuple[int, int]:
        return self._encoders.size, self._decoders.size

    @contextmanager
    def aside(self, decodes: bool = False) -> Iterator[None]:
        with self._encoders.away(), nullcontext() if decodes else self._decoders.away():
            yield

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        with self._encoders.at_work():
            return self._encode(prompts, self.resolution)

    @property
    def decoder(self) -> Decoder:
        return Decoder(self._factor, lambda: self._autoencoder.network, lambda _network, z: self._pictures(z), own=True)

    def _pictures(self, latents: Tensor) -> Tensor:
        with self._decoders.at_work():
            return self._autoencoder.decode(latents, self.resolution)

    @property
    def tiny_decoder(self) -> Decoder:
        return Decoder(self._factor, lambda: load_tiny(self.architecture, self.denoiser.device), decoded)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self._pictures(latents).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        with self._decoders.at_work():
            return self._autoencoder.encode(images)
