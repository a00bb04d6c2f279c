"""The accordion "TurboDistill" in txt2img and img2img, and the axis in the X/Y/Z plot."""

from __future__ import annotations

from dataclasses import astuple

import gradio as gr
from modules import scripts
from modules.ui_common import create_refresh_button

from ..page import view
from . import host, panel
from .host_sampling import CHOICE, REMARKS, foreign, remark
from .samplers import CHOSEN, DETECT, LIMITS, WRITTEN, passes, too_many

AXIS = "turbodistill_axis"  # what the X/Y/Z plot writes on the host's `p`
SAID = "ADD remarks"  # in the answers of the host's API, not in the pictures
PARTS = ("prompt", "sampling", "steps", "cfg_scale")  # ids of the host's components, in the order of panel.Settings


class Panel(scripts.Script):
    """Chooses a student or a family, and sets what the page shows accordingly."""

    def __init__(self):
        super().__init__()
        self.parts: dict[str, gr.components.Component] = {}
        self.buttons: tuple | None = None

    def title(self) -> str:
        return "TurboDistill"

    def show(self, is_img2img: bool):
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list:
        with gr.Accordion("TurboDistill: one-step models", open=False, elem_id=self.elem_id("panel")):
            gr.HTML(view.STYLE, elem_classes="turbodistill-hidden")  # the tab may be one that its user hides
            with gr.Row():
                choice = gr.Dropdown(
                    label="Student or family; detect goes by the prompt's LoRAs, else by the checkpoint",
                    choices=offered(),
                    value=DETECT,
                    elem_id=self.elem_id("choice"),
                )
                create_refresh_button(choice, host.refresh_loras, fresh, self.elem_id("refresh"))
            words = gr.Textbox(panel.ABOUT, show_label=False, interactive=False, lines=2, elem_id=self.elem_id("words"))
            with gr.Row():
                apply = gr.Button("Set", variant="primary", elem_id=self.elem_id("set"))
                undo = gr.Button("Undo", elem_id=self.elem_id("undo"))
                # Clicked by javascript/turbodistill.js.
                renew = gr.Button("Renew", elem_id=self.elem_id("fresh"), elem_classes="turbodistill-hidden")
            for component in (choice, words):
                setattr(component, host.NOT_SAVED, True)
            before = gr.State(None)
        self.infotext_fields = [(choice, lambda infotext: infotext.get(CHOSEN, DETECT))]
        if self.buttons is None:  # the API calls `ui` again, for the default values
            self.buttons = (choice, apply, undo, renew, words, before)
            self._connect()
        return [choice]

    def after_component(self, component, **kwargs) -> None:
        """Called by the host for each of its components: ours may be made before those that we set."""
        for part in PARTS:
            if kwargs.get("elem_id") == f"{self.tabname}_{part}" and part not in self.parts:
                self.parts[part] = component
                self._connect()

    def _connect(self) -> None:
        """Give the buttons their work, once all are there."""
        if self.buttons is None or len(self.parts) < len(PARTS):
            return
        choice, apply, undo, renew, words, before = self.buttons
        settings = [self.parts[part] for part in PARTS]
        at_once = {"queue": False, "show_progress": "hidden"}  # pictures may be made meanwhile
        apply.click(on_set, [choice, before, *settings], [*settings, before, words], **at_once)
        undo.click(on_undo, [before, *settings], [*settings, before, words], **at_once)
        renew.click(lambda: gr.update(**fresh()), [], [choice], **at_once)
        choice.change(on_choice, [choice, settings[0]], [words], **at_once)

    def process(self, p, choice=DETECT, *_) -> None:
        """Called by the host before it makes pictures: tell our samplers, and make Steps the number of passes."""
        choice = getattr(p, AXIS, None) or choice or DETECT
        setattr(p, CHOICE, choice)
        setattr(p, REMARKS, [])
        # A plot's cells share the table of the one before: what was written there is not of this picture.
        p.extra_generation_params = {k: v for k, v in p.extra_generation_params.items() if k not in WRITTEN}
        second = getattr(p, "hr_sampler_name", None) or p.sampler_name
        if p.sampler_name not in LIMITS and second not in LIMITS:
            return
        if choice != DETECT:
            p.extra_generation_params[CHOSEN] = choice
        asked = getattr(p, "hr_second_pass_steps", 0) or p.steps
        for each in too_many(p.sampler_name, p.steps) if p.sampler_name in LIMITS else ():
            remark(p, each)
        p.steps = _made(p.sampler_name, p.steps)
        if getattr(p, "enable_hr", False):
            made = _made(second, asked)
            p.hr_second_pass_steps = 0 if made == p.steps else made  # nought is as many as in the first pass

    def process_batch(self, p, *_, **__) -> None:
        """Called by the host when the prompt's LoRAs are applied."""
        if p.sampler_name not in LIMITS:
            foreign(p)

    def postprocess(self, p, processed, *_) -> None:
        """Called by the host when the pictures are made: what the API answers with holds what was said of them."""
        if said := getattr(p, REMARKS, None):
            processed.extra_generation_params = {**processed.extra_generation_params, SAID: said}


def _made(sampler: str, steps: int) -> int:
    return passes(sampler, steps) if sampler in LIMITS else steps


def offered() -> list[str]:
    """What the panel's list offers."""
    return panel.choices(panel.students(host.lora_metadata()))


def fresh() -> dict:
    """What the host's refresh button changes in the list."""
    return {"choices": offered()}


def on_choice(choice: str, prompt: str) -> str:
    """What is said of a choice, in Markdown."""
    return panel.describe(choice, prompt, host.lora_files(), host.checkpoint_file())


def on_set(choice: str, before: dict | None, *settings) -> list:
    """The host's settings as the choice wants them, what they were, and what is said of it."""
    now, kept, words = panel.apply(choice, panel.Settings(*settings), before, host.lora_files(), host.checkpoint_file())
    return [*astuple(now), kept, words]


def on_undo(before: dict | None, *settings) -> list:
    """The host's settings as they were before *Set*."""
    return [*astuple(panel.undo(panel.Settings(*settings), before)), None, panel.ABOUT]


def add_axis() -> None:
    """Put the choice among the axes of the X/Y/Z plot."""
    for data in scripts.scripts_data:
        options = getattr(data.module, "axis_options", None)
        option = getattr(data.module, "AxisOption", None)
        label = "[TurboDistill] Student or family"
        if options is not None and option is not None and label not in [each.label for each in options]:
            options.append(option(label, str, data.module.apply_field(AXIS), choices=offered))
