"""A run in words, the same on every page."""

from __future__ import annotations

from typing import Any

SUBJECTS = {"pairs": "Teacher pairs", "estimate": "Estimate"}  # pairs are named by a key that tells nobody anything


def headline(kind: str, name: str, state: str, what: str, best: dict[str, Any] | None) -> str:
    """What a run is at, in a line."""
    subject = SUBJECTS.get(kind, name)
    if state == "working":
        if not what:
            return f"{subject}: waiting for the model"
        if what == "training":
            return f"Training {name}"
        return f"Making {what}" + (f" for {name}" if kind == "distill" else "")
    chosen = f"; the best student is that of update {best['update']} (score {best['score']:.3g})" if best else ""
    return {
        "done": f"{subject}: done{chosen}",
        "stopped": f"{subject}: stopped as asked{chosen}",
        "cancelled": f"{subject}: cancelled; the next run goes on from there",
        "failed": f"{subject}: failed",
    }[state]


def figures(
    state: str, done: int, total: int, unit: str, rate: float | None, left: float | None, best: dict[str, Any] | None
) -> str:
    """How far, how fast (`rate` seconds for one), how long yet (`left` seconds)."""
    if not total:
        return ""
    parts = [f"{done} of {total} {unit}"]
    if state == "working":
        if rate:
            parts.append(f"{1 / rate:.3g} {unit} a second" if rate < 1 else f"{rate:.3g} s each")
        if left is not None:
            parts.append(f"{duration(left)} left")
        if best:
            parts.append(f"best so far: update {best['update']} (score {best['score']:.3g})")
    return " · ".join(parts)


def warning(update: int, text: str) -> str:
    """A warning, with its update where it has one."""
    return f"Update {update}: {text}" if update else text


def duration(seconds: float) -> str:
    """Seconds in the units that fit."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min {whole % 60} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
