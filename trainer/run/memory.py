"""How much memory a training will take, measured on a sample before the first step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core import decoder as decoders
from ...core.augment import cropped
from ...core.decoder import Decoder, decoded_at_once
from ...core.denoiser import Cond
from ...core.eight_bits import bytes_saved
from ...core.features import TeacherFeatures
from ...core.gradient_checkpointing import BLOCKS
from ...core.sharded import own_part
from ...core.vision import Features, VisionFeatures
from ..config import ADAMW, ADAMW8BIT, INT8, PRODIGY, Config
from ..data.samples import Samples
from ..loop.precision import autocast, cast_frozen, low_precision
from ..loop.state import State
from .kept import Kept, SavedTensors

GB = 1024**3
PREVIEWS = 8  # pictures
# Bytes a pixel that the decoder of Stable Diffusion's autoencoders takes, in float32: a few maps of 256 channels.
DECODING = 3200
# What an optimizer keeps over the size of the parameters in float32: Adam its two moments, of eight bits with a scale
# for each 256 numbers; Prodigy the weights as they began, too, and a sum of gradients.
EIGHT_BITS = 2 * (1 + 4 / 256) / 4
STATE_SIZES = {ADAMW: 2.0, ADAMW8BIT: EIGHT_BITS, PRODIGY: 4.0}
# What is alive of the feature maps of pictures, real and the student's, over the size of the latter's.
MAPS = 2
# What to change when memory does not suffice, in the order in which it costs least.
REMEDIES = (
    "set gradient_checkpointing to true",
    "lower batch_size and raise gradient_accumulation by as much",
    "make smaller pictures",
    "lower rank",
)


class OutOfMemory(RuntimeError):
    """The device's memory did not suffice; the message says what to change."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an accelerator's or a CPU's refusal to allocate."""
    said = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate" in said or "out of memory" in said


def advice(what: str, config: Config | None = None, latent_shape: Sequence[int] = ()) -> str:
    """What to say when memory ran out during `what`: in a training with its settings and latents (C, H, W)."""
    if config is None:
        return f"out of memory while {what}: make fewer at once, or smaller pictures"
    height, width = latent_shape[1:]
    remedies = [r for r in REMEDIES if not (config.gradient_checkpointing and "gradient_checkpointing" in r)]
    if config.batch_size == 1:
        remedies = [r for r in remedies if not r.startswith("lower batch_size")]
    now = f"batch_size {config.batch_size}, latents of {width} x {height}, rank {config.rank}"
    return f"out of memory while {what} ({now}): {', or '.join(remedies)}"


@dataclass(frozen=True)
class Memory:
    """Bytes that a training takes."""

    weights: int  # the model, once
    trained: int  # LoRA or copy, with Adam's moments and the average, and the discriminator
    activations: int  # the most that one update has besides: kept for backward, of the whole batch, and gradients
    decoding: int = 0  # of a preview, between two updates
    beside: int = 0  # text encoders and autoencoder, where they stay on the device
    seeing: int = 0  # what decodes and judges pictures, besides

    @property
    def total(self) -> int:
        return self.weights + self.beside + self.seeing + self.trained + max(self.activations, self.decoding)

    @property
    def parts(self) -> list[tuple[int, str]]:
        """What the total is the sum of, each with its name."""
        beside = [(self.beside, "text encoders and autoencoder")] if self.beside else []
        beside += [(self.seeing, "vision transformer and decoder")] if self.seeing else []
        largest = max((self.activations, "activations"), (self.decoding, "a preview"))
        return [(self.weights, "weights"), *beside, (self.trained, "student"), largest]

    def in_words(self, free: int | None = None) -> str:
        """One sentence; `free` bytes on the device, the weights' included, make it a comparison."""
        listed = ", ".join(f"{size_in_words(n)} {what}" for n, what in self.parts)
        words = f"training takes about {size_in_words(self.total)}: {listed}"
        if free is None:
            return words
        if free >= self.total:
            return f"{words}; {size_in_words(free)} are there"
        return f"{words}; only {size_in_words(free)} are there. It may run out of memory: {', or '.join(REMEDIES)}"


def free_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA device that nobody else has, what this program has reserved included; None elsewhere."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def size_in_words(count: int) -> str:
    """Bytes in the unit that fits."""
    if count >= GB / 10:
        return f"{count / GB:.1f} GB"
    return f"{count / 1024**2:.0f} MB" if count >= 1024**2 else "less than 1 MB"


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in map(own_part, tensors))


