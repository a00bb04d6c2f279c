"""The list of nodes, as ComfyUI asks for it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

from .load import DetectOneStep, LoadDemoModel, LoadStudent
from .sample import Compare, OneStepSample, OneStepSampler, OneStepScheduler


class TurboDistillExtension(ComfyExtension):
    async def get_node_list(self):
        return [LoadStudent, DetectOneStep, OneStepSample, OneStepScheduler, OneStepSampler, Compare, LoadDemoModel]
