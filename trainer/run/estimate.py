"""What a distillation will take, told before it begins: memory, and time and disk of the teacher pairs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...core.denoiser import Guidance
from ..config import Config
from ..data.affixes import Affixes
from ..data.pairs import Teacher, pairs_size
from ..data.pictures import read_pictures
from ..data.prompts import draw_prompts
from ..data.samples import Samples
from ..data.sizes import OfSize, by_size, with_buckets
from ..host import Host
from ..loop.precision import autocast
from ..loop.start import begin, features
from .memory import Measured, Memory, measure, size_in_words
from .words import duration


@dataclass(frozen=True)
class Estimate:
    """Memory of a training; bytes on disk and seconds of its `pairs` teacher pairs, and of the training itself."""

    memory: Memory
    pairs: int
    on_disk: int
    seconds: float
    state: int = 0  # bytes on disk of the saved state and the student; 0 where it was not measured
    training: float = 0.0  # seconds

    def in_words(self, free: int | None = None) -> str:
        """As `Memory.in_words`, with the pairs."""
        making = f"about {duration(self.seconds)} to make and {size_in_words(self.on_disk)} on disk"
        return f"{self.pairs} teacher pairs take {making}; {self.memory.in_words(free)}{self._of_training()}"

    def without_memory(self) -> str:
        """Time and disk alone."""
        making = f"about {duration(self.seconds)} to make and {size_in_words(self.on_disk)} on disk"
        return f"{self.pairs} teacher pairs take {making}{self._of_training()}"

    def _of_training(self) -> str:
        if not self.training:
            return ""
        return f"; the training takes about {duration(self.training)}, and {size_in_words(self.state)} on disk"


@dataclass(frozen=True)
class Prepared:
    """What an estimate is of: settings with every size known, and what of the pairs is of each size."""

    config: Config
    shares: Sequence[OfSize]

    @staticmethod
    def of(host: Host, config: Config, prompts: Sequence[str], images: str | Path | None = None) -> Prepared:
        """Raises as `estimate`."""
        found = None if images is None else read_pictures(images, config.broken_pictures)
        config = with_buckets(config, found, host.resolution)
        return Prepared(config, by_size(host, config, prompts, Path()))

    @property
    def largest(self) -> Host:
        """The host of the largest size."""
        return max((share.host for share in self.shares), key=lambda host: math.prod(host.resolution))


def estimate(host: Host, config: Config, prompts: Sequence[str], images: str | Path | None = None) -> Estimate:
    """Measure on two samples what making pairs of the prompts and training on them will take.

    `images`, as `run` takes them, count where the sizes are theirs. Raises ConfigError for settings that do not fit
    this model, DataError as `draw_prompts` and `read_pictures`.
    """
    prepared = Prepared.of(host, config, prompts, images)
    return timed(prepared, prepared.config, needs(prepared).memory(prepared.config))


def needs(prepared: Prepared) -> Measured:
    """Measure what a training at the largest size takes; raises ConfigError for settings that do not fit the model."""
    host = prepared.largest
    sample = Samples(torch.zeros(1, *host.latent_shape), host.encode_text([""]), [""])
    state = begin(host, prepared.config, sample)
    try:
        return measure(state, sample, host.resolution, host.beside)
    finally:
        state.release()


def timed(prepared: Prepared, config: Config, memory: Memory, measured: Measured | None = None) -> Estimate:
    """The estimate of a training that takes this `memory`; of the training itself, too, where it was `measured`."""
    cond = prepared.largest.encode_text([""])
    affixes = Affixes.of(config)
    on_disk, seconds = 0, 0.0
    for share in prepared.shares:
        own = share.config.replace(batch_size=config.batch_size)
        drawn = draw_prompts(share.prompts, own.pairs, config.seed)
        texts = {each for text in drawn for each in affixes.both(text)}
        on_disk += pairs_size(share.host.latent_shape, cond, own.pairs, len(texts))
        seconds += seconds_of_pairs(share.host, own, len(texts))
    if measured is None:
        return Estimate(memory, config.pairs, on_disk, seconds)
    training = config.updates * seconds_of_update(prepared.largest, config)
    if config.minutes:
        training = min(training, 60 * config.minutes)
    return Estimate(memory, config.pairs, on_disk, seconds, measured.saved(config), training)


def seconds_of_update(host: Host, config: Config) -> float:
    """How long an update takes, by one pass of each kind without gradients.

    A backward pass takes as long as its forward, as only a LoRA's own weights want a gradient; of a full student twice
    as long. With checkpointing each forward comes again. The discriminator's heads are small.
    """
    x = torch.zeros(config.batch_size, *host.latent_shape, device=host.denoiser.device)
    cond = host.encode_text([""]).to(x.device).repeat(config.batch_size)
    sigma = host.denoiser.schedule.sigma(torch.tensor([500.0])).to(x.device).expand(config.batch_size)
    seen = None if config.guidance_only else features(host, config)
    again = 1 if config.gradient_checkpointing else 0
    with autocast(config, host.denoiser):
        one = _measured(lambda: host.denoiser(x, sigma, cond))
        sight = _measured(lambda: seen(x, sigma, cond)) if seen and config.adversarial_weight else 0.0
    student = one * ((2 if config.rank else 3) + again)
    if config.guidance_only:
        student += 2 * one  # the guided teacher
    if config.distillation_weight:
        student += 2 * one * config.teacher_steps
    if config.distillation_weight and config.distillation == "matching":
        student += one * (3 + again)
    return config.gradient_accumulation * (student + sight * (3 + again))  # real pictures are seen without gradients


def seconds_of_pairs(host: Host, config: Config, texts: int) -> float:
    """How long it takes to make the pairs with so many distinct texts, by one text and one pass of each kind."""
    batch = min(config.batch_size, config.pairs)
    guidance = Guidance.of(config)
    teacher = Teacher(host, config)
    cond = host.encode_text([""]).repeat(batch)
    acts = guidance.acts(host.denoiser.schedule, teacher.sigmas[:-1]).tolist()
    seconds = texts * _measured(lambda: host.encode_text([""]))
    for guided in set(acts):
        # One step, which is one pass; with guidance throughout, or with none.
        one = replace(guidance, start=0.0, end=1.0) if guided else Guidance()
        step = Teacher(host, config, one, teacher.sigmas[[0, -1]])
        passes = acts.count(guided) * math.ceil(config.pairs / batch)
        seconds += passes * _measured(lambda step=step: step.pictures(torch.arange(batch), cond))
    return seconds


@torch.no_grad()
def _measured(work: Callable[[], object]) -> float:
    """Seconds of the second of two runs: the first warms up."""
    work()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
