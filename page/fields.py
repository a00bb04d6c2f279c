"""Inputs of a page made from the trainer's settings, which alone know defaults, bounds and help."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import gradio as gr

from ..trainer.config import MOST_LETTERS
from ..trainer.setting import KINDS, ConfigError, shown
from .limits import FIELDS, Limits, offered

SHORT = {"lr", "ema", "r1"}
EMPTY = {str: "", bool: False}  # what a page makes of nothing, where that is a value


def component(name: str, value: Any = None, limits: Limits | None = None) -> Any:
    """An input for one setting, which begins with its field's default or another value."""
    field = FIELDS[name]
    about, kind = offered(limits or {})[name], type(field.default)
    options = {
        "value": field.default if value is None else value,
        "label": label(name),
        "info": about["help"],
        "elem_id": f"turbodistill-{name}",
    }
    if about["choices"]:
        return gr.Dropdown(choices=list(about["choices"]), **options)
    if "offers" in about:
        return gr.Dropdown(choices=about["offers"], allow_custom_value=True, **options)
    if kind is bool:
        return gr.Checkbox(**options)
    if kind is str:
        return gr.Textbox(lines=2 if is_long(name) else 1, **options)
    # Neither bounds nor precision: gradio would answer with an error that has no words, and cut 2.5 to 2.
    return gr.Number(**options)


def components(names: Iterable[str], values: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Inputs for some settings, in two columns; those in `values` begin with another value than the trainer's."""
    made = {}
    for row in rows(names):
        with gr.Row():
            for name in row:
                made[name] = component(name, values.get(name), limits)
    return made


def rows(names: Iterable[str]) -> list[list[str]]:
    """Settings by two, in their order; a prompt has a row of its own."""
    found: list[list[str]] = []
    for name in names:
        beside = found and len(found[-1]) == 1 and not any(map(is_long, (found[-1][0], name)))
        if beside:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def is_long(name: str) -> bool:
    """Whether a setting is a text as long as prompts are."""
    return FIELDS[name].metadata["high"] == MOST_LETTERS


def grouped(names: Iterable[str], values: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Inputs for some settings under the titles of their groups."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(FIELDS[name].metadata["group"], []).append(name)
    made = {}
    for group, members in groups.items():
        with gr.Accordion(group.capitalize(), open=False):
            made |= components(members, values, limits)
    return made


def settings(names: Iterable[str], values: Iterable[Any]) -> dict[str, Any]:
    """What a page sent, as values of the settings; raises ConfigError for a number that was left out."""
    chosen = {}
    for name, value in zip(names, values, strict=True):
        kind = type(FIELDS[name].default)
        if value is None and kind not in EMPTY:
            raise ConfigError(f"{name} is empty: give a number")
        chosen[name] = EMPTY[kind] if value is None else number(name, value, kind)
    return chosen


def number(name: str, value: Any, kind: type = int) -> Any:
    """A value that a page sent as a number of this kind (or a text, or yes or no); raises ConfigError."""
    try:
        made = kind(value)
    except (ValueError, TypeError, OverflowError):
        made = None
    if made is None or (kind is int and made != value):
        raise ConfigError(f"{name} is {shown(value)}: give {KINDS[kind]}")
    return made


def label(name: str) -> str:
    """A setting's name as a person reads it."""
    first, *rest = name.split("_")
    return " ".join([first.upper() if first in SHORT else first.capitalize(), *rest])
