"""What the accordion in txt2img and img2img does, as far as it needs no host: its choices, words and buttons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.card import KEY
from ..core.families import FAMILIES, SamplingRecipe, recognise
from ..core.fit import check_fit, read_base
from .samplers import DETECT, FEW_STEP, LIMITS, NOTHING, ONE_STEP, UNKNOWN, applied_loras, find, students_among

EULER = "Euler"  # as both hosts call it
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
    base = read_base(checkpoint) if checkpoint else UNKNOWN
    try:
        if card := students_among([choice], files).get(choice):
            return "\n".join([*check_fit(card, base, choice), card.in_words()])
        return find(choice, _made_for(choice), files, applied_loras(prompt), checkpoint, base).in_words()
    except ValueError as error:
        return str(error)


def _made_for(choice: str) -> int:
    return FAMILIES[choice].sampling.steps if choice in FAMILIES else 1


def apply(
    choice: str, now: Settings, before: dict | None, files: Mapping[str, Path], checkpoint: Path | None
) -> tuple[Settings, dict | None, str]:
    """The settings that the choice wants, what `undo` needs, and words.

    `before` is what an earlier `apply` gave, if it was not undone: its student leaves the prompt for another choice.
    """
    added, kept = (before["lora"] if before else ""), now
    if choice != DETECT:
        kept, added = replace(now, prompt=_without(now.prompt, added)), ""
    base = read_base(checkpoint) if checkpoint else UNKNOWN
    try:
        found = find(choice, _made_for(choice), files, applied_loras(kept.prompt), checkpoint, base)
    except ValueError as error:
        return now, before, f"Nothing was set: {error}"
    if not found.source:
        return now, before, f"Nothing was set. {NOTHING}"
    tag = ""
    if choice in files and choice not in applied_loras(kept.prompt):
        added, tag = choice, f"<lora:{choice}:{found.sampling.strength:g}>"
    then = wanted(found.sampling, kept, tag)
    already = "Nothing had to be set, all is as it is wanted.\n" if then == now else ""
    undoes = {**(before or {"sampler": now.sampler, "steps": now.steps, "cfg": now.cfg}), "lora": added}
    return then, undoes, already + describe(choice, then.prompt, files, checkpoint)


def wanted(sampling: SamplingRecipe, now: Settings, tag: str = "") -> Settings:
    """The settings with which a model is sampled as it was made for; an ordinary one keeps sampler and steps."""
    sampler, steps = ONE_STEP if sampling.steps == 1 else FEW_STEP, sampling.steps
    if sampling.ordinary:
        sampler, steps = EULER if now.sampler in LIMITS else now.sampler, sampling.steps_taken(now.steps)
    return Settings(" ".join(filter(None, (now.prompt.rstrip(), tag))), sampler, steps, sampling.cfg)


def undo(now: Settings, before: dict | None) -> Settings:
    """The settings as they were, with what was written into the prompt since."""
    if not before:
        return now
    return Settings(_without(now.prompt, before["lora"]), before["sampler"], before["steps"], before["cfg"])


def _without(prompt: str, lora: str) -> str:
    """The prompt without this LoRA, whatever its weight is by now."""
    return re.sub(rf" ?<lora:{re.escape(lora)}(:[^>]*)?>", "", prompt, count=1) if lora else prompt
