"""The settings of the program's own page, as settings of a distillation: what a user has found good for the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..trainer.config import MOST_LETTERS
from ..trainer.sizes import LARGEST, SMALLEST
from .limits import FIELDS

# What is read of such a page, by the ids that its components have in AUTOMATIC1111 and Forge, behind `txt2img_`.
READ = ("steps", "sampling", "cfg_scale", "width", "height", "neg_prompt")
OURS = "ADD "  # how the names of our own samplers begin, which are a student's
MULTIPLE = 8  # pixels a side of a latent


@dataclass
class Taken:
    """Values of the form by name, and what there is to say of them; none where `refused` says why."""

    values: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    refused: str = ""

    def in_words(self) -> str:
        """All of it as a person reads it."""
        if self.refused:
            return self.refused
        shown = {name: value for name, value in self.values.items() if name != "negative_prompt"}
        parts = [f"{name.replace('_', ' ')} {_shown(value)}" for name, value in shown.items()]
        if "negative_prompt" in self.values:
            parts.append("the negative prompt" if self.values["negative_prompt"] else "no negative prompt")
        return " ".join([f"Taken over: {', '.join(parts)}.", *self.said])


def take_over(page: Mapping[str, Any]) -> Taken:
    """What a page's values (READ) come to here: clipped to what there is, and told where something is not the same."""
    sampler = str(page.get("sampling") or "")
    if sampler.startswith(OURS):
        return Taken(
            refused=f"Nothing is taken over: txt2img is set for a student ({sampler}). Choose there what you use the "
            "model at without one"
        )
    taken = Taken()
    _number(taken, "pair_steps", page.get("steps"), int)
    taken.values["pair_sampler"], same = nearest(sampler)
    if not same:
        taken.said.append(f"The nearest to the sampler {sampler or 'chosen'} is {taken.values['pair_sampler']}.")
    _number(taken, "guidance", page.get("cfg_scale"), float)
    for name in ("width", "height"):
        _side(taken, name, page.get(name))
    negative = str(page.get("neg_prompt") or "").strip()
    if negative and taken.values.get("guidance") == 1:
        negative = ""
        taken.said.append("At CFG Scale 1 the negative prompt does nothing: it is left out.")
    if len(negative) > MOST_LETTERS:
        negative = negative[:MOST_LETTERS]
        taken.said.append(f"The negative prompt is cut to {MOST_LETTERS} letters.")
    taken.values["negative_prompt"] = negative
    return taken


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def nearest(sampler: str) -> tuple[str, bool]:
    """Of the teacher's samplers the one that is nearest to one of the program's, and whether it is that one."""
    name = sampler.lower()
    if name.startswith("dpm++ 2m"):
        return "dpmpp_2m", "sde" not in name
    return "euler", name == "euler"


def _number(taken: Taken, name: str, value: Any, kind: type) -> None:
    about = FIELDS[name].metadata
    _clipped(taken, name, value, kind, about["low"], about["high"])


def _side(taken: Taken, name: str, value: Any) -> None:
    _clipped(taken, name, value, int, SMALLEST, LARGEST)
    if odd := taken.values.get(name, 0) % MULTIPLE:
        taken.values[name] -= odd
        taken.said.append(f"{name} {value} is no multiple of {MULTIPLE}: it is {taken.values[name]} here.")


def _clipped(taken: Taken, name: str, value: Any, kind: type, low: float, high: float) -> None:
    """Take a number over within its bounds; one that is none stays what it is in the form."""
    try:
        found = kind(value)
        int(found)  # neither infinity nor NaN
        clipped = kind(min(max(found, low), high))
    except (TypeError, ValueError, OverflowError):
        taken.said.append(f"{name.replace('_', ' ')} is no number there: it stays as it is.")
        return
    if clipped != found:
        taken.said.append(f"{name.replace('_', ' ')} {_shown(found)} is out of bounds: it is {_shown(clipped)} here.")
    taken.values[name] = clipped
