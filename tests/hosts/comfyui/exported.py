"""Run by ComfyUI's own Python, without its server: what its loaders make of exported files.

    python exported.py COMFYUI CLONE FOLDER

FOLDER holds base.safetensors, merged.safetensors and a LoRA file for each style, and inputs.safetensors with
x (1, 4, H, W), sigma (1,), states (1, T, D), of XL y (1, D), too. It gets out.safetensors with x0 of each, and
told.json: what the loaders logged of keys that are missing, left over or not loaded.
"""

import gc
import json
import logging
from pathlib import Path

from inside import arguments

# isort: split

import comfy.cli_args
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from safetensors.torch import load_file, save_file

WORDS = ("unexpected", "left over", "not loaded", "leftover")
folder = Path(arguments[0])
given, made, told, lines = load_file(folder / "inputs.safetensors"), {}, {}, []
# XL's weights stay as they are stored: in float32 they take 21 GB, with the copies that ComfyUI keeps under a LoRA.
comfy.cli_args.args.fp16_unet = "y" in given


class Kept(logging.Handler):
    """Every line that speaks of keys."""

    def emit(self, record):
        text = record.getMessage()
        # Of Stable Diffusion 1 two weights are missing always, which ComfyUI says no louder than for debugging.
        missing = "missing" in text.lower() and record.levelno >= logging.WARNING
        if missing or any(word in text.lower() for word in WORDS):
            lines.append(text[:500])


logging.getLogger().setLevel(logging.DEBUG)
logging.getLogger().addHandler(Kept())


def look(name, model):
    """Keep what a MODEL makes of the inputs, and what was logged so far."""
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    with torch.inference_mode():
        x, sigma, more = given["x"], given["sigma"], {"y": given["y"]} if "y" in given else {}
        made[name] = model.model.apply_model(x, sigma, c_crossattn=given["states"], **more).float().clone()
    comfy.model_management.unload_all_models()
    told[name] = list(lines)
    lines.clear()


def load(name):
    """A whole checkpoint as Load Checkpoint does."""
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(folder / f"{name}.safetensors"))
    told[f"{name} parts"] = [clip is not None, vae is not None]
    return model


base = load("base")
look("base", base)
for file in sorted(folder.glob("lora-*.safetensors")):
    lora = comfy.utils.load_torch_file(str(file))
    patched, _ = comfy.sd.load_lora_for_models(base, None, lora, 1.0, 0.0)
    look(file.stem, patched)
    del patched
del base
gc.collect()
look("merged", load("merged"))
save_file(made, folder / "out.safetensors")
(folder / "told.json").write_text(json.dumps(told))
