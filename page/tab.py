"""The training tab: one page of plain gradio over a backend, in a WebUI or alone.

The page holds nothing of a run. It asks for the running job's snapshot while it is looked at, so it
may be closed, opened again, or opened twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..trainer.config import ConfigError
from ..trainer.groups import OF_DISTILL, OF_PAIRS, OF_VRAM, PLAIN_ONLY
from . import curves, fields, job, runs, view
from .backend import Backend
from .events import asking, listen, stamp
from .limits import FIELDS
from .request import Request
from .take_over import READ, take_over

TEXT, FILE, CAPTIONS = "the text below", "a text file, or pictures", "the captions of my pictures"
BUILT_IN = "built in: "
EXAMPLE = "a {red|black|white} {fox|cat|owl} in a {forest|city|garden}, {photo|oil painting}"
MAIN = (*OF_PAIRS, *OF_DISTILL, *OF_VRAM)
MORE = tuple(name for name in FIELDS if name not in (*MAIN, *PLAIN_ONLY))  # in their groups
SETTINGS = (*MAIN, *MORE)
OF_RUN = ("name", "source", "text", "file", "images", "width", "height")  # what else the form asks for
MISTAKES = (ValueError, OSError, job.Busy, job.NothingRuns, job.NoTraining)


@dataclass(frozen=True)
class Form:
    """The inputs by name: those of OF_RUN, and the trainer's settings."""

    run: dict[str, Any]
    settings: dict[str, Any]

    def inputs(self) -> list[Any]:
        return [*(self.run[name] for name in OF_RUN), *(self.settings[name] for name in SETTINGS)]


def build(backend: Backend) -> gr.Blocks:
    """The tab, as Blocks of its own."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        add_components(backend, blocks)
    return blocks


def add_components(backend: Backend, blocks: gr.Blocks) -> None:
    """The tab's components, and what they do, in `blocks`, which is open."""
    gr.HTML(view.STYLE, elem_classes="turbodistill-hidden")
    with gr.Row():
        with gr.Column(scale=1, min_width=380):
            gr.HTML(view.box(_introduction(backend)))
            take = (
                gr.Button("Take over txt2img's settings", elem_id="turbodistill-take") if backend.page_fields else None
            )
            form = _form(backend)
        with gr.Column(scale=1, min_width=380, elem_id="turbodistill-live"):
            with gr.Row(equal_height=True):
                estimate = gr.Button("Estimate", elem_id="turbodistill-estimate")
                pairs = gr.Button("Make teacher pairs", elem_id="turbodistill-make-pairs")
                distil = gr.Button("Distil", variant="primary", elem_id="turbodistill-distil")
            with gr.Accordion("Earlier runs", open=False, elem_id="turbodistill-earlier"):
                chosen = gr.Dropdown(
                    choices=_lines(backend),
                    label="Run",
                    info="What was begun here, and how far it came",
                    allow_custom_value=True,  # what was chosen changes its words as the run goes on
                    elem_id="turbodistill-runs",
                )
                with gr.Row():
                    resume = gr.Button("Resume", elem_id="turbodistill-resume")
                    fill = gr.Button("Fill in the form from it", elem_id="turbodistill-fill")
            said = gr.HTML("", elem_id="turbodistill-said")
            status = gr.HTML(view.idle(backend.checkpoint(), backend.refusal()), elem_id="turbodistill-status")
            with gr.Row(equal_height=True):
                stop = gr.Button("Stop and keep best", elem_id="turbodistill-stop", interactive=False)
                preview = gr.Button("Preview now", elem_id="turbodistill-preview", interactive=False)
                cancel = gr.Button("Cancel", variant="stop", elem_id="turbodistill-cancel", interactive=False)
            charts = gr.HTML("", elem_id="turbodistill-charts")
            pictures = gr.HTML("", elem_id="turbodistill-pictures")
            ask = gr.Button("Ask", elem_id="turbodistill-ask", elem_classes="turbodistill-hidden")
    shown = gr.State(value={})
    live = [shown, status, charts, pictures, stop, preview, cancel, chosen]

    def begin(kind: str) -> Callable[..., str]:
        return lambda *values: _say(lambda: job.start(backend, request(kind, values)))

    def go_on(line: str | None) -> str:
        return _say(lambda: job.start(backend, runs.asked(backend.runs_folder(), _name(line))))

    def wish(what: Callable[[job.Job], None]) -> Callable[[], str]:
        return lambda: _say(lambda: what(job.must_run()))

    listen(blocks.load, None, js=asking("turbodistill-ask", "turbodistill-live"))
    listen(blocks.load, last_asked, [], form.inputs())  # a page that is opened again shows what it has begun
    listen(ask.click, lambda before: refresh(backend, before), [shown], live)
    for button, answer, inputs in (
        (estimate, begin("estimate"), form.inputs()),
        (pairs, begin("pairs"), form.inputs()),
        (distil, begin("distill"), form.inputs()),
        (resume, go_on, [chosen]),
        (stop, wish(job.Job.stop), []),
        (preview, wish(job.Job.preview), []),
        (cancel, wish(job.Job.cancel), []),
    ):
        listen(button.click, answer, inputs, [said])
    listen(fill.click, lambda line: filled(backend, line), [chosen], [said, *form.inputs()])
    if take:
        read = [backend.page_fields[name] for name in READ]
        listen(take.click, lambda *values: taken_over(values), read, [said, *form.inputs()])
    source = form.run["source"]
    listen(source.change, _visible, [source], [form.run["text"], form.run["file"]])


