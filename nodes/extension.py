"""The list of nodes, as ComfyUI asks for it."""

from __future__ import annotations

import logging
from pathlib import Path
from urllib.parse import quote

from comfy_api.latest import ComfyExtension

from . import panel
from .data import ImageFolder, Prompts, TeacherPairs
from .distill import AdvancedSettings, Distill, SaveStudent
from .load import DetectOneStep, LoadDemoModel, LoadStudent
from .sample import Compare, OneStepSample, OneStepSampler, OneStepScheduler

log = logging.getLogger(__name__)


def check_folder(name: str) -> None:
    """Warn of a folder whose files ComfyUI cannot give to the page: aiohttp 3.10 and later finds no such address."""
    if quote(name) != name:
        log.warning(
            "TurboDistill lies in the folder %r, with blanks or letters by which ComfyUI's server finds no file: its "
            "nodes work, but panel, help and templates' pictures may be missing. Call the folder turbodistill",
            name,
        )


class TurboDistillExtension(ComfyExtension):
    """Our nodes, as ComfyUI loads them."""

    async def get_node_list(self):
        check_folder(Path(__file__).parents[1].name)
        panel.open_routes()  # here, since not every ComfyUI calls `on_load`
        sampling = [LoadStudent, DetectOneStep, OneStepSample, OneStepScheduler, OneStepSampler, Compare, LoadDemoModel]
        return [*sampling, Prompts, ImageFolder, TeacherPairs, Distill, AdvancedSettings, SaveStudent]
