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

    Raises OSError if it cannot be written.
    """
    metadata = replace(card, kind="full", rank=0, alpha=0.0).to_metadata()
    with whole_file(path) as part, torch.inference_mode():
        comfy.sd.save_checkpoint(str(part), model, clip, vae, metadata=metadata)
