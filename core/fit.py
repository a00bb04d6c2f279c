"""What does not fit between a student, the loaded model, and the settings: one answer for every front end."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from safetensors import safe_open

from . import clip_skip
from .architecture import KNOWN, WHOLE, architecture_of_file
from .card import CardError, StudentCard, fingerprint, header
from .families import of_card


@dataclass(frozen=True)
class Base:
    """What is known of the loaded model: empty where it is not.

    `architecture` and `prediction` are in a card's words. `hashes` are its fingerprints, with and without what is
    patched onto it: any counts. `name` is its file's: the same name counts as well, since a file that is loaded in
    another precision has another hash. `clip_skip` is that of the prompts, as `core.clip_skip` counts.
    """

    architecture: str = ""
    prediction: str = ""
    hashes: tuple[str, ...] = ()
    name: str = ""
    clip_skip: int = 0


def check_fit(
    card: StudentCard,
    base: Base,
    student: str | Path = "the student",
    *,
    steps: int | None = None,
    weight: float = 1.0,
    cfg: float = 1.0,
) -> list[str]:
    """What does not fit, as warnings in words; an empty list where all does.

    `student` is what the words call it; steps of None are not known yet. Raises CardError where no picture could come
    of it: on a base of another architecture, or of another prediction type.
    """
    same = card.base_hash in base.hashes
    pair = {card.architecture, base.architecture}
    if len(pair) == 2 and pair <= KNOWN and not same:
        raise CardError(
            f"{student} was made for a model of architecture {card.architecture}, the loaded one is "
            f"{base.architecture}: load {card.base_model}, its base"
        )
    if base.prediction and base.prediction != card.base_prediction:
        readable = same and {base.prediction, card.base_prediction} == {"eps", "v"}
        load = f"load {card.base_model}, its base"
        # Forge takes each Stable Diffusion 2 for one of eps, unless a file says otherwise.
        setting = (
            f"it is the right file, read wrongly: say what it predicts, in ComfyUI by ModelSamplingDiscrete, in "
            f"AUTOMATIC1111 and Forge by a .yaml of its name with `parameterization: {card.base_prediction}`"
        )
        raise CardError(
            f"{student} was made for a model that predicts {card.base_prediction}, the loaded one predicts "
            f"{base.prediction}: {setting if readable else load}"
        )
    said = []
    if base.name and _stem(base.name) == _stem(card.base_model):
        pass
    elif base.hashes and not same:
        said.append(
            f"{student} was made for {card.base_model} ({card.base_hash}), the loaded model is another "
            f"({base.hashes[0]}): pictures may suffer."
        )
    elif not base.hashes and base.name:
        said.append(f"{student} was made for {card.base_model}, the loaded model is {base.name}: pictures may suffer.")
    if weight != 1:
        said.append(f"the weight of {student} is {weight:g}: it was trained at 1, another blurs or burns the picture.")
    said += clip_skip.remark(str(student), card.clip_skip, base.clip_skip)
    recipe = replace(of_card(card), name=str(student))
    return said + recipe.remarks(recipe.steps if steps is None else steps, cfg)


def read_base(path: Path) -> Base:
    """What a checkpoint's file says of the model in it; of another than a safetensors file no more than its name."""
    try:
        return _read_base(path, path.stat().st_mtime_ns)
    except OSError:
        return Base(name=path.name)


@lru_cache(8)
def _read_base(path: Path, _changed: int) -> Base:
    shapes = header(path)[1]
    architecture = architecture_of_file(shapes)
    inside = [name for name in shapes if name.startswith(WHOLE)] or (list(shapes) if architecture else [])
    if not inside:
        return Base(name=path.name)
    with safe_open(path, "pt") as file:  # its tensors stay in the file until they are looked at
        weights = {name.removeprefix(WHOLE): file.get_tensor(name) for name in inside}
        return Base(architecture, hashes=(fingerprint(weights),), name=path.name)


def _stem(name: str) -> str:
    """A model file's name without folder and ending."""
    return re.sub(r"\.(safetensors|ckpt)$", "", name.replace("\\", "/").rpartition("/")[2].lower())