def _introduction(backend: Backend) -> str:
    return (
        f"Makes a one-step student of the checkpoint that is loaded in {backend.name}. It works in the background on "
        "the weights that are loaded: generation waits until it has ended. Everything is saved as it goes: the page "
        "may be closed, and a run that was cancelled goes on."
    )


def _form(backend: Backend) -> Form:
    width, height = backend.sizes
    pixels = f"Pixels; 0 is the model's own, now {width} x {height}"
    name = gr.Textbox(
        value="my-turbo",
        label="Name",
        info="Of the run and of the student's file; a run of this name goes on",
        max_lines=1,
        elem_id="turbodistill-name",
    )
    built_in = [BUILT_IN + title for title in backend.prompts()]
    first = built_in[0] if built_in else TEXT
    source = gr.Dropdown(
        choices=[*built_in, TEXT, FILE, CAPTIONS],
        value=first,
        label="Prompts",
        info="Prompts like those you will use later are best. Built in are lists in sentences (prose) and in booru "
        "tags; auto takes what suits the model",
        elem_id="turbodistill-source",
    )
    text = gr.Textbox(
        value=EXAMPLE,
        label="Text",
        info="One prompt a line; of {red|blue} one is drawn, and for __colour__ a line of the wildcard file "
        "colour.txt. Lines that begin with # are left out",
        lines=4,
        max_lines=12,
        visible=first == TEXT,
        elem_id="turbodistill-text",
    )
    file = gr.Textbox(
        value="",
        label="File",
        info="The whole path of a text file, one prompt a line; or of a folder of your pictures as A1111, Forge or "
        "ComfyUI saved them, for the prompts in them",
        max_lines=1,
        visible=False,
        elem_id="turbodistill-file",
    )
    images = gr.Textbox(
        value="",
        label="Picture folder (not needed)",
        info="Captioned pictures of your own for the discriminator to take for real: a folder with a .txt beside each, "
        "or with a metadata.jsonl, .tar or .parquet files",
        max_lines=1,
        elem_id="turbodistill-images",
    )
    with gr.Row():
        wide = gr.Number(value=0, label="Width", info=pixels, elem_id="turbodistill-width")
        high = gr.Number(value=0, label="Height", info=pixels, elem_id="turbodistill-height")
    settings = fields.components(MAIN, backend.settings, backend.limits)
    with gr.Accordion("Advanced settings", open=False, elem_id="turbodistill-advanced"):
        settings |= fields.grouped(MORE, backend.settings, backend.limits)
    return Form(dict(zip(OF_RUN, (name, source, text, file, images, wide, high), strict=True)), settings)


def request(kind: str, values: Sequence[Any]) -> Request:
    """What the form asks for, from its inputs' values; raises ConfigError for a number that is none."""
    form = dict(zip(OF_RUN, values, strict=False))
    name, source, text, file, images = (str(form[each] or "") for each in OF_RUN[:5])
    return Request(
        name=name.strip(),
        kind=kind,
        prompts=text if source == TEXT else "",
        prompt_file=file if source == FILE else "",
        built_in=source.removeprefix(BUILT_IN) if source.startswith(BUILT_IN) else "",
        images=images,
        width=fields.number("width", form["width"] or 0),
        height=fields.number("height", form["height"] or 0),
        settings=fields.settings(SETTINGS, values[len(OF_RUN) :]),
    )


