"""The page that makes pictures while one types."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..core.card import CardError
from ..generate.generator import Generator, Made
from ..generate.sample import check_numbers
from ..trainer.config import MOST_SEED, ConfigError
from ..trainer.data.choices import check_choices
from . import fields, job, view
from .events import asking, listen, stamp
from .pictures import data_urls

MOST = 16  # pictures at once
STEPS = 4
# Small pictures are shown in squares of their pixels, as large as there is room.
STYLE = """<style>
.turbodistill-made { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 280px)); gap: 8px; }
.turbodistill-made img { display: block; width: 100%; max-width: none; margin: 0 !important; border-radius: 4px; }
.turbodistill-made img[src^="data:image/png"] { image-rendering: pixelated; }
.turbodistill-pace { font-size: 15px; font-variant-numeric: tabular-nums; }
.turbodistill-pace b { font-weight: 600; }
</style>"""


def add_components(
    generator: Generator, students: Callable[[], dict[str, Path]], example: str, blocks: gr.Blocks
) -> None:
    """The page, in `blocks`, which is open; `students` gives the files by name."""
    with gr.Column(elem_id="turbodistill-generate"):
        _add(generator, students, example, blocks)


def _add(generator: Generator, students: Callable[[], dict[str, Path]], example: str, blocks: gr.Blocks) -> None:
    gr.HTML(view.STYLE + STYLE, elem_classes="turbodistill-hidden")  # a tab brings its style when it is first opened
    names = list(students())
    prompt = gr.Textbox(
        value=example,
        label="Prompt",
        info="Pictures come while you type",
        lines=1,
        elem_id="turbodistill-prompt",
        autofocus=True,
    )
    with gr.Row():
        count = gr.Slider(1, MOST, value=4, step=1, label="Pictures", elem_id="turbodistill-count")
        steps = gr.Slider(1, STEPS, value=1, step=1, label="Steps", elem_id="turbodistill-steps")
        for slider in (count, steps):  # gradio's own check answers with an error that has no words
            setattr(slider, "preprocess", lambda number: number)  # noqa: B010 - a method, to a type checker
        seed = gr.Number(value=0, label="Seed of the first", elem_id="turbodistill-seed")
        student = gr.Dropdown(
            choices=names, value=names[0] if names else None, label="Student", elem_id="turbodistill-student"
        )
    pace = gr.HTML("", elem_id="turbodistill-pace")
    made = gr.HTML("", elem_id="turbodistill-made")
    inputs = [prompt, count, steps, seed, student]

    def answer(*values: Any) -> list[Any]:
        return pictures(generator, students(), *values)

    # The newest gradio's `input` tells of letters alone, not of what is pasted or deleted.
    for trigger in (blocks.load, prompt.change, count.change, steps.change, seed.change, student.change):
        listen(trigger, answer, inputs, [pace, made], latest=True)
    ask = gr.Button("Ask", elem_id="turbodistill-follow", elem_classes="turbodistill-hidden")
    answered = gr.HTML("")
    seen = gr.State(value=_seen(students()))
    shown = [seen, answered, student, pace, made]
    listen(blocks.load, None, js=asking("turbodistill-follow", "turbodistill-generate"))
    listen(ask.click, lambda before, *values: follow(generator, students(), before, *values), [seen, *inputs], shown)


def _seen(students: dict[str, Path]) -> dict[str, Any]:
    """The students, and the newest job: a short one may begin and end between two looks."""
    newest = job.current()
    return {"students": list(students), "job": [newest.begun, newest.working] if newest else None}


def follow(generator: Generator, students: dict[str, Path], before: dict[str, Any], *values: Any) -> list[Any]:
    """What a distillation changes on the page that had seen `before`: the list, and which student draws, the newest."""
    now = _seen(students)
    new = next((name for name in now["students"] if name not in before["students"]), None)
    listed, drawn = gr.update(), [gr.update(), gr.update()]
    if now["students"] != before["students"]:
        listed = gr.update(choices=now["students"], **({"value": new} if new else {}))
    if now["job"] != before["job"] and not new:  # another student draws by itself
        drawn = pictures(generator, students, *values)
    return [now, stamp(), listed, *drawn]


def pictures(
    generator: Generator,
    students: dict[str, Path],
    prompt: str,
    count: float,
    steps: float,
    seed: float | None,
    student: str | None,
) -> list[Any]:
    """What the page shows for its inputs: the pace, and the pictures, or why there are none: never those of others."""
    prompt = str(prompt or "")
    if job.running():
        generator.drop()
        words = "A distillation runs: generation waits until it has ended. The pictures of this prompt come then."
        return [view.box(words, "warn"), ""]
    try:
        path, seeds, passes = _asked(students, prompt, count, steps, seed, student)
    except ValueError as error:
        generator.drop()  # else the pictures of what was typed before come after these words, in their place
        return [view.box(str(error), "bad"), ""]
    try:
        made = generator.make(path, prompt, seeds, passes)
    except (CardError, ValueError, OSError) as error:
        return [view.box(str(error), "bad"), ""]
    if made is None:
        return [gr.update(), gr.update()]
    shown = "".join(f'<img src="{url}" alt="{escape(prompt)}">' for url in data_urls(made.pictures))
    said = "".join(view.box(remark, "warn") for remark in made.remarks)
    return [_pace(made) + said, f'<div class="turbodistill-made">{shown}</div>']


def _asked(
    students: dict[str, Path], prompt: str, count: Any, steps: Any, seed: Any, student: Any
) -> tuple[Path, range, int]:
    """The student's file, the seeds and the steps; raises ValueError for what cannot be."""
    if not isinstance(student, str) or student not in students:
        raise ConfigError("no student is chosen: choose one, or distil one in the other tab")
    first, count = _whole("seed", seed or 0, 0, MOST_SEED), _whole("pictures", count, 1, MOST)
    check_numbers(count, first)
    check_choices([prompt])
    return students[student], range(first, first + count), _whole("steps", steps, 1, STEPS)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    """A number that the page sent; raises ConfigError for one out of bounds."""
    number = fields.number(name, value)
    if not low <= number <= high:
        raise ConfigError(f"{name} is {value!s:.100}: give {low} to {high}")
    return number


def _pace(made: Made) -> str:
    count, ms = len(made.pictures), 1000 * made.seconds
    pace = f"<b>{ms / count:.1f} ms</b> a picture, <b>{count / made.seconds:.0f}</b> pictures a second"
    whole = f"{count} picture{'s' * (count > 1)} in {ms:.0f} ms, text and autoencoder included"
    return f'<div class="turbodistill-pace">{pace} ({whole})</div>'
