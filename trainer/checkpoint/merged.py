"""A model that one of our students is merged into: by the card in its file, or in its diffusers folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ...core.architecture import WHOLE
from ...core.card import KEY, CardError, StudentCard
from ...core.header import Header, Shapes
from .errors import ModelError

CARD = "turbodistill.json"  # in a diffusers folder
# Where the text encoders and the autoencoder of a whole checkpoint lie.
BESIDE = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.")


def as_full(card: StudentCard) -> StudentCard:
    """The card of the model that a student is merged into."""
    return replace(card, kind="full", rank=0, alpha=0.0)


def is_merged(kind: str, shapes: Shapes) -> bool:
    """Whether a file with a card of this kind is more than its student.

    A full student's file holds the network alone, always below the same prefix.
    """
    beside = any(n.startswith(BESIDE) for n in shapes)
    return kind == "full" and (beside or not any(n.startswith(WHOLE) for n in shapes))


def of_file(header: Header) -> StudentCard | None:
    """The card of the student that is merged into this file; None where there is none, or none that can be read."""
    try:
        card = StudentCard.from_metadata(header.metadata, header.path)
    except CardError:
        return None
    return card if is_merged(card.kind, header.shapes) else None


def of_folder(folder: Path) -> StudentCard | None:
    """The same of a diffusers folder; raises ModelError for a card that cannot be read."""
    path = folder / CARD
    if not os.path.isfile(path):
        return None
    try:
        return as_full(StudentCard.from_metadata({KEY: path.read_text(encoding="utf-8")}, path))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error!s:.300}): get the folder again") from None


def check_teacher(source: str | Path, card: StudentCard | None) -> None:
    """Raise ModelError for a model that a student is merged into: it has no guidance any more, and teaches nothing."""
    if card:
        raise ModelError(
            f"{source!s:.300} has a student of {card.base_model} merged into it, so it is no teacher: give "
            f"{card.base_model} instead, or sample it as it is (`turbodistill sample --model`, without a student)"
        )