def filled(backend: Backend, line: str | None) -> list[Any]:
    """The form's values as they were asked for in the run of that line, after what is said of it."""
    try:
        asked = runs.asked(backend.runs_folder(), _name(line))
    except MISTAKES as error:
        return [view.box(str(error), "bad"), *(gr.update() for _ in (*OF_RUN, *SETTINGS))]
    return ["", *_values(asked)]


def taken_over(values: Sequence[Any]) -> list[Any]:
    """The form's values where txt2img's (READ) are taken over, after what is said of it."""
    taken = take_over(dict(zip(READ, values, strict=True)))
    kind = "bad" if taken.refused else "warn" if taken.said else "good"
    given = [taken.values.get(name) for name in (*OF_RUN, *SETTINGS)]
    return [view.box(taken.in_words(), kind), *(gr.update() if v is None else gr.update(value=v) for v in given)]


def last_asked() -> list[Any]:
    """The form's values as they were asked for last, since the program was started."""
    now = job.current()
    return _values(now.request) if now else [gr.update() for _ in (*OF_RUN, *SETTINGS)]


def _values(asked: Request) -> list[Any]:
    source = FILE if asked.prompt_file else BUILT_IN + asked.built_in if asked.built_in else TEXT
    if source == TEXT and not asked.prompts:
        source = CAPTIONS
    of_run = (asked.name, source, asked.prompts, asked.prompt_file, asked.images, asked.width, asked.height)
    settings = asked.config().to_dict()
    return [gr.update(value=value) for value in (*of_run, *(settings[name] for name in SETTINGS))]


def refresh(backend: Backend, before: dict[str, Any]) -> list[Any]:
    """What is new to a page: of what it shows already, `before`, nothing is sent again."""
    now = job.current()
    snapshot = now.snapshot() if now else None
    if now is None or snapshot is None:
        shown = {"runs": 0}
        parts = [view.idle(backend.checkpoint(), backend.refusal()) + stamp(), *([gr.update()] * 5)]
    else:
        trains = now.working and now.monitor.running
        newest = snapshot["previews"][-1:] or snapshot["pictures"]
        shown = {
            "charts": (now.begun, snapshot["history"]["update"][-1:], len(snapshot["history"]["scores"]["score"])),
            "pictures": (now.begun, len(snapshot["previews"]), hash(str(newest))),
            "buttons": (trains, now.monitor.control.stop, now.working and not snapshot["cancelling"]),
            "runs": (now.begun, snapshot["state"]),
        }
        may_stop = trains and not now.monitor.control.stop
        drawn = {
            "charts": lambda: [curves.charts(snapshot)],
            "pictures": lambda: [view.pictures(snapshot)],
            "buttons": lambda: [gr.update(interactive=may) for may in (may_stop, trains, shown["buttons"][2])],
        }
        parts = [view.status(snapshot) + stamp()]
        for name, draw_part in drawn.items():
            same = before.get(name) == shown[name]
            parts += [gr.update()] * (3 if name == "buttons" else 1) if same else draw_part()
    listed = gr.update() if before.get("runs") == shown["runs"] else gr.update(choices=_lines(backend))
    return [shown, *parts, listed]


def _say(do: Callable[[], object]) -> str:
    """Do what a button asks for; what there is to say of it, as HTML."""
    try:
        do()
    except MISTAKES as error:
        return view.box(str(error), "bad")
    return ""


def _lines(backend: Backend) -> list[str]:
    """The runs as a list shows them; their names come first, and hold no colon."""
    running = job.running()
    return [run.in_words() for run in runs.listed(backend.runs_folder(), running.request.name if running else "")]


def _name(line: str | None) -> str:
    if not isinstance(line, str) or not line:
        raise ConfigError("no run is chosen: choose one of the earlier runs")
    return line.partition(":")[0]


def _visible(source: str) -> list[Any]:
    return [gr.update(visible=source == TEXT), gr.update(visible=source == FILE)]
