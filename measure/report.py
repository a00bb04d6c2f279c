"""The report of a distillation: one self-contained HTML page, and its picture grid as a PNG."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..core.card import StudentCard
from ..trainer.data.files import write_whole
from ..trainer.data.images import to_image
from ..trainer.loop.health import RANGES
from .evaluate import Floor, Score, Timing

SCALE = 2  # small pictures are shown at twice their size


@dataclass(frozen=True)
class Column:
    """One arm of the grid: its title, a line below it, and a picture (3, H, W) for every prompt."""

    title: str
    note: str
    pictures: Sequence[Tensor]


def grid(columns: Sequence[Column], prompts: Sequence[str]) -> Image.Image:
    """Rows of the same prompt and noise, a column an arm, titles above and prompts beside."""
    side = columns[0].pictures[0].shape[-1] * (SCALE if columns[0].pictures[0].shape[-1] <= 128 else 1)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    text_width, gap, top = 210, 12, 54
    sheet = Image.new("RGB", (text_width + len(columns) * (side + gap), top + len(prompts) * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, column in enumerate(columns):
        left = text_width + k * (side + gap)
        draw.text((left, 8), column.title, "#111", font)
        draw.text((left, 30), column.note, "#666", small)
        for row, picture in enumerate(column.pictures):
            shown = to_image(picture).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(shown, (left, top + row * (side + gap)))
    for row, prompt in enumerate(prompts):
        for line, words in enumerate(_wrap(prompt, 30)):
            draw.text((8, top + row * (side + gap) + 8 + 15 * line), words, "#333", small)
    return sheet


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def curves(history: Path) -> str:
    """Losses and health over the updates as an SVG drawing, smoothed, with the healthy ranges shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with history.open(newline="") as file:
        rows = list(csv.DictReader(file))
    updates = np.array([int(r["update"]) for r in rows])
    losses = [k for k in rows[0] if k not in ("update", "seconds", *RANGES)]
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 5.4), layout="constrained")
    for name in losses:
        values = np.array([float(r[name]) if r.get(name) else np.nan for r in rows])
        axes[0, 0].plot(updates, _smooth(values), label=name)
    axes[0, 0].set_title("losses (weighted)")
    axes[0, 0].legend(fontsize=8)
    has_discriminator = [bool(float(r["accuracy"])) for r in rows]
    for axis, name in zip(list(axes.flat)[1:], (n for n in RANGES if not n.startswith("pixel_")), strict=True):
        values = np.array([float(r[name]) for r in rows])
        if name in ("accuracy", "logit_gap"):
            values = np.where(has_discriminator, values, np.nan)
        low, _, high, _ = RANGES[name]
        smoothed = _smooth(values)
        axis.plot(updates, smoothed, color="#335")
        shown = smoothed[np.isfinite(smoothed)]
        bottom, ceiling = (shown.min(), shown.max()) if len(shown) else (low, high)
        margin = 0.1 * max(ceiling - bottom, 0.1)
        axis.set_ylim(bottom - margin, ceiling + margin)
        axis.axhspan(low, high, color="#cec", alpha=0.5, zorder=0)
        axis.set_title(name.replace("_", " "))
    for axis in axes[1]:
        axis.set_xlabel("update")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _smooth(values: np.ndarray, width: int = 25) -> np.ndarray:
    """Running mean over the finite values of a window."""
    good = np.isfinite(values)
    kernel = np.ones(min(width, len(values)))
    total = np.convolve(np.where(good, values, 0), kernel, "same")
    count = np.convolve(good.astype(float), kernel, "same")
    return np.where(good, total / np.maximum(count, 1), np.nan)


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
.lead { color: #555; margin-top: 0 } img, svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .9rem }
td, th { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } tr.ours { background: #eef7ee; font-weight: 600 }
pre { background: #f6f6f6; padding: 1rem; white-space: pre-wrap; font-size: .85rem }
.facts { display: flex; gap: 2.5rem; margin: 1.2rem 0 } .facts b { display: block; font-size: 1.6rem }
"""


@dataclass(frozen=True)
class Report:
    """What goes onto the page."""

    title: str
    columns: Sequence[Column]
    prompts: Sequence[str]
    scores: dict[str, Score]
    floor: Floor
    timings: dict[str, Timing]
    card: StudentCard
    history: Path
    ours: str  # the arm that is the student
    teacher: str  # the arm that it is compared with


def write(report: Report, folder: Path) -> Path:
    """Write `report.html` and `grid.png` into the folder; returns the page's path."""
    picture = png(grid(report.columns, report.prompts))
    write_whole(folder / "grid.png", picture)
    slow, fast = report.timings[report.teacher], report.timings[report.ours]
    facts = [
        (f"{slow.seconds / fast.seconds:.0f}x", f"faster than {report.teacher}, prompt to picture"),
        (f"{fast.passes} : {slow.passes}", "denoiser passes a picture"),
        (f"{1000 * fast.seconds:.0f} ms", "a picture on this machine"),
        (f"{report.scores[report.ours].style:.0%}", "of pictures in the style that the prompt names"),
    ]
    body = [
        f"<h1>{html.escape(report.title)}</h1>",
        "<p class=lead>The same prompts and the same noise in every row; no picture was chosen by hand. The upper half "
        "is of names that the teacher was trained on, the lower half of others.</p>",
        "<div class=facts>" + "".join(f"<div><b>{a}</b>{html.escape(b)}</div>" for a, b in facts) + "</div>",
        f'<img alt="Pictures of every arm" src="data:image/png;base64,{base64.b64encode(picture).decode()}">',
        "<h2>Measured</h2>",
        _table(report),
        "<p>Measured on more pictures, all of names that neither teacher nor student was trained on. KID and FD are "
        "distances to real pictures of such names on features of EfficientNet-Lite0, a network that the discriminator "
        "never saw (lower is better; they are not Inception's FID). Diversity and sharpness are ratios; 1 is the "
        "teacher's, and the real pictures'. The last row compares real pictures of the training names with them: "
        "no model can be expected below it. Styles are told by a classifier that was fitted to real pictures.</p>",
        "<h2>Training</h2>",
        "<p>Smoothed over 25 updates; green is the healthy range.</p>",
        curves(report.history),
        "<h2>The student says of itself</h2>",
        f"<pre>{html.escape(report.card.in_words())}</pre>",
    ]
    head = f"<meta charset=utf-8><title>{html.escape(report.title)}</title><style>{STYLE}</style>"
    page = f"<!doctype html><html lang=en>{head}{''.join(body)}</html>"
    path = folder / "report.html"
    write_whole(path, page.encode())
    return path


def _table(report: Report) -> str:
    heads = (
        "",
        "KID x 1000 [95 %]",
        "FD",
        "precision",
        "recall",
        "style",
        "diversity",
        "sharpness",
        "seconds",
        "passes",
    )
    rows = []
    for name, s in report.scores.items():
        timing = report.timings.get(name)
        cells = [name, str(s.kid), f"{s.fd:.0f}", f"{s.precision:.2f}", f"{s.recall:.2f}", f"{s.style:.0%}"]
        cells += [f"{s.diversity:.2f}", f"{s.sharpness:.2f}"]
        cells += [f"{timing.seconds:.3f}", str(timing.passes)] if timing else ["", ""]
        tag = " class=ours" if name == report.ours else ""
        rows.append(f"<tr{tag}>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    real = ["real pictures", str(report.floor.kid), "", "", "", f"{report.floor.style:.0%}", *[""] * 4]
    rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in real) + "</tr>")
    return "<table><tr>" + "".join(f"<th>{h}</th>" for h in heads) + "</tr>" + "".join(rows) + "</table>"
