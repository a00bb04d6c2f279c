"""Settings with which a training fits into a card's memory, at the least cost in speed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..config import ADAMW, ADAMW8BIT, INT8, Config, ConfigError
from .memory import EIGHT_BITS, GB, STATE_SIZES, Measured, Memory, size_in_words

# What is not a training's of a card's memory. CUDA's own: its context, the code of its kernels, and the workspaces of
# cuBLAS and cuDNN. A desktop's, on the same card. And of the rest what torch's allocator cannot use: it rounds sizes
# up, and what is free lies in pieces.
CONTEXT, DISPLAY, LOST = GB // 2, 2 * GB // 5, 0.05
# Time of an update with a change over that without; those that round something come last, whatever their time.
# None of them is measured on a GPU yet.
OFFLOADED, HALVED, CHECKPOINTED, EIGHT_BIT_MOMENTS, EIGHT_BIT_WEIGHTS = 1.01, 1.05, 1.33, 1.35, 1.4
ACCUMULATION = "gradient_accumulation"  # which goes with batch_size
WHY = {
    "offload": "they come back for previews alone",
    "batch_size": "the same picture count an update, in smaller batches: up to a twentieth slower for each halving",
    "gradient_checkpointing": "activations are computed again: about a third slower",
    "optimizer": "Adam's moments are rounded to eight bits",
    "base_precision": "the frozen model is rounded to eight bits: about a tenth slower, and last of all",
}


def usable(card: int) -> int:
    """Bytes of a card of so many that a training can have."""
    return max(int((card - CONTEXT - DISPLAY) * (1 - LOST)), 0)


@dataclass(frozen=True)
class Plan:
    """Settings for a card of `card` bytes."""

    config: Config
    memory: Memory
    card: int
    changes: dict[str, int] = field(default_factory=dict)  # settings that were changed, and the bytes each saves
    given: tuple[str, ...] = ()  # settings that would save some, but were set by hand
    slower: float = 1.0  # time of an update over that without changes
    loaded: int = 0  # bytes of the whole model as it is loaded, which makes the pairs

    @property
    def trains(self) -> bool:
        """Whether the training itself fits."""
        return self.memory.total <= usable(self.card)

    @property
    def fits(self) -> bool:
        return self.trains and self.loaded <= usable(self.card)

    def in_words(self) -> str:
        """Where every gigabyte goes, what was changed and why; where it cannot be, that."""
        room, total = usable(self.card), self.memory.total
        rows = [(n, what) for n, what in self.memory.parts]
        lines = [
            f"{size_in_words(self.card)} less {size_in_words(CONTEXT)} for CUDA's context, {size_in_words(DISPLAY)} "
            f"for a display and {LOST:.0%} that the allocator cannot use leave {size_in_words(room)}:",
            *(f"  {size_in_words(n):>16}  {what}" for n, what in rows),
            f"  {size_in_words(total):>16}  together, " + ("which fits" if self.trains else "which does not fit"),
        ]
        lines += [f"{self._change(name)}: {WHY[name]}; it saves {size_in_words(n)}" for name, n in self.changes.items()]
        return "\n".join([*lines, *self._troubles(), *self._kept()])

    def in_a_sentence(self, asked: Config) -> str:
        """What differs from the settings that were asked for, for a page; where it cannot be, that."""
        own = [name for name in WHY if getattr(self.config, name) != getattr(asked, name)]
        chosen = ", ".join(map(self._change, own)) or "as it is set"
        return "; ".join([f"for a card of {size_in_words(self.card)}: {chosen}", *self._troubles(), *self._kept()])

    def _troubles(self) -> list[str]:
        """Why it does not fit, and what to do."""
        found, room = [], usable(self.card)
        if self.loaded > room:
            found.append(
                f"The model is loaded whole to make the teacher pairs, and takes {size_in_words(self.loaded)} then "
                "with its text encoders: that does not fit. Use a card with more memory, or a smaller model"
            )
        if not self.trains:
            missing = size_in_words(self.memory.total - room)
            found.append(f"No settings make it fit: {missing} are missing. {self._remedies()}")
        return found

    def _kept(self) -> list[str]:
        return [f"set by hand, and kept: {', '.join(self.given)}"] if self.given else []

    def _change(self, name: str) -> str:
        value = getattr(self.config, name)
        if name == "batch_size":
            return f"batch_size {value} with gradient_accumulation {self.config.gradient_accumulation}"
        return f"{name} {str(value).lower() if isinstance(value, bool) else value}"

    def _remedies(self) -> str:
        parts = ["make smaller pictures", "use a card with more memory"]
        if self.config.rank:
            parts.insert(1, "lower rank" if self.config.rank > 4 else "choose fewer targets")
        else:
            parts.insert(0, "train a LoRA (rank 1 or more), which needs no copy of the model")
        words = ", or ".join(parts)
        return words[0].upper() + words[1:]


def plan(
    measured: Measured,
    config: Config,
    card: int,
    given: Collection[str] = (),
    processes: int = 1,
    eight_bit_moments: bool = False,
    absent: Collection[str] = (),
) -> Plan:
    """The settings nearest to `config` in speed that fit a card of so many bytes; if none do, those that need least.

    Settings that are `given` stay, those that are `absent` there are none of here. `eight_bit_moments` says whether
    there is an optimizer for them.
    """
    fixed = {*given, *absent}
    choices = [
        (slower, changed, measured.memory(config.replace(**changed), processes))
        for slower, changed in _choices(measured, config, fixed, processes, eight_bit_moments)
    ]
    fitting = [choice for choice in choices if choice[2].total <= usable(card)]
    if fitting:
        slower, changed, memory = min(fitting, key=lambda choice: (choice[0], choice[2].total))
    else:
        slower, changed, memory = min(choices, key=lambda choice: (choice[2].total, choice[0]))
    saved = {}
    for name in (name for name in WHY if name in changed):
        own = {name, ACCUMULATION} if name == "batch_size" else {name}
        without = config.replace(**{k: v for k, v in changed.items() if k not in own})
        saved[name] = measured.memory(without, processes).total - memory.total
    offered = {name for _, each in _choices(measured, config, absent, processes, eight_bit_moments) for name in each}
    kept = tuple(name for name in WHY if name in offered and _is_given(name, given))
    loaded = measured.weights + measured.encoders + measured.autoencoder
    return Plan(config.replace(**changed), memory, card, saved, kept, slower, loaded)


def check_full(backbone: nn.Module, config: Config, card: int, eight_bit_moments: bool) -> None:
    """Raise ConfigError where a full copy cannot fit, whatever else is set; nothing is measured, or copied, for it.

    The model in half precision, and of the copy in float32 weights, gradients, average and moments.
    """
    count = sum(p.numel() for p in backbone.parameters())
    moments = EIGHT_BITS if eight_bit_moments and config.optimizer == ADAMW else STATE_SIZES[config.optimizer]
    least = round(count * (2 + 4 * (3 + moments)))
    if least > usable(card):
        raise ConfigError(
            f"rank is 0, and a full copy takes {size_in_words(least)} at least, of which a card of "
            f"{size_in_words(card)} has {size_in_words(usable(card))}: give a rank, which trains a LoRA"
        )


def set_by_hand(config: Config, begins: Mapping[str, Any]) -> set[str]:
    """The settings that differ from where a form `begins`: for those it leaves out, at the trainer's defaults."""
    begun = Config().to_dict() | dict(begins)
    return {name for name, value in config.to_dict().items() if value != begun[name]}


