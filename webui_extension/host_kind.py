"""Which WebUI we are in; it imports nothing of the host until asked, so that it can be asked anywhere."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

# Forge's and Neo's, and reForge's.
MEMORY = ("backend.memory_management", "ldm_patched.modules.model_management")

NO_GRADIENT = (
    "{} is a transformer, whose fused position embedding (comfy_kitchen) has no gradient in this WebUI: distil it in "
    "Forge or ComfyUI, or load a Stable Diffusion or SDXL"
)


def refusal() -> str:
    """Why nothing of ours can work in this WebUI; "" where it can."""
    from modules import sd_samplers

    if hasattr(sd_samplers, "list_samplers"):
        return (
            "TurboDistill does not work in SD.Next, whose samplers are diffusers' own: use AUTOMATIC1111, Forge or "
            "ComfyUI, or the command `turbodistill ui`."
        )
    if importlib.util.find_spec("modules.sd_samplers_kdiffusion") is None:
        return "TurboDistill does not know this WebUI: it works in AUTOMATIC1111 (1.9 or later), Forge and their kin."
    return ""


def is_forge() -> bool:
    """Whether this is Forge or a kin of it: reForge, Neo."""
    return importlib.util.find_spec("modules_forge") is not None


def name() -> str:
    """What the WebUI is called."""
    return "Forge" if is_forge() else "AUTOMATIC1111"


def memory_management() -> ModuleType | None:
    """The module by which a kin of Forge keeps its models, which it has loaded; None where it is not known."""
    return next((sys.modules[name] for name in MEMORY if name in sys.modules), None)


def has_fused_rope() -> bool:
    """Whether transformers turn positions by a kernel that has no gradient, as in Neo."""
    return "comfy_kitchen" in sys.modules
