"""What the accordion in txt2img and img2img does, as far as it needs no host: its choices, words and buttons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.card import KEY, CardError, read_card
from ..core.families import FAMILIES, SamplingRecipe, recognise
from .samplers import DETECT, FEW_STEP, NOTHING, ONE_STEP, applied_loras, find

ABOUT = (
    "Set chooses the sampler, the steps and the CFG Scale that the model is made for, and puts a student into the "
    "prompt. At CFG Scale 1 negative prompts do nothing."
)


@dataclass(frozen=True)
class Settings:
    """What the page shows of how a picture is made."""

    prompt: str
    sampler: str
    steps: int
    cfg: float


def students(metadata: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The LoRAs, of names with their files' metadata, that are students of ours or of a known family."""
    return sorted(
        name
        for name, about in metadata.items()
        if KEY in about or recognise(name, str(about.get("ss_output_name", "")))
    )


def choices(loras: Iterable[str]) -> list[str]:
    """What the list offers: detect, students and families."""
    return [DETECT, *loras, *(name for name in FAMILIES if name not in loras)]


def describe(choice: str, prompt: str, files: Mapping[str, Path], checkpoint: Path | None) -> str:
    """The choice in words: a student's card, a family's sampling, or what was detected."""
    if choice in files:
        try:
            return read_card(files[choice]).in_words()
        except CardError:
            pass  # of another's making
    try:
        return find(choice, _made_for(choice), files, applied_loras(prompt), checkpoint).in_words()
    except ValueError as error:
        return str(error)


def _made_for(choice: str) -> int:
    return FAMILIES[choice].sampling.steps if choice in FAMILIES else 1


def apply(
    choice: str, now: Settings, before: dict | None, files: Mapping[str, Path], checkpoint: Path | None
) -> tuple[Settings, dict | None, str]:
    """The settings that the choice wants, what `undo` needs, and words.

    `before` is what an earlier `apply` gave, if it was not undone: its student leaves the prompt.
    """
    if before:
        now = replace(now, prompt=_without(now.prompt, before["tag"]))
    try:
        found = find(choice, _made_for(choice), files, applied_loras(now.prompt), checkpoint)
    except ValueError as error:
        return now, None, str(error)
    if not found.source:
        return now, None, NOTHING
    tag = (
        f"<lora:{choice}:{found.sampling.strength:g}>"
        if choice in files and choice not in applied_loras(now.prompt)
        else ""
    )
    kept = {**(before or {"sampler": now.sampler, "steps": now.steps, "cfg": now.cfg}), "tag": tag}
    return wanted(found.sampling, now, tag), kept, describe(choice, now.prompt, files, checkpoint)


def wanted(sampling: SamplingRecipe, now: Settings, tag: str = "") -> Settings:
    """The settings with which a model is sampled as it was made for."""
    sampler = ONE_STEP if sampling.steps == 1 else FEW_STEP
    return Settings(" ".join(filter(None, (now.prompt.rstrip(), tag))), sampler, sampling.steps, sampling.cfg)


def undo(now: Settings, before: dict | None) -> Settings:
    """The settings as they were, with what was written into the prompt since."""
    if not before:
        return now
    return Settings(_without(now.prompt, before["tag"]), before["sampler"], before["steps"], before["cfg"])


def _without(prompt: str, tag: str) -> str:
    return re.sub(rf" ?{re.escape(tag)}", "", prompt, count=1) if tag else prompt
