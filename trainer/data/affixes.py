"""What stands before and behind every prompt: quality tags, trigger words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...core.card import StudentCard
from ..config import Config

NAMES = ("prompt prefix", "prompt suffix", "bake affixes")  # in recipes


@dataclass(frozen=True)
class Affixes:
    """Text before and behind every prompt of the teacher; `baked` if the student makes it up for itself."""

    prefix: str = ""
    suffix: str = ""
    baked: bool = False

    @staticmethod
    def of(source: Config | StudentCard) -> Affixes:
        """Those of a training's settings, or of a student's card."""
        return Affixes(source.prompt_prefix, source.prompt_suffix, source.bake_affixes)

    @staticmethod
    def of_recipe(recipe: Mapping[str, str]) -> Affixes:
        """Those that samples were made with, as `in_recipe` wrote them."""
        return Affixes(*(recipe.get(name, "") for name in NAMES[:2]), baked=recipe.get(NAMES[2]) == "true")

    def in_recipe(self) -> dict[str, str]:
        """What they change of a recipe, by the settings' names in words: nothing where there are none."""
        values = (self.prefix, self.suffix, "true" if self.baked else "false")
        return dict(zip(NAMES, values, strict=True)) if self.prefix or self.suffix else {}

    def teacher(self, prompt: str) -> str:
        """The prompt that the teacher is given."""
        if not (self.prefix or self.suffix):
            return prompt
        return ", ".join(part for text in (self.prefix, prompt, self.suffix) if (part := text.strip(" ,")))

    def student(self, prompt: str) -> str:
        """The prompt that the student is given."""
        return prompt if self.baked else self.teacher(prompt)

    def both(self, prompt: str) -> tuple[str, str]:
        """The teacher's and the student's."""
        return self.teacher(prompt), self.student(prompt)


NO_AFFIXES = Affixes()
