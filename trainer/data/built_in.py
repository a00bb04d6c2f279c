"""The prompt lists that come with us, in sentences and in booru tags, and which of them suits a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ...core.architecture import KNOWN, UNETS

PROSE, TAGS, AUTO = "prose", "tags", "auto"
LISTS = {name: Path(__file__).with_name("lists") / f"{name}.txt" for name in (PROSE, TAGS)}
# Words of names that models have which learnt booru tags, whole or at the beginning of a longer one.
WORDS = {"anime", "manga", "booru", "danbooru", "waifu", "pony", "noob", "wai", "nai", "hassaku", "counterfeit"}
BEGINNINGS = ("illustrious", "animagine", "noobai", "ponydiffusion", "ponyxl", "animefull", "danbooru", "counterfeit")
NAMES = ("modelspec.title", "ss_output_name", "ss_sd_model_name", "ss_base_model_version")  # of a file's metadata
FREQUENCY = "ss_tag_frequency"  # kohya's: folder -> part of a caption -> how often
LARGEST = 2**26  # letters of it
SHORT = 3  # words of a tag; parts of sentences have more


class Suggestion(NamedTuple):
    """A built-in list and why it is that one; `words` say both."""

    name: str
    why: str

    @property
    def words(self) -> str:
        """In one sentence."""
        return f"prompts: the built-in list of {'tags' if self.name == TAGS else 'prose'}, since {self.why}"


def suggest(name: str = "", architecture: str = "", metadata: Mapping[str, str] | None = None) -> Suggestion:
    """The list for a model of this name and architecture (`core.architecture`), with its file's metadata.

    The captions that it learnt count before its name; models that are no UNet read sentences, whatever they are called.
    """
    metadata = metadata or {}
    if architecture in KNOWN - set(UNETS.values()):
        return Suggestion(PROSE, f"models of its kind ({architecture}) read sentences")
    if learnt := _learnt(metadata.get(FREQUENCY, "")):
        return Suggestion(
            learnt, f"the model's metadata says that it learnt {'tags' if learnt == TAGS else 'sentences'}"
        )
    for named, where in ((name, "name"), *((metadata.get(key, ""), "metadata") for key in NAMES)):
        if word := _tagged(named):
            return Suggestion(TAGS, f"the model's {where} says {word}")
    return Suggestion(PROSE, "nothing says that the model learnt tags" if name else "nothing is known of the model")


def _tagged(name: str) -> str:
    """The word of a name that models of tags have; or ""."""
    for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name[:500]):
        if word.lower() in WORDS or word.lower().startswith(BEGINNINGS):
            return word
    return ""


def _learnt(text: str) -> str:
    """Whether kohya's counts of a model's captions are of tags or of sentences; "" where they say nothing."""
    try:
        found = json.loads(text) if 0 < len(text) <= LARGEST else {}
    except (ValueError, RecursionError):
        return ""
    short = all_of_them = 0.0
    for counts in found.values() if isinstance(found, dict) else ():
        for part, count in counts.items() if isinstance(counts, dict) else ():
            if isinstance(count, int) and 0 < count < 10**9 and part.strip():
                all_of_them += count
                short += count * (len(re.split(r"[\s_]+", part.strip())) <= SHORT)
    if all_of_them < 10:
        return ""
    return TAGS if short > 0.7 * all_of_them else PROSE
