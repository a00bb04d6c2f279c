"""A MODEL with a student merged in, as one checkpoint file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import comfy.sd
import torch

from ...core.card import StudentCard
from ...trainer.data.files import whole_file


def save_merged(path: Path, model, clip, vae, card: StudentCard) -> None:
    """Write MODEL, and CLIP and VAE where given, through ComfyUI's own saving, with the card; whole or not at all.

    Raises OSError if it cannot be written, and ValueError for weights that ComfyUI itself cannot write.
    """
    check_writable(model)
    metadata = replace(card, kind="full", rank=0, alpha=0.0).to_metadata()
    with whole_file(path) as part, torch.inference_mode():
        comfy.sd.save_checkpoint(str(part), model, clip, vae, metadata=metadata)


def check_writable(model) -> None:
    """Raise ValueError for a MODEL whose weights ComfyUI lists without their numbers, as those of GGUF files."""
    listed = model.model.state_dict()
    there = [name for name, weight in model.model.named_parameters() if not weight.is_meta and name in listed]
    if any(listed[name].is_meta for name in there):
        raise ValueError(
            "the MODEL's weights are packed (GGUF), and ComfyUI cannot write them as a checkpoint: save the student as "
            "a LoRA, or load the model from a file that is not packed"
        )