def _is_given(name: str, given: Collection[str]) -> bool:
    return name in given or (name == "batch_size" and ACCUMULATION in given)


def _choices(
    measured: Measured, config: Config, given: Collection[str], processes: int, eight_bit_moments: bool
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Every set of changes with how many times slower it is; the first changes nothing."""
    none: tuple[float, dict[str, Any]] = (1.0, {})
    kinds = {name: [none] for name in WHY}
    if not config.offload and (measured.encoders or (measured.autoencoder and not config.decodes)):
        kinds["offload"].append((OFFLOADED, {"offload": True}))
    own = config.batch_size // processes
    for parts in range(2, own + 1):
        if own % parts == 0:
            batch = {"batch_size": config.batch_size // parts, ACCUMULATION: config.gradient_accumulation * parts}
            kinds["batch_size"].append((HALVED ** math.log2(parts), batch))
    if not config.gradient_checkpointing and measured.passes.one.has_blocks:
        kinds["gradient_checkpointing"].append((CHECKPOINTED, {"gradient_checkpointing": True}))
    if eight_bit_moments and config.optimizer == ADAMW:
        kinds["optimizer"].append((EIGHT_BIT_MOMENTS, {"optimizer": ADAMW8BIT}))
    if config.rank and config.base_precision != INT8 and measured.packing > 0:
        kinds["base_precision"].append((EIGHT_BIT_WEIGHTS, {"base_precision": INT8}))
    possible = [[none] if _is_given(name, given) else found for name, found in kinds.items()]
    for combination in itertools.product(*possible):
        changed = {key: value for _, each in combination for key, value in each.items()}
        yield math.prod(slower for slower, _ in combination), changed
