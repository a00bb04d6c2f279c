"""What is found of somebody's pictures: those that can be used, and what is left out and why."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .files import DataError

MOST_FILES = 1_000_000  # that are looked at: files, members of archives, rows
LARGEST_FILE = 2**28  # bytes of one picture
ENDINGS = 8  # of other files that are named


class Reason(NamedTuple):
    """Why something is left out; `stops` is what is said where it must not be."""

    what: str  # in the plural
    stops: str = ""


HIDDEN = Reason("hidden files and folders")
LINKED = Reason("linked folders")
CLOSED = Reason(
    "folders that may not be read", "{count} folders may not be read, the first is {first}: change its rights"
)
OTHER = Reason("other files")
UNUSED = Reason("captions without a picture")
SECOND = Reason("captions and tables that another one goes before")
UNNAMED = Reason("pictures that no row of the table names")
SPLIT = Reason("files of other splits than the training one")
CACHED = Reason("caches")
PLAIN = Reason("tables without a column of pictures")
SPECIAL = Reason("links and special files")
TWICE = Reason("files of a name that comes twice in an archive")
FIELDS = Reason("further pictures of a sample")
NEEDS = Reason("parquet and arrow files, for which pyarrow is missing (pip install pyarrow)")
UNCAPTIONED = Reason(
    "pictures without a caption",
    "{count} pictures have no caption, the first is {first}: write it to a .txt beside it, or into its row",
)
EMPTY = Reason(
    "pictures with an empty caption",
    "{count} pictures have an empty caption, the first is {first}: write what it shows",
)
MISSING = Reason(
    "pictures that a table names and that are not there",
    "{count} pictures that a table names are not there, the first is {first}: put them there, or take their rows out",
)
ODD = Reason("captions and rows that cannot be read", "{words}")
BROKEN = Reason("pictures that cannot be read", "{words}")
DAMAGED = Reason("archives that cannot be read to their end", "{words}")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture with its caption, wherever it lies; nothing of it is read before it is opened."""

    name: str  # as a person finds it
    stamp: str  # what tells it from others, wherever its folder lies
    text: str
    open: Callable[[], BinaryIO]  # raises OSError or ValueError


@dataclass
class Left:
    """How many are left out for one reason, and the first of them."""

    count: int
    first: str
    words: str


@dataclass
class Found:
    """Pictures with their captions, and what is left out of the place where they lie."""

    place: str
    pictures: list[Picture] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)  # how it was read, where that could be otherwise
    left: dict[Reason, Left] = field(default_factory=dict)
    endings: dict[str, None] = field(default_factory=dict)  # of other files
    seen: int = 0

    def see(self, count: int = 1) -> None:
        """Count what is looked at; raises DataError where it is too much."""
        self.seen += count
        if self.seen > MOST_FILES:
            raise DataError(
                f"{self.place} holds more than {MOST_FILES:,} files or rows: give the folder of the pictures alone, "
                "or a part of it"
            )

    def leave(self, reason: Reason, name: str, words: str = "", count: int = 1) -> None:
        """Leave something out; `words` say what is wrong with it."""
        if reason in self.left:
            self.left[reason].count += count
        else:
            self.left[reason] = Left(count, name, words)

    def leave_other(self, name: str, ending: str) -> None:
        """Leave out a file that is neither a picture nor a caption."""
        self.leave(OTHER, name)
        if len(self.endings) < ENDINGS:
            self.endings[ending or "none"] = None

    def choose(self, words: str) -> None:
        """Note how something is read."""
        if words not in self.choices:
            self.choices.append(words)

    def add(self, name: str, stamp: str, text: str | None, open: Callable[[], BinaryIO]) -> None:
        """Take a picture in, or leave it out where its caption is missing (None) or empty."""
        text = text.strip() if text is not None else None
        if text:
            self.pictures.append(Picture(name, stamp, text, open))
        else:
            self.leave(UNCAPTIONED if text is None else EMPTY, name)

    def check(self, broken: str) -> None:
        """Raise DataError where no picture is left, or one is left out that must not be where `broken` is "stop"."""
        for reason, left in self.left.items() if broken == "stop" else ():
            if reason.stops:
                words = reason.stops.format(count=left.count, first=shown(left.first), words=printable(left.words))
                raise DataError(f"{words}. Or set broken_pictures to skip")
        if not self.pictures:
            raise DataError(f"{self.place} holds no picture that can be used{self._left_out()}")

    @property
    def usable(self) -> int:
        """How many pictures there are without those that turned out to be broken."""
        return len(self.pictures) - (self.left[BROKEN].count if BROKEN in self.left else 0)

    @property
    def captions(self) -> list[str]:
        """The captions, each once."""
        return list(dict.fromkeys(picture.text for picture in self.pictures))

    def in_words(self) -> str:
        """How many there are, how they were read, what is left out; empty for a plain folder of which all is used."""
        choices = "".join(f", {words}" for words in self.choices)
        left = self._left_out()
        return f"{self.usable} pictures of {self.place}{choices}{left}" if choices or left else ""

    def _left_out(self) -> str:
        parts = []
        for reason, left in self.left.items():
            detail = f" ({', '.join(self.endings)})" if reason is OTHER else ""
            if reason.stops:
                detail = f" ({printable(left.words[:300]) if left.words else f'the first is {shown(left.first)}'})"
            parts.append(f"{left.count} {reason.what}{detail}")
        return f"; left out: {', '.join(parts)}" if parts else ""


def shown(text: str) -> str:
    """A name from a folder or an archive as it can be printed anywhere, its end where it is too long."""
    return printable(text[-300:])


def printable(text: str) -> str:
    """A text without what a terminal or a page would take for more than letters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def check_size(size: int) -> None:
    """Raise ValueError for more bytes than a picture's file has."""
    if size > LARGEST_FILE:
        raise ValueError(f"it has {size:,} bytes, the most is {LARGEST_FILE:,}")


def open_file(path: str | Path) -> BinaryIO:
    """A picture's file; raises OSError, and ValueError where it is too large."""
    check_size(os.path.getsize(path))
    return open(path, "rb")
