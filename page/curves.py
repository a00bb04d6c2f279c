"""The live curves of a run as SVG drawings, which every gradio shows, and which need no library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 460, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 8, 30  # margins about the curves
COLOURS = ("#3d94e0", "#e0803a", "#35a86b", "#b865cc", "#b08d12", "#d6546c")  # seen on dark and on light ground
HEALTH = ("accuracy", "pixel_accuracy", "saturation", "sharpness", "diversity")
GOOD = "#35a86b"

Values = Sequence[float | None]


@dataclass(frozen=True)
class Curve:
    """A curve, what its legend says of it, and whether its points are few enough to be marked."""

    name: str
    updates: Sequence[float]
    values: Values
    latest: str = ""
    few: bool = False


def charts(snapshot: Mapping[str, Any]) -> str:
    """Losses and health of a run's snapshot; "" before the first update."""
    if not snapshot["history"]["update"]:
        return ""
    return f'<div class="turbodistill-charts">{losses(snapshot)}{health(snapshot)}</div>'


def losses(snapshot: Mapping[str, Any]) -> str:
    """The losses, and the scores by which the best student is chosen, over the updates; logarithmic."""
    history = snapshot["history"]
    curves = [_curve(name, history["update"], values) for name, values in history["losses"].items()]
    scores = history["scores"]
    if scores["update"]:
        curves.append(Curve("held-out score", scores["update"], scores["score"], _short(scores["score"][-1]), few=True))
    shown = [v for curve in curves for v in curve.values if v is not None]
    bend = _log if min(shown, default=0) > 0 else _arcsinh  # some adversarial losses fall below zero
    low, high = min(map(bend, shown), default=0.0), max(map(bend, shown), default=1.0)
    room = max(0.05 * (high - low), 0.1)
    low, high = low - room, high + room
    lines = [(bend(v), _short(v)) for v in _decades(shown) if low <= bend(v) <= high]
    return _chart("Losses", curves, bend, low, high, lines)


def health(snapshot: Mapping[str, Any]) -> str:
    """Each measure by its place in its healthy range, which is the band."""
    history, curves = snapshot["history"], []
    for name in HEALTH:
        if values := history["health"].get(name):
            low, high = snapshot["ranges"][name]
            curve = _curve(name, history["update"], [None if v is None else (v - low) / (high - low) for v in values])
            last = next((v for v in reversed(values) if v is not None), None)
            latest = "" if last is None else f"{_short(last)} (healthy {low:g} to {high:g})"
            curves.append(Curve(name, curve.updates, curve.values, latest))
    shown = [v for curve in curves for v in curve.values if v is not None]
    low, high = max(min([-0.3, *shown]), -1.5), min(max([1.3, *shown]), 2.5)
    return _chart("Health", curves, lambda v: v, low, high, [(0.0, "low"), (1.0, "high")], band=(0.0, 1.0))


def _curve(name: str, updates: Sequence[float], values: Values) -> Curve:
    last = next((v for v in reversed(values) if v is not None), None)
    return Curve(name, updates, values, "" if last is None else _short(last))


def _chart(
    title: str,
    curves: Sequence[Curve],
    bend: Callable[[float], float],
    low: float,
    high: float,
    lines: Sequence[tuple[float, str]],
    band: tuple[float, float] | None = None,
) -> str:
    """Curves between `low` and `high`, as bent; horizontal lines with what is written beside them; the legend."""
    first = min((c.updates[0] for c in curves if len(c.updates)), default=0)
    last = max((c.updates[-1] for c in curves if len(c.updates)), default=1)

    def x(update: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (update - first) / max(last - first, 1)

    def y(value: float) -> float:
        place = (min(max(value, low), high) - low) / max(high - low, 1e-9)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * place

    drawn = []
    if band:
        top, bottom = y(band[1]), y(band[0])
        drawn.append(
            f'<rect x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{bottom - top:.1f}" '
            f'fill="{GOOD}" fill-opacity="0.14"/>'
        )
    for value, words in lines:
        drawn.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="currentColor" '
            f'stroke-opacity="0.2"/><text x="{LEFT - 4}" y="{y(value) + 3.5:.1f}" text-anchor="end">{words}</text>'
        )
    for update, anchor in ((first, "start"), (last, "end")) if last > first else ((first, "start"),):
        drawn.append(f'<text x="{x(update):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="{anchor}">{update:g}</text>')
    drawn.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">update</text>')
    for curve, colour in zip(curves, _colours(), strict=False):
        drawn.append(_drawn(curve, colour, x, lambda value: y(bend(value))))
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{escape(curve.name)} <b>{escape(curve.latest)}</b></span>'
        for curve, colour in zip(curves, _colours(), strict=False)
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" fill="currentColor" '
        f'font-size="10">{"".join(drawn)}</svg><figcaption><em>{title}</em>{legend}</figcaption></figure>'
    )


def _drawn(curve: Curve, colour: str, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    points = [(x(at), y(v)) for at, v in zip(curve.updates, curve.values, strict=True) if v is not None]
    path = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
    dots = points if curve.few or len(points) == 1 else []  # one point makes no line
    marks = "".join(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="2.5" fill="{colour}"/>' for left, top in dots)
    dashed = ' stroke-dasharray="4 4"' if curve.few else ""
    line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dashed}/>'
    return f"<g><title>{escape(curve.name)} {escape(curve.latest)}</title>{line}{marks}</g>"


def _colours():
    while True:
        yield from COLOURS


def _log(value: float) -> float:
    return math.log10(max(value, 1e-12))


def _arcsinh(value: float) -> float:
    """Nearly a logarithm above a hundredth on both sides of zero."""
    return math.asinh(value / 0.01) / math.log(10)


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten, and zero, that lie among the values or beside them."""
    most = max((abs(v) for v in values), default=1.0)
    least = min((abs(v) for v in values if v), default=most)
    powers = [10.0**k for k in range(math.floor(math.log10(least or 1)), math.ceil(math.log10(most or 1)) + 1)]
    if min(values, default=1.0) > 0:
        return powers
    powers = [p for p in powers if p >= 0.01]  # nearer to zero they would lie upon it
    return [*(-p for p in powers), 0.0, *powers]


def _short(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"