@dataclass(frozen=True)
class Line:
    """What a pass keeps, by what it keeps of one sample and of two."""

    one: Kept
    two: Kept

    def of(self, batch_size: int) -> Kept:
        return self.one.of_batch(self.two, batch_size)


@dataclass(frozen=True)
class Pictures:
    """What is kept of decoding pictures and seeing them, so many of them `at_once`."""

    line: Line
    at_once: int

    def throughout(self, batch_size: int, checkpointing: bool) -> int:
        """What stays from the pass to its backward: with checkpointing next to nothing, as all is done again."""
        return 0 if checkpointing else self.line.of(batch_size).throughout(False)

    def backward(self, batch_size: int, checkpointing: bool) -> int:
        """What backward has besides: with checkpointing the passes of those that are decoded at once, too."""
        if not checkpointing:
            return self.line.of(batch_size).backward(False)
        kept = self.line.of(min(batch_size, self.at_once))
        # What is outside of the decoder's blocks comes after them, and is gone when the first is computed again.
        return max(kept.throughout(True) + kept.backward(False), kept.inputs + kept.backward(True))


@dataclass(frozen=True)
class Measured:
    """What was measured of a model and its student: enough to tell the memory of any batch and any of the settings."""

    weights: int  # bytes of the frozen model, as the passes have it
    packing: int  # what base_precision int8 saves of them
    encoders: int  # bytes of the text encoders
    autoencoder: int
    student: int  # bytes of what the student's optimizer trains
    score: int  # of the fake score
    heads: int  # of the discriminator
    casts: int  # of the trained weights in the precision of the passes
    passes: Line  # the student's
    features: Line | None  # the latents' discriminator's, of the student's picture
    maps: int  # bytes of one sample's feature maps
    scoring: Line | None  # the fake score's
    decoding: int  # a preview's
    pictures: Sequence[Pictures] = ()  # of the pixel discriminator and of a loss in pixels
    seeing: int = 0  # bytes of what decodes and judges pictures, besides the autoencoder

    def memory(self, config: Config, processes: int = 1) -> Memory:
        """What a training with these settings takes, each of so many processes."""
        packed = config.base_precision == INT8
        moments = STATE_SIZES[config.optimizer]
        stays = (self.encoders + self.autoencoder) if not config.offload else 0
        stays = self.autoencoder if config.offload and config.decodes else stays
        return Memory(
            self.weights - (self.packing if packed else 0),
            # A parameter beside the running average and what the optimizer keeps, which is Adam's but for the student.
            round((2 + moments) * self.student) + 4 * self.score + (3 if _judges(config) else 1) * self.heads,
            self._update(config, config.batch_size // processes),
            self.decoding + (self.autoencoder if config.offload and not config.decodes else 0),
            stays,
            self.seeing,
        )

    def saved(self, config: Config) -> int:
        """Bytes on disk of a saved state, and of the student's file in half precision."""
        return round((2.5 + STATE_SIZES[config.optimizer]) * self.student) + 4 * self.score + 3 * self.heads

    def _update(self, config: Config, batch_size: int) -> int:
        """The most that an update has besides, at any of the moments at which that can be.

        Gradients come as activations go: the student's are all there when its first block is done.
        """
        again = config.gradient_checkpointing
        student = self.passes.of(batch_size)
        features = self.features.of(batch_size) if self.features else Kept({}, 0)
        maps = MAPS * self.maps * batch_size
        before = self.student + maps if config.gradient_accumulation > 1 else 0  # of the batch before
        through = student.throughout(again) + features.throughout(again)
        through += sum(p.throughout(batch_size, again) for p in self.pictures)
        backward = max([features.backward(again), *(p.backward(batch_size, again) for p in self.pictures)])
        stepped = 2 if config.optimizer == PRODIGY else 1  # gradients, and the way from the beginning
        moments = [
            before + through + maps + (self.casts if again else 0),  # the passes are done
            before + through + maps + backward,
            max(before + student.throughout(again), self.student) + maps + student.backward(again),
            stepped * self.student + self.score + (self.heads if _judges(config) else 0),  # the optimizers step
        ]
        if self.scoring:
            score = self.scoring.of(batch_size)
            moments.append(self.student + self.score + score.throughout(again) + score.backward(again))
        return max(moments)


def _judges(config: Config) -> bool:
    """Whether the discriminator is trained."""
    return config.adversarial_weight > 0 and not config.guidance_only


def _besides(networks: Iterable[nn.Module], seen: Sequence[Features], beside: tuple[int, int]) -> list[nn.Module]:
    """Those that are not the host's own autoencoder, which is counted among what lies `beside` the model."""
    own = [f.decoder.network for f in seen if isinstance(f, VisionFeatures) and f.decoder.own and beside[1]]
    return [n for n in networks if not any(n is other for other in own)]


def measure_memory(
    state: State, pairs: Samples, resolution: tuple[int, int], beside: tuple[int, int] = (0, 0)
) -> Memory:
    """What a training of this state takes, counted as `measure`; of several processes it is what each takes."""
    return measure(state, pairs, resolution, beside).memory(state.config, state.world.size)


def measure(state: State, pairs: Samples, resolution: tuple[int, int], beside: tuple[int, int] = (0, 0)) -> Measured:
    """Count on one sample and on two what the passes of an update keep: the student's, and the features' of it.

    It takes the memory of a pass for two pictures, or for one where that is the batch: what autograd would keep is let
    go. `resolution` are the pixels (width, height) of a picture, `beside` the host's.
    """
    config, student = state.config, state.student
    score = state.fake_score.denoiser if state.fake_score else None
    heads = [p for critic in state.critics for p in critic.discriminator.parameters()]
    sees = bool(state.critics) and (config.adversarial_weight > 0 or config.feature_weight > 0)
    seen = [critic.features for critic in state.critics] if sees else []
    trained = [student.trained, *([score.trained] if score else ())]
    networks = {id(n): n for f in seen for n in f.networks}
    networks |= {id(d.network): d.network for d in [state.decoder] if d}
    frozen = (student.teacher.backbone, *trained, *networks.values())
    parameters = [*(p for m in frozen for p in m.parameters()), *heads]
    sigma = student.schedule.sigma(torch.tensor([500.0])).to(student.device)
    sample: Cond = pairs.cond.rows(slice(1)).to(student.device)
    latents = pairs.latents[:1].to(student.device)
    sizes, plain = [], _bytes(student.teacher.backbone.parameters())

    def kept(network: nn.Module, run: Callable[[Tensor, Tensor, Cond], Any], known: re.Pattern[str] = BLOCKS) -> Line:
        """What a pass keeps of one sample, and of two."""
        found = []
        for count in (1, 2) if config.batch_size > state.world.size else (1,):
            with SavedTensors(network, parameters, known) as saved:
                run(latents.repeat(count, 1, 1, 1), sigma.expand(count), sample.repeat(count))
            found.append(saved.kept)
        return Line(found[0], found[-1])

    def see(features: Features) -> Callable[[Tensor, Tensor, Cond], None]:
        def run(x: Tensor, sigma: Tensor, cond: Cond) -> None:
            maps = features(x.requires_grad_(True), sigma, cond)
            if len(x) == 1:
                sizes.append(_bytes(maps))

        return run

    def decode(decoder: Decoder, run: Callable[[Tensor, Tensor, Cond], Any]) -> Pictures:
        part = cropped(latents, math.ceil(config.pixel_crop / decoder.factor))
        return Pictures(kept(decoder.network, run, decoders.BLOCKS), decoder.at_once(part))

    with (
        student.training(),
        score.training() if score else nullcontext(),
        cast_frozen(config, student.teacher),
        autocast(config, student, student.teacher),
    ):
        low = low_precision(config, student.device)
        weights = _bytes(student.teacher.backbone.parameters())
        if student.device.type == "cpu" and weights != plain:  # those that are cast wait in the same memory
            weights += plain
        packing = bytes_saved(student.teacher.backbone, low)
        passes = kept(student.backbone, student)
        lines = [kept(student.teacher.backbone, see(f)) for f in seen if isinstance(f, TeacherFeatures)]
        pictures = [decode(f.decoder, see(f.kept())) for f in seen if isinstance(f, VisionFeatures)]
        if in_pixels := state.decoder:
            side = math.ceil(config.pixel_crop / in_pixels.factor)
            pictures.append(decode(in_pixels, lambda x, *_: in_pixels(cropped(x.requires_grad_(True), side))))
        scoring = kept(score.backbone, score) if score else None
    own = list(student.trained.parameters())
    return Measured(
        weights,
        packing,
        *beside,
        student=_bytes(own),
        score=_bytes(score.trained.parameters()) if score else 0,
        heads=_bytes(heads),
        casts=sum(own_part(p).numel() * low.itemsize for p in own if p.dtype != low) if low else 0,
        passes=passes,
        features=lines[0] if lines else None,
        maps=sum(sizes),
        scoring=scoring,
        decoding=DECODING * math.prod(resolution) * min(PREVIEWS, decoded_at_once(resolution)),
        pictures=pictures,
        seeing=sum(_bytes((*n.parameters(), *n.buffers())) for n in _besides(networks.values(), seen, beside)),
    )
