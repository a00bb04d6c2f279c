"""Frozen features of decoded pictures for the discriminator, from a vision transformer (ADD, arXiv 2311.17042)."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .augment import augmented, cropped
from .decoder import Decoder
from .denoiser import Cond
from .features import TeacherFeatures, outputs, tapped
from .transfer import to_device

VISION_BLOCK = re.compile(r"(?:^|\.)(?:layer|layers|blocks)\.\d+$")


def vision_taps(network: nn.Module) -> list[str]:
    """Names of the blocks to tap of a vision transformer.

    Four evenly in its second and third quarter: the last blocks forget textures. Of one with fewer than
    eight blocks, every second, from its last. Raises ValueError for a network that has no known blocks.
    """
    names = [n for n, _ in network.named_modules() if VISION_BLOCK.search(n)]
    if not names:
        raise ValueError(f"no known blocks in {type(network).__name__}: give a vision transformer such as DINOv2's")
    count = len(names)
    if count < 8:
        return names[::-2][::-1]
    return [names[count // 4 - 1 + k * count // 6] for k in range(4)]


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Eye:
    """A vision transformer, and how pictures (B, 3, H, W) in [0, 1] must be for it.

    Its last tokens are the picture's, by rows.
    """

    network: nn.Module
    patch: int  # side of a patch in pixels, of which both sides are multiples
    mean: Sequence[float] = IMAGENET[0]  # that is taken from each colour,
    std: Sequence[float] = IMAGENET[1]  # and that it is divided by
    side: int = 0  # in pixels, of the pictures it was trained on, where it sees those best
    square: bool = False  # whether it takes squares of that side alone


class VisionFeatures:
    """Features (B, C_k, H', W') of the decoded picture at K blocks of a frozen vision transformer, the `eye`'s.

    Pictures are scaled to `size` pixels on their longer side; 0 takes the eye's own side, or leaves them. Of each a
    square of `crop` pixels alone is decoded and seen, at a random place, if that is not 0. `augment` changes what is
    seen at random. `again` keeps nothing of the passes but the maps: pictures are decoded and seen again in backward.
    """

    name = "pixels"
    conditional = False

    def __init__(
        self,
        eye: Eye,
        decoder: Decoder,
        size: int = 0,
        taps: Sequence[str] | None = None,
        *,
        crop: int = 0,
        augment: bool = False,
        again: bool = False,
    ):
        """Raises ValueError for taps that the network lacks, where none are known, or a size that cannot be."""
        if eye.square and size not in (0, eye.side):
            raise ValueError(f"pixel_size is {size}: this vision transformer takes {eye.side} alone, leave it at 0")
        if 0 < size < eye.patch:
            raise ValueError(
                f"pixel_size is {size}: this network looks at patches of {eye.patch} pixels, give more, or 0"
            )
        self.eye, self.network = eye, eye.network.eval().requires_grad_(False)
        self.decoder, self.size, self.crop = decoder, size or eye.side, crop
        self.augment, self.again = augment, again
        self.taps = list(taps or vision_taps(self.network))
        self.modules = tapped(self.network, self.taps)
        self._normal = torch.tensor(eye.mean)[:, None, None], torch.tensor(eye.std)[:, None, None]

    def kept(self) -> VisionFeatures:
        """The same, that keeps all of its passes."""
        other = copy.copy(self)
        other.again = False
        return other

    @property
    def varies(self) -> bool:
        """Whether the same picture is seen in another way each time."""
        return self.augment or self.crop > 0

    @property
    def networks(self) -> Sequence[nn.Module]:
        """What lies on the device for it: the vision transformer and the decoder."""
        return [self.network, self.decoder.network]

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond, view: Tensor | None = None) -> list[Tensor]:
        """Clean latents x (B, C, H, W) -> K feature maps, float32; level and condition tell it nothing.

        `view` (B, NUMBERS of `augment`), on the CPU, says how each picture is cropped and augmented; without one it is
        the middle, as it is.
        """
        x = cropped(x, math.ceil(self.crop / self.decoder.factor), view)
        count = self.decoder.at_once(x)
        colours = None if view is None or not self.augment else to_device(view, x.device)
        chunks = [
            self._seen(lambda x, view: self._maps(self.decoder(x), view), part, drawn)
            for part, drawn in zip(x.split(count), _split(colours, count, len(x)), strict=True)
        ]
        return [torch.cat(maps) for maps in zip(*chunks, strict=True)]

    def of_pictures(self, pictures: Tensor, view: Tensor | None = None) -> list[Tensor]:
        """The same of pictures (B, 3, height, width) in [0, 1] as they are."""
        pictures = cropped(pictures, math.ceil(self.crop / self.decoder.factor) * self.decoder.factor, view)
        return self._maps(pictures, None if view is None or not self.augment else to_device(view, pictures.device))

    def _seen(self, run: Callable[..., list[Tensor]], x: Tensor, view: Tensor | None) -> list[Tensor]:
        if not self.again or not torch.is_grad_enabled():
            return run(x, view)
        found: Any = checkpoint(run, x, view, use_reentrant=False, preserve_rng_state=False)
        return found

    def _maps(self, pictures: Tensor, view: Tensor | None) -> list[Tensor]:
        pictures = pictures.float()
        if view is not None:
            pictures = augmented(pictures, view)
        scale = self.size / max(pictures.shape[-2:]) if self.size else 1.0
        sides = (self.size, self.size) if self.eye.square else [side * scale for side in pictures.shape[-2:]]
        rows, columns = (math.ceil(side / self.eye.patch) for side in sides)
        sides = (rows * self.eye.patch, columns * self.eye.patch)
        pictures = F.interpolate(pictures, sides, mode="bicubic", antialias=True)
        mean, std = self._normal = self._normal[0].to(pictures.device), self._normal[1].to(pictures.device)

        def take(_tap: str, output: Any) -> Tensor:
            tokens = (
                output[0] if isinstance(output, tuple) else output
            ).clone()  # the next block may add to it in place
            return tokens[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))

        return [m.float() for m in outputs(self.modules, take, lambda: self.network((pictures - mean) / std))]


Features = TeacherFeatures | VisionFeatures


def _split(view: Tensor | None, count: int, rows: int) -> Sequence[Tensor | None]:
    return [None] * math.ceil(rows / count) if view is None else view.split(count)
