"""The list of nodes, as ComfyUI asks for it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

from . import panel
from .data import ImageFolder, Prompts, TeacherPairs
from .distill import AdvancedSettings, Distill, SaveStudent
from .load import DetectOneStep, LoadDemoModel, LoadStudent
from .sample import Compare, OneStepSample, OneStepSampler, OneStepScheduler


class TurboDistillExtension(ComfyExtension):
    """Our nodes, as ComfyUI loads them."""

    async def get_node_list(self):
        panel.open_routes()  # here, since not every ComfyUI calls `on_load`
        sampling = [LoadStudent, DetectOneStep, OneStepSample, OneStepScheduler, OneStepSampler, Compare, LoadDemoModel]
        return [*sampling, Prompts, ImageFolder, TeacherPairs, Distill, AdvancedSettings, SaveStudent]
