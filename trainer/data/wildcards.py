"""Wildcard files, as sd-dynamic-prompts has them: `__colour__` is one line of `wildcards/colour.txt`.

A wildcard is put into a prompt as the choice that it stands for, before anything is drawn: what decides the teacher
pairs is then in the prompts themselves.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from .choices import COUNT, LONGEST_LINE, alternative, check_choices
from .files import DataError, lines_of, read_text
from .walk import is_hidden

FOLDER = "wildcards"
TABLES = (".yaml", ".yml", ".json")
MOST_FILES = 100_000  # files and folders that are looked at
MOST_VALUES = 100_000  # of a YAML or JSON file
LARGEST = 2**22  # bytes of a file
DEEPEST = 20  # wildcards in wildcards, lists in a YAML file
MOST_LETTERS = 2**26  # of all prompts together
NAME = r"__(?P<{0}>(?:[@~]?[^\W_]|[*./])(?:(?!__)[\w .*/\\'&+-]){{0,200}})(?P<{0}_given>\([^()\n]{{0,1000}}\))?__"
# A wildcard; or a choice of several, such as {2$$__colour__}, of one alone: they are then of its lines, each once.
WILDCARD = re.compile(
    rf"(?P<several>(?<!\\)\{{{COUNT})\s*{NAME.format('whole')}\s*\}}|(?<!\\){NAME.format('name')}",
)
# What the first line of a wildcard may not begin with where a choice begins, or it would be read as that.
BEGINNING = re.compile(rf"[@~]|{COUNT}")


class Wildcards:
    """The wildcard files of some folders, of one name those of the first; nothing is read before it is needed."""

    def __init__(self, folders: Sequence[str | Path]):
        self.folders = [Path(folder) for folder in folders]
        self._choices: dict[str, str] = {}  # by name: its lines as alternatives

    def put_into(self, prompts: Sequence[str]) -> list[str]:
        """The prompts with the lines of every wildcard as a choice.

        Raises DataError for a wildcard that is not there or leads back to itself, for what is not read of
        sd-dynamic-prompts' syntax, and for too long a prompt.
        """
        made, letters = [], 0
        for prompt in prompts:
            made.append(self._put_into(prompt, ()))
            letters += len(made[-1])
            if letters > MOST_LETTERS:
                raise DataError(
                    f"the prompts with the lines of their wildcards have more than {MOST_LETTERS:,} letters: use fewer "
                    "prompts, or shorter wildcard files"
                )
        return made

    def _put_into(self, line: str, chain: tuple[str, ...]) -> str:
        parts, end, letters = [], 0, 0
        for match in WILDCARD.finditer(line):
            name = match["whole"] or match["name"]
            if match["whole_given"] or match["name_given"]:
                raise DataError(f"wildcard {match[0]:.80} has a variable, which is not read: leave the brackets out")
            if name[0] in "@~":
                raise DataError(
                    f"wildcard {match[0]:.80} names a sampler by its first letter: one line is drawn at random in any "
                    "case. Leave that letter out"
                )
            options = self._options(name, chain)
            if match["several"]:
                between = "" if match["between"] is not None else ", $$"
                choice = f"{match['several']}{between}{options}}}"
            else:
                choice = f"{{{'{}' if BEGINNING.match(options) else ''}{options}}}"
            parts += [line[end : match.start()], choice]
            end = match.end()
            letters += len(parts[-2]) + len(choice)
            if letters > LONGEST_LINE:
                break
        letters += len(line) - end
        if letters > LONGEST_LINE:
            raise DataError(
                f"{line[:80]!r} has more than {LONGEST_LINE:,} letters with the lines of its wildcards: use fewer, or "
                "shorter files"
            )
        return "".join(parts) + line[end:]

    def _options(self, name: str, chain: tuple[str, ...]) -> str:
        """The lines of the wildcards that a name or a pattern means, as alternatives."""
        return _joined((self._options_of(each, chain) for each in self._named(name)), name)

    def _options_of(self, name: str, chain: tuple[str, ...]) -> str:
        if name in chain:
            raise DataError(f"wildcards lead back to themselves ({' -> '.join((*chain, name))}): take one of them out")
        if len(chain) >= DEEPEST:
            raise DataError(f"wildcards lie in wildcards more than {DEEPEST} deep ({' -> '.join(chain)}): use fewer")
        if name not in self._choices:
            if source := self._files.get(name):
                stripped = (raw.strip() for raw in lines_of(read_text(source, LARGEST)))
                lines = [line for line in stripped if line and not line.startswith("#")]
            else:
                lines = self._lists[name]
            if not lines:
                raise DataError(f"wildcard {source or name} holds no line: write one value a line")
            try:
                check_choices(lines)
            except DataError as error:
                raise DataError(f"wildcard {name}: {error}") from None
            inside = (*chain, name)
            self._choices[name] = _joined((alternative(self._put_into(line, inside)) for line in lines), name)
        return self._choices[name]

    def _named(self, name: str) -> list[str]:
        """The wildcards that a name, or a pattern with * in it, means."""
        wanted = name.strip().replace("\\", "/")
        parts = wanted.split("/")
        if wanted.startswith("/") or any(part in ("", ".", "..") for part in parts):
            raise DataError(f"wildcard __{name}__ leads out of its folder: name a file in {self._places()}")
        if "*" not in wanted:
            if wanted in self._files or wanted in self._lists:
                return [wanted]
        elif wanted.count("*") > 8:
            raise DataError(f"wildcard __{name}__ has more than 8 *: use fewer")
        elif found := sorted(each for each in {*self._files, *self._lists} if _matches(each.split("/"), parts)):
            return found
        raise DataError(self._missing(name, wanted))

    def _missing(self, name: str, wanted: str) -> str:
        known = [*self._files, *self._lists]
        near = difflib.get_close_matches(wanted, known[:10_000], 1, 0.5)
        nearest = f"the nearest is __{near[0]}__" if near else f"there are {len(known):,} others"
        if not known:
            nearest = "there is none at all"
        return (
            f"there is no wildcard __{name}__ in {self._places()}, {nearest}: write {wanted}.txt there, a value a "
            f"line, or \\__{name}__ for the letters themselves"
        )

    def _places(self) -> str:
        return ", ".join(map(str, self.folders)) or "any folder: none is known here"

    @cached_property
    def _found(self) -> dict[str, Path]:
        """Every file of the folders, by its path in them."""
        found: dict[str, Path] = {}
        seen = 0
        for folder in self.folders:
            for place, folders, names in os.walk(folder):
                folders[:] = sorted(name for name in folders if not is_hidden(name))
                seen += len(folders) + len(names)
                if seen > MOST_FILES:
                    raise DataError(f"{folder} holds more than {MOST_FILES:,} files: give a folder of wildcards alone")
                for name in sorted(names):
                    path = Path(place, name)
                    if not is_hidden(name) and path.suffix.lower() in (".txt", *TABLES) and path.is_file():
                        found.setdefault(path.relative_to(folder).as_posix(), path)
        return found

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The text files, by the names of their wildcards."""
        return {name[: -len(".txt")]: path for name, path in self._found.items() if path.suffix.lower() == ".txt"}

    @cached_property
    def _lists(self) -> dict[str, list[str]]:
        """The lists in YAML and JSON files, by the names of their wildcards."""
        found: dict[str, list[str]] = {}
        for place, path in self._found.items():
            if path.suffix.lower() in TABLES:
                found = _lists_of(_parsed(path), place.rpartition("/")[0], path) | found
        return found


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a pattern means a name, both in parts: `**` stands for any folders, at the end for all in them."""
    if not name or not pattern:
        return not name and not pattern
    if pattern[0] == "**":
        rest = pattern[1:] or ["*"]
        return any(_matches(name[k:], rest) for k in range(len(name)))
    return fnmatchcase(name[0], pattern[0]) and _matches(name[1:], pattern[1:])


def _parsed(path: Path) -> Any:
    """What a YAML or JSON file holds; raises DataError."""
    text = read_text(path, LARGEST)
    try:
        if path.suffix.lower() == ".json":
            return json.loads(text)
        import yaml
    except ImportError:
        raise DataError(f"{path} needs PyYAML (pip install pyyaml): or save each list as a .txt file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error!s:.200}): mend it") from None
    try:
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        words = " ".join(str(error).split())
        raise DataError(f"{path} is no YAML ({words:.200}): mend it") from None


def _lists_of(value: Any, folder: str, path: Path) -> dict[str, list[str]]:
    """The lists of texts in what a file holds, by their keys; whatever else it holds is left out."""
    found: dict[str, list[str]] = {}
    left, queue = MOST_VALUES, [(folder, value, 0)]
    while queue:
        name, value, depth = queue.pop()
        left -= 1 + (len(value) if isinstance(value, (list, dict)) else 0)  # one that YAML names twice counts twice
        if left < 0 or depth > DEEPEST:
            raise DataError(
                f"{path} holds more than {MOST_VALUES:,} values, or lists more than {DEEPEST} deep: part it"
            )
        if isinstance(value, dict):
            queue += [(f"{name}/{key}" if name else f"{key}", each, depth + 1) for key, each in value.items()]
        elif isinstance(value, list) and name:
            texts = [" ".join(str(each).split()) for each in value if isinstance(each, (str, int, float))]
            found[name] = [text for text in texts if text and not text.startswith("#")]
    return found


def _joined(options: Iterable[str], name: str) -> str:
    made, letters = [], 0
    for option in options:
        made.append(option)
        letters += len(option) + 1
        if letters > LONGEST_LINE:
            raise DataError(f"wildcard {name} has more than {LONGEST_LINE:,} letters: use fewer or shorter lines")
    return "|".join(made)
