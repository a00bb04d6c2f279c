"""Clip skip: the layer of CLIP that a prompt's states are taken from, in AUTOMATIC1111's counting.

1 is the last layer, 2 the one before, and so on. Stable Diffusion XL was trained on the one before the last, 2, and so
was Stable Diffusion 2; but diffusers' encoder of the latter has no last layer, and its last is called 1.
"""

from __future__ import annotations

from .architecture import SD1, SD2, SDXL

MOST = 12
OWN = {SD1: 1, SD2: 1, SDXL: 2}  # what each was trained with; in the others it means nothing, or is not known


def remark(student: str, trained: int, now: int) -> list[str]:
    """What is said of a student that was trained with one clip skip and is sampled with another; 0 is not known."""
    if not (trained and now) or trained == now:
        return []
    return [f"{student} was trained with clip skip {trained}, and is sampled with {now}: set it to {trained}."]
