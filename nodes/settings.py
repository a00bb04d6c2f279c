"""Inputs of nodes made from the trainer's settings, which alone know defaults, bounds and help."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from comfy_api.latest import io

from ..trainer.config import Config
from ..trainer.groups import OF_GUIDANCE, OF_SIZES

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
MOST = 2**31 - 1
# What a first training needs not, among what nodes ask for: the page folds it away until it is asked for.
FOLDED = ("gradient_checkpointing", "prompt_prefix", "prompt_suffix", "bake_affixes", *OF_GUIDANCE, *OF_SIZES)


def widgets(names: Iterable[str], optional: bool = False, **defaults: Any) -> list:
    """Inputs for some settings; those in `defaults` begin with another value than the trainer's.

    `optional` ones may be missing, as they are in workflows from before they were there.
    """
    made = [widget(name, defaults.get(name), optional) for name in names]
    for each in made:
        if each.id in FOLDED:  # newer ComfyUIs take `advanced=True`, which older ones refuse; both send what is here
            each.extra_dict = {"advanced": True}
    return made


def widget(name: str, default: Any = None, optional: bool = False):
    """A node's input for one setting, which begins with its field's default or another."""
    about = FIELDS[name].metadata
    default = FIELDS[name].default if default is None else default
    options = {"default": default, "tooltip": about["help"], "optional": optional}
    if about["choices"]:
        return io.Combo.Input(name, options=list(about["choices"]), **options)
    if isinstance(default, bool):
        return io.Boolean.Input(name, **options)
    if isinstance(default, str):
        return io.String.Input(name, dynamic_prompts=False, **options)
    if isinstance(default, int):
        # Else the page draws another seed after every run, and with it the next one would have other pairs.
        options["control_after_generate"] = False
        return io.Int.Input(name, min=about["low"] or 0, max=about["high"] or MOST, **options)
    low = -10.0 if about["low"] is None else float(about["low"])
    return io.Float.Input(name, min=low, max=float(about["high"] or 1e6), step=_step(default), **options)


def _step(default: float) -> float:
    """A hundredth, or a tenth of the default's last digit, so that the page does not round it away."""
    digits = 2
    while round(default, digits) != default:
        digits += 1
    return 10.0 ** -(digits + (digits > 2))
