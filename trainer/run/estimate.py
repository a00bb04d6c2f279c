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
from ..data.sizes import by_size, with_buckets
from ..host import Host
from ..loop.start import begin
from .memory import Memory, measure_memory, size_in_words
from .words import duration


@dataclass(frozen=True)
class Estimate:
    """Memory of a training; bytes on disk and seconds of making its `pairs` teacher pairs."""

    memory: Memory
    pairs: int
    on_disk: int
    seconds: float

    def in_words(self, free: int | None = None) -> str:
        """As `Memory.in_words`, with the pairs."""
        making = f"about {duration(self.seconds)} to make and {size_in_words(self.on_disk)} on disk"
        return f"{self.pairs} teacher pairs take {making}; {self.memory.in_words(free)}"


def estimate(host: Host, config: Config, prompts: Sequence[str], images: str | Path | None = None) -> Estimate:
    """Measure on two samples what making pairs of the prompts and training on them will take.

    `images`, as `run` takes them, count where the sizes are theirs. Raises ConfigError for settings that do not fit
    this model, DataError as `draw_prompts` and `read_pictures`.
    """
    found = None if images is None else read_pictures(images, config.broken_pictures)
    config = with_buckets(config, found, host.resolution)
    affixes = Affixes.of(config)
    shares = by_size(host, config, prompts, Path())
    largest = max((share.host for share in shares), key=lambda host: math.prod(host.resolution))
    cond = largest.encode_text([""])
    sample = Samples(torch.zeros(1, *largest.latent_shape), cond, [""])
    state = begin(largest, config, sample)
    try:
        memory = measure_memory(state, sample, largest.resolution)
    finally:
        state.release()
    on_disk, seconds = 0, 0.0
    for share in shares:
        drawn = draw_prompts(share.prompts, share.config.pairs, config.seed)
        texts = {each for text in drawn for each in affixes.both(text)}
        on_disk += pairs_size(share.host.latent_shape, cond, share.config.pairs, len(texts))
        seconds += seconds_of_pairs(share.host, share.config, len(texts))
    return Estimate(memory, config.pairs, on_disk, seconds)


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
