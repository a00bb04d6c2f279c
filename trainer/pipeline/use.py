"""A student that stays on a loaded pipeline, until it is released."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.card import StudentCard, read_card, read_student
from ...core.student import check_student, full_weights, load_student
from .check import IN_USE, check_free, check_pipeline
from .denoisers import GUIDANCE, NetworkDenoiser
from .host import ModelError, PipelineHost
from .kinds import kind_of, prediction_of, schedule_of
from .stock import scheduler_of, student_scheduler

log = logging.getLogger(__name__)


class StudentOnPipeline:
    """A student on a pipeline: its card, what did not fit in words or "", and `release()`, also as `with`."""

    def __init__(self, pipe: Any, card: StudentCard, warning: str):
        self.pipe, self.card, self.warning = pipe, card, warning
        self._back = ExitStack()

    def release(self) -> None:
        """Put scheduler and weights back, to the bit; a second time nothing happens."""
        self._back.close()

    def __enter__(self) -> StudentOnPipeline:
        return self

    def __exit__(self, *_) -> None:
        self.release()


def use_student(pipe: Any, path: str | Path, stock: bool = False) -> StudentOnPipeline:
    """Put a student on a loaded pipeline, so that `pipe(prompt, num_inference_steps=1, guidance_scale=0)` is it.

    One of guidance alone keeps the pipeline's scheduler, and takes as many steps as the pipeline always does.
    `pipe` is a pipeline of diffusers, or the model that `load_model` made of one. The pipeline gets a scheduler of ours
    that samples as the student's card says, or one of diffusers' own (`stock`). A LoRA rides on hooks beside the
    pipeline's weights, a full student takes their place. `release()` of what is returned puts everything back.

    Raises CardError for a file that is no student of this model, ModelError for a pipeline that cannot carry it.
    """
    if isinstance(pipe, PipelineHost):
        if pipe.pipe is None:
            raise ModelError(f"{pipe.name} is no pipeline of diffusers: use turbodistill.load_student and sample")
        pipe = pipe.pipe
    kind = kind_of(pipe)
    network = check_pipeline(pipe, kind)
    check_free(network)
    within = any(m.__dict__.get("_compiled_call_impl") for m in network.modules())
    if within or getattr(pipe, kind.network[0]) is not network:
        raise ModelError(f"the {kind.network[0]} is compiled, and a student would not be seen: compile it afterwards")
    card = read_card(path)
    make: Any = kind.denoiser
    teacher: NetworkDenoiser = make(network, schedule_of(pipe, kind, card.resolution), prediction_of(pipe, kind))
    teacher.execution_device = pipe._execution_device
    scheduler = (scheduler_of if stock else student_scheduler)(card, pipe)
    used = StudentOnPipeline(pipe, card, "")
    with ExitStack() as undo:
        if card.rank:
            student, _, used.warning = load_student(path, teacher)
            assert student.lora is not None
            undo.callback(student.release)
            student.lora.enabled = True
        else:
            used.warning = check_student(card, teacher, path)
            _replace_weights(network, full_weights(network, read_student(path)[0], path), undo)
        if kind.packs and getattr(network.config, "guidance_embeds", False):
            undo.callback(network.register_forward_pre_hook(_with_guidance, with_kwargs=True).remove)
        undo.callback(setattr, pipe, "scheduler", pipe.scheduler)
        pipe.scheduler = scheduler
        IN_USE.add(network)
        undo.callback(IN_USE.discard, network)
        used._back = undo.pop_all()
    if used.warning:
        log.warning(used.warning)
    return used


def _replace_weights(network: nn.Module, weights: dict[str, Tensor], undo: ExitStack) -> None:
    """Put other weights in the place of a network's own, in their precision; `undo` gets the way back."""
    own: dict[str, Tensor] = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, value in weights.items():
        undo.callback(setattr, own[name], "data", own[name].data)
        own[name].data = value.to(own[name].device, own[name].dtype)


def _with_guidance(_network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Give the transformer the guidance of the training, whatever the pipeline is given."""
    guidance = kwargs.get("guidance")
    return args, kwargs | ({} if guidance is None else {"guidance": torch.full_like(guidance, GUIDANCE)})
