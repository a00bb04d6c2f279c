"""What a distillation will take, told before it begins: memory, and time and disk of the teacher pairs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
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
from ..groups import OF_OWN
from ..host import Host
from ..loop.distill import distill
from ..loop.optimizer import has_eight_bits
from ..loop.start import begin
from .memory import GB, Measured, Memory, measure, size_in_words
from .placed import placed
from .plan import WHY, Plan, check_full, plan, set_by_hand
from .words import duration

FIELDS = {f.name: f for f in fields(Config)}


@dataclass(frozen=True)
class Estimate:
    """Memory of a training; bytes on disk and seconds of its `pairs` teacher pairs, and of the training itself."""

    memory: Memory
    pairs: int
    on_disk: int
    seconds: float
    state: int = 0  # bytes on disk of the saved state and the student; 0 where it was not measured
    training: float = 0.0  # seconds
    plan: str = ""  # what was chosen for a card, in words

    def in_words(self, free: int | None = None) -> str:
        """As `Memory.in_words`, with the pairs."""
        making = f"about {duration(self.seconds)} to make and {size_in_words(self.on_disk)} on disk"
        told = f"{self.pairs} teacher pairs take {making}; {self.memory.in_words(free)}{self._of_training()}"
        return f"{self.plan}; {told}" if self.plan else told

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


def estimate(
    host: Host,
    config: Config,
    prompts: Sequence[str],
    images: str | Path | None = None,
    given: Collection[str] | None = None,
) -> Estimate:
    """Measure on two samples what making pairs of the prompts and training on them will take.

    `images`, as `run` takes them, count where the sizes are theirs; with `vram` it is of the settings as they are
    chosen, but for the `given` ones. Raises ConfigError for settings that do not fit this model, DataError as
    `draw_prompts` and `read_pictures`.
    """
    if config.vram:
        found, prepared, _ = planned(host, config, prompts, images, given)
        return replace(timed(prepared, found.config, found.memory), plan=found.in_a_sentence(config))
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


def planned(
    host: Host,
    config: Config,
    prompts: Sequence[str],
    images: str | Path | None = None,
    given: Collection[str] | None = None,
    settled: Collection[str] = (),
) -> tuple[Plan, Prepared, Measured]:
    """Settings with which the training fits a card of `config.vram` GB, and what they were found by.

    Those that are `given` stay (None: those that are not at their defaults), and those that are `settled` already; of
    the others, those that cost speed or precision are chosen whatever they are. Raises ConfigError for a full copy that
    no settings make fit, DataError as `estimate`.
    """
    given = set_by_hand(config, {}) if given is None else given
    free = [name for name in WHY if name not in (*given, *settled, "batch_size")]
    config = config.replace(**{name: FIELDS[name].default for name in free})
    card, eight_bits = int(config.vram * GB), has_eight_bits()
    if config.rank == 0:
        check_full(host.denoiser.backbone, config, card, eight_bits and "optimizer" in free)
    prepared = Prepared.of(host, config, prompts, images)
    measured = needs(prepared)
    absent = (*settled, *(() if host.own else OF_OWN))
    found = plan(measured, prepared.config, card, given, eight_bit_moments=eight_bits, absent=absent)
    return found, prepared, measured


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
    training = seconds_of_training(prepared.largest, config)
    return Estimate(memory, config.pairs, on_disk, seconds, measured.saved(config), training)


def seconds_of_training(host: Host, config: Config) -> float:
    """How long a training takes, by real updates of a student that is thrown away.

    They take the memory that the training takes. The first updates have no discriminator, and are shorter.
    """
    alone = min(max(config.regression_updates - config.discriminator_warmup, 0), config.updates)
    if config.guidance_only or not (config.adversarial_weight or config.distillation_weight or config.feature_weight):
        alone = 0
    rest = config.updates - alone
    seconds = rest * _seconds_of_update(host, config, False) if rest else 0.0
    seconds += alone * _seconds_of_update(host, config, True) if alone else 0.0
    return min(seconds, 60 * config.minutes) if config.minutes else seconds


def _seconds_of_update(host: Host, config: Config, alone: bool) -> float:
    """The second of two updates, of regression `alone` or of all losses."""
    regression = {"regression_updates": 9 if alone else 0, "discriminator_warmup": 0}
    short = config.replace(updates=2, minutes=0.0, log_every=1, gradient_accumulation=1, **regression)
    draws = torch.Generator().manual_seed(0)
    cond = host.encode_text([""]).to("cpu")
    latents = torch.randn(2, *host.latent_shape, generator=draws)
    pairs = Samples(latents, cond.repeat(2), ["", "a"], torch.arange(2))
    with placed(host, config):
        state = begin(host, short, pairs)
        try:
            return config.gradient_accumulation * [step.seconds for step in distill(state, pairs, cond)][-1]
        finally:
            state.release()


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
