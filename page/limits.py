"""Which of the trainer's settings there are in a program, and within which bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..trainer.config import Config, ConfigError

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
Limits = Mapping[str, Mapping[str, Any] | None]  # what differs of some settings' bounds and help; None: not offered


def offered(limits: Limits) -> dict[str, dict[str, Any]]:
    """The settings that there are within these limits, with their metadata."""
    return {
        name: {**field.metadata, **(limits.get(name) or {})}
        for name, field in FIELDS.items()
        if limits.get(name, field) is not None
    }


def check(config: Config, limits: Limits, host: str) -> None:
    """Raise ConfigError for a setting that cannot be within these limits, in a program called `host`."""
    known = offered(limits)
    for name, field in FIELDS.items():
        value = getattr(config, name)
        if name not in known and value != field.default:
            raise ConfigError(f"{name} is {value!r}: {host} cannot do this, leave it out or distil on the command line")
        low = known[name]["low"] if name in known else None
        if low is not None and value < low:
            raise ConfigError(f"{name} is {value!r}: give {low} or more in {host}")
