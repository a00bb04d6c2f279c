"""What stands before and behind every prompt: quality tags, trigger words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...core.card import StudentCard
from ..config import Config


@dataclass(frozen=True)
class Affixes:
    """Text before and behind every prompt of the teacher; `baked` if the student makes it up for itself."""

    prefix: str = ""
    suffix: str = ""
    baked: bool = False

    @staticmethod
    def of_config(config: Config) -> Affixes:
        """Those of a training's settings."""
        return Affixes(config.prompt_prefix, config.prompt_suffix, config.bake_affixes)

    @staticmethod
    def of_recipe(recipe: Mapping[str, str]) -> Affixes:
        """Those that samples were made with, as `in_recipe` wrote them."""
        return Affixes(recipe.get("prefix", ""), recipe.get("suffix", ""), recipe.get("affixes") == "baked in")

    @staticmethod
    def of_card(card: StudentCard) -> Affixes:
        """Those that a student was made with."""
        return Affixes(card.prompt_prefix, card.prompt_suffix, card.bake_affixes)

    def in_recipe(self) -> dict[str, str]:
        """What they change of a recipe: nothing where there are none."""
        if not (self.prefix or self.suffix):
            return {}
        return {"prefix": self.prefix, "suffix": self.suffix, "affixes": "baked in" if self.baked else "typed"}

    def teacher(self, prompt: str) -> str:
        """The prompt that the teacher is given."""
        if not (self.prefix or self.suffix):
            return prompt
        return ", ".join(part for text in (self.prefix, prompt, self.suffix) if (part := text.strip(" ,")))

    def student(self, prompt: str) -> str:
        """The prompt that the student is given."""
        return prompt if self.baked else self.teacher(prompt)


NO_AFFIXES = Affixes()
