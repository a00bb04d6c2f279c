"""A MODEL with a student merged in, as one checkpoint file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import comfy.sd
import torch

from ..core.card import StudentCard


def save_merged(path: Path, model, clip, vae, card: StudentCard) -> None:
    """Write MODEL, and CLIP and VAE where given, through ComfyUI's own saving, with the card; whole or not at all.

    Raises OSError if it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    told = replace(card, kind="full", rank=0, alpha=0.0).to_metadata()
    try:
        with torch.inference_mode():
            comfy.sd.save_checkpoint(str(part), model, clip, vae, metadata=told)
        os.replace(part, path)
    except Exception as error:
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error}): free some space, or choose another name") from error
