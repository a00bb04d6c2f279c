"""Run by ComfyUI's own Python, without its server: an update of a full-size model that is judged by pictures.

    python pixels_full.py COMFYUI CLONE FOLDER

FOLDER holds job.json, {"file": checkpoint, "size": pixels, "settings": {...}}; it gets told.json.
"""

import importlib.util
import json
from pathlib import Path

from inside import arguments, clone

# isort: split

import comfy.sd
import torch
from turbodistill.nodes.host.training import ComfyUIHost, trainable
from turbodistill.trainer.config import Config

spec = importlib.util.spec_from_file_location("one_update", f"{clone}/tests/hosts/one_update.py")
one_update = importlib.util.module_from_spec(spec)
spec.loader.exec_module(one_update)

(folder,) = arguments
job = json.loads(Path(folder, "job.json").read_text())
with torch.inference_mode():
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(job["file"])[:3]
    with trainable(model) as trained:
        host = ComfyUIHost(model, clip, vae, "full", job["size"], job["size"], trained)
        told = one_update.measured(host, Config(**job["settings"]))
Path(folder, "told.json").write_text(json.dumps(told))
