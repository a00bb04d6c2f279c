"""The WebUIs' samplers "ADD 1-step" and "ADD few-step", as far as they need no host."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.card import CardError, StudentCard, read_card
from ..core.families import FAMILIES, MOST, SamplingRecipe, by_file, by_files, of_card
from ..core.fit import Base, check_fit

# A name must not end in " Simple", " Turbo" or another scheduler's name: the host would cut that off.
ONE_STEP, FEW_STEP = "ADD 1-step", "ADD few-step"
LIMITS = {ONE_STEP: 1, FEW_STEP: MOST}  # passes of the network
CHOSEN, MODEL, TIMESTEPS, HIRES_TIMESTEPS = "ADD chosen", "ADD model", "ADD timesteps", "Hires ADD timesteps"
WRITTEN = (CHOSEN, MODEL, TIMESTEPS, HIRES_TIMESTEPS)  # what we write into a picture's infotext
DETECT = "detect"
ORDINARY = SamplingRecipe("one-step model", span=(1, MOST))
UNKNOWN = Base()
LORA = re.compile(r"<lora:([^:>]+)((?::[^:>]*)*)>")


def passes(name: str, steps: int) -> int:
    """How many passes the sampler of this name makes when asked for `steps`."""
    return min(max(int(steps), 1), LIMITS[name])


@dataclass(frozen=True)
class Found:
    """How a picture is sampled, and what said so."""

    sampling: SamplingRecipe
    source: str = ""  # in words; "" where nothing said so

    def in_words(self) -> str:
        return f"{self.source}: {self.sampling.in_words()}" if self.source else NOTHING


NOTHING = (
    "No student and no known one-step model is in the prompt's LoRAs or in the checkpoint's name: it is sampled as an "
    "ordinary Turbo model. Choose a student or a family if you know it."
)


def find(
    choice: str,
    steps: int,
    files: Mapping[str, Path],
    applied: Iterable[str],
    checkpoint: Path | None = None,
    base: Base = UNKNOWN,
) -> Found:
    """How to sample: as chosen, else by the LoRAs that are applied, else by the checkpoint, else as a Turbo.

    `choice` is DETECT, a family, or the name of a LoRA of `files`; `applied` are names of LoRAs too. A
    chosen family is taken in its version for `steps`. Raises ValueError for a choice that is none of these.
    """
    if choice in files:
        if sampling := by_file(files[choice], choice):
            return Found(sampling, f"LoRA {choice}")
        raise ValueError(f"the LoRA {choice!r} is no student and of no known family: choose its family, or {DETECT!r}")
    if choice in FAMILIES:
        return Found(FAMILIES[choice].for_steps(steps), "As chosen")
    if choice not in (DETECT, ""):
        raise ValueError(
            f"{choice!r:.100} is neither a LoRA here nor a family of one-step models ({', '.join(FAMILIES)}): "
            f"choose another, or {DETECT!r}"
        )
    given = [(files[name], name, f"LoRA {name}") for name in applied if name in files]
    if checkpoint:
        given.append((checkpoint, checkpoint.name, f"Checkpoint {checkpoint.name}"))
    found = by_files([(path, name) for path, name, _ in given], base.architecture, base.prediction)
    return Found(found[1], given[found[0]][2]) if found else Found(ORDINARY)


def applied_loras(prompt: str) -> dict[str, float]:
    """The LoRAs in a prompt as it is written, with their weights in the UNet; without those of weight nought."""
    found = {match[1]: unet_weight(match[2].split(":")[1:]) for match in LORA.finditer(prompt)}
    return {name: weight for name, weight in found.items() if weight}


def unet_weight(given: Sequence[str]) -> float:
    """A LoRA's weight in the UNet, by what stands behind its name: `1`, or `te=1` and `unet=0`."""
    named = dict(weight.split("=", 1) for weight in given if "=" in weight)
    plain = [weight for weight in given if "=" not in weight]
    weight = named.get("unet") or (plain[1] if len(plain) > 1 else plain[0] if plain else "1")
    try:
        return float(weight)
    except ValueError:
        return 1.0


def too_many(name: str, steps: int) -> list[str]:
    """What to tell the user who has asked for more passes than the sampler makes."""
    made = passes(name, steps)
    if made >= steps:
        return []
    return [f"{name} makes {'one pass' if made == 1 else f'at most {made} passes'}: of {steps} steps, {made}."]


def remarks(found: Found, steps: int, cfg: float, choice: str, applied: Iterable[str]) -> list[str]:
    """What else to tell the user of these settings, below the picture."""
    sampling = found.sampling if found.source else replace(found.sampling, name="a one-step model")
    said = ([] if found.source else [NOTHING]) + sampling.remarks(steps, cfg)
    if sampling.ordinary:
        said.append(f"{sampling.name} is sampled as its base is: take an ordinary sampler, {sampling.steps} steps.")
    if found.source == f"LoRA {choice}" and choice not in applied:
        said.append(f"The student {choice} is chosen, but <lora:{choice}:1> is not in the prompt.")
    return said


def students_among(applied: Iterable[str], files: Mapping[str, Path]) -> dict[str, StudentCard]:
    """The students of ours among the LoRAs that are applied, with their cards."""
    found = {}
    for name in applied:
        with suppress(CardError, OSError, KeyError):
            found[name] = read_card(files[name])
    return found


def by_another(students: Mapping[str, StudentCard], sampler: str, steps: int, cfg: float) -> list[str]:
    """What to tell of students that another sampler than ours samples: those of guidance alone want no other."""
    said = []
    for name, card in students.items():
        if card.guidance_only:
            said += replace(of_card(card), name=name).remarks(steps, cfg)
    if few := [(name, card) for name, card in students.items() if not card.guidance_only]:
        name, card = few[0]
        ours = list(LIMITS)[len(card.timesteps) > 1]
        said.append(f"{name} is a student: {sampler} is not made for it, take {ours} and CFG Scale 1.")
    return said


def misfits(students: Mapping[str, StudentCard], weights: Mapping[str, float], base: Base) -> list[str]:
    """What does not fit between students, their weights and the loaded model.

    Raises CardError where no picture could come of it.
    """
    said = [each for name, card in students.items() for each in check_fit(card, base, name, weight=weights[name])]
    if len(students) > 1:
        said.append(
            f"{len(students)} students are in the prompt ({', '.join(students)}): their changes add up, use one."
        )
    return said
