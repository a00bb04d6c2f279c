"""How one-step models made elsewhere are sampled: one table, and how a model is recognised.

A student of ours says it in its card; these do not. Sources: the models' own cards and pipelines;
arXiv 2311.17042 (Turbo), 2402.13929 (Lightning), 2404.13686 (Hyper-SD), 2405.14867 (DMD2),
2412.02030 (NitroFusion), 2310.04378 (LCM).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .card import CardError, StudentCard, read_card, titles
from .schedule import expand, trailing_timesteps

MOST = 8  # steps


@dataclass(frozen=True)
class SamplingRecipe:
    """How a model is sampled in one or a few steps, at cfg 1.

    `prediction` is how its output is read: as the base model's (`inherit`), eps, v, x0, flow, or
    `lcm`, which is eps with LCM's boundary scalings. `start` is the timestep of pure noise, `steps`
    the number of steps it was made for. `renoise` adds fresh noise between steps; else Euler's step
    is taken. `shift` is NitroFusion's: the network is given the timestep t shift / 1000. `exact` says
    that pure noise is scaled by sigma itself, as our students learnt it, not by ComfyUI's
    sqrt(1 + sigma^2).
    """

    name: str
    prediction: str = "inherit"
    start: int = 999
    steps: int = 1
    renoise: bool = True
    shift: int = 1000
    exact: bool = False

    def timesteps(self, steps: int, denoise: float = 1.0) -> list[int]:
        """The start of each of `steps` steps, falling.

        `denoise` 1 begins at `start`, less begins that much nearer to the picture (img2img). Raises
        ValueError for steps or a denoise that cannot be.
        """
        if not 1 <= steps <= MOST:
            raise ValueError(f"steps is {steps}: give 1 to {MOST}")
        if not 0 < denoise <= 1:
            raise ValueError(f"denoise is {denoise:g}: give more than 0, and at most 1")
        return trailing_timesteps(steps, max(round((self.start + 1) * denoise), steps) - 1)

    def remarks(self, steps: int, cfg: float = 1.0) -> list[str]:
        """What of these settings it was not made for, in words."""
        said = []
        if steps > self.steps:
            made_for = f"{self.steps} step{'s' * (self.steps > 1)}"
            said.append(f"steps is {steps}: {self.name} was made for {made_for}, more make the picture no better.")
        if cfg > 1:
            said.append(f"cfg is {cfg:g}: {self.name} was made for 1, more burns the picture.")
        return said

    def network_timestep(self, timestep: Tensor) -> Tensor:
        """What the network is given for a timestep (B,): NitroFusion's is shifted, and whole (arXiv 2412.02030)."""
        return timestep if self.shift == 1000 else (timestep * self.shift / 1000).long()

    def in_words(self) -> str:
        """The sampling as a person reads it."""
        reading = {"inherit": "as the base model's", "lcm": "as LCM's"}.get(self.prediction, f"as {self.prediction}")
        between = "fresh noise" if self.renoise else "Euler's step"
        return (
            f"{self.name}: made for {self.steps} step{'s' * (self.steps > 1)}, noise enters at timestep {self.start}, "
            f"the output is read {reading}, between steps comes {between}; cfg 1, negative prompts do nothing."
        )


def lcm_boundary(x: Tensor, x0: Tensor, timestep: Tensor) -> Tensor:
    """LCM's boundary scalings of x0 (B, ...) from x at timestep (B,): arXiv 2310.04378, section 4.2.

    sigma_data is 0.5, and timesteps count ten times.
    """
    t = expand(10 * timestep.to(x), x)
    return x0 * t / (t**2 + 0.25).sqrt() + x * 0.25 / (t**2 + 0.25)


@dataclass(frozen=True)
class Family:
    """A family of models: the pattern in their names, its sampling, and what differs for some numbers of steps."""

    pattern: str
    sampling: SamplingRecipe
    special: Mapping[int, SamplingRecipe] = field(default_factory=dict)

    def for_steps(self, steps: int | None) -> SamplingRecipe:
        """The sampling of a model made for `steps`; None is the family's own."""
        if steps is None:
            return self.sampling
        return replace(self.special.get(steps, self.sampling), steps=steps, name=self.sampling.name)


def _family(pattern: str, name: str, *settings, special: Mapping[int, SamplingRecipe] | None = None, **more) -> Family:
    return Family(pattern, SamplingRecipe(name, *settings, **more), special or {})


# The first whose pattern is found wins: what is more particular stands above.
FAMILIES: dict[str, Family] = {
    family.sampling.name: family
    for family in (
        _family(r"nitro.*vibrant", "NitroFusion Vibrant", shift=500),
        _family(r"nitro", "NitroFusion Realism", shift=250),
        _family(
            r"lightning", "SDXL-Lightning", steps=4, renoise=False, special={1: SamplingRecipe("", "x0", renoise=False)}
        ),
        _family(r"hyper[-_ ]?sd", "Hyper-SD", steps=4, renoise=False, special={1: SamplingRecipe("", start=800)}),
        _family(r"dmd", "DMD2", steps=4, special={1: SamplingRecipe("", start=399)}),
        _family(r"lcm|latent.?consistency", "LCM", "lcm", steps=4),
        _family(r"turbo(?!distill)", "SD-Turbo, SDXL-Turbo"),
    )
}
STEPS = re.compile(r"(?<!\d)([1-8])[-_ ]?steps?", re.IGNORECASE)


def recognise(*hints: str) -> SamplingRecipe | None:
    """The sampling of the first hint (a file's name, a title in its metadata) that names a family, or None."""
    for hint in hints:
        for family in FAMILIES.values():
            if re.search(family.pattern, hint, re.IGNORECASE):
                match = STEPS.search(hint)
                return family.for_steps(int(match[1]) if match else None)
    return None


def of_card(card: StudentCard) -> SamplingRecipe:
    """The sampling of a student of ours."""
    prediction = "inherit" if card.prediction == card.base_prediction else card.prediction
    return SamplingRecipe(
        f"student of {card.base_model}", prediction, card.timesteps[0], len(card.timesteps), exact=True
    )


def by_file(path: str | Path, *hints: str) -> SamplingRecipe | None:
    """How a weight file is sampled: by a student's card in it, else as the family that a hint or its title names."""
    found = by_files([(path, *hints)])
    return found[1] if found else None


def by_files(files: Sequence[Sequence[Any]]) -> tuple[int, SamplingRecipe] | None:
    """Which of the files, each with hints, says how all of them together are sampled, and how; None where none does.

    A student's card counts before every name: a style's LoRA may be called after lightning.
    """
    for i, (path, *_) in enumerate(files):
        with suppress(CardError, OSError):
            return i, of_card(read_card(path))
    for i, (path, *hints) in enumerate(files):
        if recipe := recognise(*hints, *titles(path)):
            return i, recipe
    return None
