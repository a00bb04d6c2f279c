"""Begin with the embedded model's own autoencoder and text encoder, on which its student and all pairs rest.

    python -m turbodistill.demo.recipe.unpack

The inverse of `pack`: writes both into the recipe's folder, where a new teacher trains on them as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..files import HEADER, MODEL
from . import autoencoder, dataset

TEXT = "cond_stage_model."


def unpack(model: Path, folder: Path) -> None:
    """Write the frozen autoencoder and text encoder out of the embedded model."""
    tensors = {k: v.float() for k, v in load_file(model).items()}
    with safe_open(model, "pt") as file:
        about = json.loads(file.metadata()[HEADER])
    weights = convert_ldm_vae_checkpoint(dict(tensors), autoencoder.CONFIG)
    save_file(weights, folder / "autoencoder.safetensors", {"scale_factor": str(about["vae"]["scaling_factor"])})
    texts = {k.removeprefix(TEXT): v for k, v in tensors.items() if k.startswith(TEXT)}
    tokenizer = json.dumps(about["text_encoder"]["tokenizer"])
    save_file(texts, folder / "text_encoder.safetensors", {"tokenizer": tokenizer})
    print(f"{folder}: autoencoder, {len(weights)} tensors; text encoder, {len(texts)} tensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=dataset.BUILD)
    unpack(MODEL, parser.parse_args().folder)
