"""One setting: its default, bounds and help, and what is said of a value or a name that cannot be."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

FEW = 5  # settings whose help has a word that still tells them from the others


class ConfigError(ValueError):
    """A setting that cannot be: the message names it, its value, and what would do."""


# Types as a person calls them, who may have written TOML, JSON or a form.
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object {...}"}


def shown(value: object) -> str:
    """A value as a person writes it."""
    written = {None: "empty", True: "true", False: "false"}
    return written[value] if value is None or isinstance(value, bool) else f"{value!r:.100}"


def option(
    default: Any,
    help: str,
    group: str,
    choices=None,
    low: float | None = None,
    high: float | None = None,
    offers: Sequence[str] = (),
):
    """A field of Config with what its front ends show; a text of any kind may be one of what it `offers`."""
    about = {"help": help, "group": group, "choices": choices and tuple(choices), "low": low, "high": high}
    about |= {"offers": list(offers)} if offers else {}
    return field(default=default, metadata=about)


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Raise ConfigError for a value of the right type that is out of bounds, or a text that nothing can read."""
    name, about = field.name, field.metadata
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}: give a finite number")
    if about["choices"] and value not in about["choices"]:
        raise ConfigError(f"{name} is {value!r:.100}: use one of {', '.join(about['choices'])}")
    size, words = (len(value), f"has {len(value)} letters") if isinstance(value, str) else (value, f"is {value!s:.100}")
    if about["low"] is not None and size < about["low"]:
        raise ConfigError(f"{name} {words}: the least is {about['low']}")
    if about["high"] is not None and size > about["high"]:
        raise ConfigError(f"{name} {words}: the most is {about['high']}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise ConfigError(f"{name} is no valid text ({half!r} is half a letter): type it again") from None


def told_names(init: Callable[..., None]) -> Callable[..., None]:
    """`__init__` that raises ConfigError, not TypeError, for a name that is no setting."""

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        for name in sorted(values.keys() - self.__dataclass_fields__.keys()):
            near = nearest(name, dataclasses.fields(self))
            known = f"the nearest is {near!r}" if near else "`turbodistill distill --help` lists them all"
            raise ConfigError(f"there is no setting {name!r:.100}: {known}")
        init(self, *args, **values)

    return checked


def nearest(name: str, fields: Sequence[dataclasses.Field]) -> str | None:
    """The setting of `fields` that an unknown name most likely means; None where no setting is near.

    By the words of its name, by those in its help, by its spelling.
    """
    words = set(name.lower().split("_"))
    explaining = [f for f in fields if all(word in f.metadata["help"].lower() for word in words)]
    explaining = explaining if len(explaining) <= FEW else []

    def likeness(field: dataclasses.Field) -> tuple[int, bool, int, float]:
        spelling = difflib.SequenceMatcher(None, name, field.name).ratio()
        # Of several that a help explains alike, the plainest: `lr` for learning_rate.
        return len(words & set(field.name.split("_"))), field in explaining, -len(field.name), spelling

    known = [f for f in fields if words & set(f.name.split("_")) or f in explaining]
    if known:
        return max(known, key=likeness).name
    return next(iter(difflib.get_close_matches(name.lower(), [f.name for f in fields], 1, 0.7)), None)
