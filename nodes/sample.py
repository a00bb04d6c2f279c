"""Nodes that sample in one step or a few, all through ComfyUI's own sampling."""

from __future__ import annotations

import logging
import time

import torch
from comfy_api.latest import io, ui

from ..core.clip_skip import remark
from .graph import clip_layer
from .host import patcher
from .host.nag import with_nag
from .load import CATEGORY
from .picture import side_by_side
from .schema import schema, within_bounds

log = logging.getLogger(__name__)
MOST = 100  # steps


def model_input() -> io.Model.Input:
    """The socket of a one-step model."""
    return io.Model.Input("model", tooltip="From Load Student, Detect One-Step Model, or a plain Turbo checkpoint.")


def seed_input() -> io.Int.Input:
    """The widget for the noise."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="The noise; the same seed gives the same picture.",
    )


def steps_input() -> io.Int.Input:
    """The widget for the number of steps."""
    return io.Int.Input(
        "steps",
        default=1,
        min=1,
        max=MOST,
        tooltip="1 is what most are made for. More may add detail, and keeps less of a picture in image to image. A "
        "student of guidance alone takes its own number instead of too few.",
    )


def denoise_input() -> io.Float.Input:
    """The widget for how much of the picture is made anew."""
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip="1 makes a new picture; less keeps that much more of the latent's. It works with one step, too.",
    )


def sigmas_of(model, steps: int, denoise: float) -> torch.Tensor:
    """The sigmas (steps + 1,) at which the MODEL is sampled, as its student or family says."""
    sampling = patcher.sampling_of(model)
    steps_taken = sampling.steps_taken(steps)
    for words in sampling.remarks(steps_taken):
        log.warning(words)
    if steps_taken != steps:
        log.warning("%s is sampled as its base is: in %d steps, not %d", sampling.name, steps_taken, steps)
    return patcher.sigmas_for(model, sampling.timesteps(steps_taken, denoise))


class OneStepScheduler(io.ComfyNode):
    """The sigmas of a one-step model, for SamplerCustom."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["turbo scheduler", "trailing timesteps", "one step sigmas"],
            node_id="TurboDistillScheduler",
            display_name="One-Step Scheduler",
            category=CATEGORY,
            description="Sigmas for a one-step model, as its student card or its family says.",
            inputs=[model_input(), steps_input(), denoise_input()],
            outputs=[io.Sigmas.Output("SIGMAS", tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    @within_bounds
    def execute(cls, model, steps: int, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(sigmas_of(model, steps, denoise))


class OneStepSampler(io.ComfyNode):
    """The sampler of a one-step model, for SamplerCustom."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["turbo sampler", "few step", "consistency sampler"],
            node_id="TurboDistillSampler",
            display_name="One-Step Sampler",
            category=CATEGORY,
            description="ADD's sampler: the picture from each level, and between steps what the model's family wants.",
            inputs=[model_input()],
            outputs=[io.Sampler.Output("SAMPLER", tooltip="For SamplerCustom and SamplerCustomAdvanced, at cfg 1.")],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(patcher.FewStep(patcher.sampling_of(model)))


class OneStepSample(io.ComfyNode):
    """Samples a one-step model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["ksampler turbo", "one step", "fast sample", "add sampler", "nag", "negative prompt"],
            node_id="TurboDistillSample",
            display_name="One-Step Sample",
            category=CATEGORY,
            description="Samples a one-step model: no cfg, nothing else to set.",
            inputs=[
                model_input(),
                io.Conditioning.Input("positive", tooltip="The prompt, with ControlNets and areas if you like."),
                io.Latent.Input("latent_image", tooltip="Empty, or a picture's latent, with or without a mask."),
                seed_input(),
                steps_input(),
                denoise_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the picture should not show: by ComfyUI's Normalized Attention Guidance, which takes "
                    "twice the time. Leave it empty for a plain picture.",
                ),
            ],
            outputs=[io.Latent.Output("LATENT", tooltip="For VAE Decode.")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, model, positive, latent_image, seed: int, steps: int, denoise: float, negative=None
    ) -> io.NodeOutput:
        sampling = patcher.sampling_of(model)
        layer = clip_layer(cls.hidden.prompt or {}, cls.hidden.unique_id)
        now = patcher.clip_skip(layer, patcher.architecture(model)) if sampling.clip_skip else 0
        for words in remark(sampling.name, sampling.clip_skip, now):
            log.warning(words)
        sigmas, sampler = sigmas_of(model, steps, denoise), patcher.FewStep(sampling)
        if negative is None:
            return io.NodeOutput(patcher.sample(model, positive, latent_image, seed, sigmas, sampler))
        guided, heard = with_nag(model)
        latent = patcher.sample(guided, positive, latent_image, seed, sigmas, sampler, negative)
        heard.check()
        return io.NodeOutput(latent)


class Compare(io.ComfyNode):
    """Samples student and teacher from the same noise, side by side."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["before after", "teacher student", "benchmark"],
            node_id="TurboDistillCompare",
            display_name="Compare Teacher and Student",
            category=CATEGORY,
            description="The teacher in many steps beside the student in one, from the same noise, with the times.",
            inputs=[
                io.Model.Input("teacher", tooltip="The base model."),
                io.Model.Input("student", tooltip="The same model after Load Student."),
                io.Vae.Input("vae", tooltip="Decodes both."),
                io.Conditioning.Input("positive", tooltip="The prompt, for both."),
                io.Conditioning.Input("negative", tooltip="For the teacher alone: at cfg 1 a negative does nothing."),
                io.Latent.Input("latent_image", tooltip="Empty, of the wanted size."),
                seed_input(),
                io.Int.Input(
                    "teacher_steps",
                    default=20,
                    min=1,
                    max=100,
                    tooltip="Of Euler, which calls the model twice in each.",
                ),
                io.Float.Input(
                    "teacher_cfg", default=7.0, min=1.0, max=30.0, step=0.5, tooltip="The cfg that you use it at."
                ),
                io.Int.Input("student_steps", default=1, min=1, max=MOST, tooltip="1 is what most are made for."),
            ],
            outputs=[io.Image.Output("IMAGE", tooltip="A pair a row, teacher on the left.")],
            is_output_node=True,
        )

    @classmethod
    @within_bounds
    def execute(
        cls, teacher, student, vae, positive, negative, latent_image, seed, teacher_steps, teacher_cfg, student_steps
    ) -> io.NodeOutput:
        euler, spaced = patcher.euler(teacher, teacher_steps)
        student_steps = patcher.sampling_of(student).steps_taken(student_steps)
        runs = (
            (f"teacher, {teacher_steps} steps, cfg {teacher_cfg:g}", teacher, spaced, euler, negative, teacher_cfg),
            (
                f"student, {student_steps} step{'s' * (student_steps > 1)}",
                student,
                sigmas_of(student, student_steps, 1.0),
                patcher.FewStep(patcher.sampling_of(student)),
                None,
                1.0,
            ),
        )
        columns = []
        for title, model, sigmas, sampler, against, cfg in runs:
            patcher.load(model)  # a model's way to the GPU is not sampling time
            begun = time.perf_counter()
            latent = patcher.sample(model, positive, latent_image, seed, sigmas, sampler, against, cfg)
            columns.append((f"{title}: {time.perf_counter() - begun:.2f} s", vae.decode(latent["samples"])))
        image = side_by_side(columns)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
