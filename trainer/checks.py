"""What front ends check before work starts: names, sizes, where paths may lead, and which page a request is from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .config import BACKBONES, ConfigError
from .data.files import DataError, check_file
from .data.picture_prompts import ENDINGS

LONGEST = 100  # letters of a name
# What Windows takes for a device, whatever follows the first dot.
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\.|$)", re.IGNORECASE)
TEXTS = (".txt", ".caption", ".prompts")


def check_name(name: str) -> str:
    """The name of a run or a student, which is a file's on any system; raises ConfigError for one that cannot be."""
    usable = re.fullmatch(r"[^\s./\\<>:\"|?*\x00-\x1f\x7f][^/\\<>:\"|?*\x00-\x1f\x7f]*", name)
    if not usable or name.endswith((".", " ")) or DEVICES.match(name) or not name.isprintable():
        raise ConfigError(f"name is {name[:LONGEST]!r}: give one that can be a folder's, such as my-turbo")
    if len(name.encode()) > LONGEST:
        raise ConfigError(f"name is {name[:20]!r}..., {len(name)} letters: give at most {LONGEST}")
    return name


def is_inside(path: Path, folders: Sequence[Path] | None) -> bool:
    """Whether a whole path lies below one of the folders, by its words; None allows any."""
    return folders is None or any(path.is_relative_to(os.path.abspath(folder)) for folder in folders)


def check_inside(path: str | Path, folders: Sequence[Path] | None) -> Path:
    """The path, which must lie below one of the folders; None allows any.

    By its words: a link inside a folder was put there by its owner and may lead anywhere, `..` may not. Raises
    DataError.
    """
    given = Path(os.path.abspath(os.path.expanduser(path)))
    if is_inside(given, folders):
        return given
    listed = ", ".join(map(str, folders or ())) or "none"
    raise DataError(
        f"{path!s:.300} is outside the folders that this server may read ({listed}): it can be reached from other "
        "computers. Move the files there, or let its owner allow their folder as turbodistill_readable_folders (a "
        "setting of AUTOMATIC1111 and Forge; in ComfyUI an entry of extra_model_paths.yaml)"
    )


def find_student(text: str, students: Sequence[Path], readable: Sequence[Path] | None) -> str:
    """The file that an `init_student` names: in one of the folders of `students`, without its ending too, or a path.

    Raises DataError for a path that lies below none of the `readable` folders (None: any may be named).
    """
    for folder in map(os.path.abspath, () if os.path.isabs(text) else students):
        for name in (text, f"{text}.safetensors"):
            path = os.path.abspath(os.path.join(folder, name))
            if is_inside(Path(path), [Path(folder)]) and os.path.isfile(path):
                return path
    check_inside(text, readable)
    return text


def check_backbone(text: str, readable: Sequence[Path] | None) -> None:
    """Raise DataError for a `pixel_backbone` that a server must not load: others reach it, and its owner offers others.

    A hub's name is a download, which they must not choose; a folder lies below one of those that are `readable`.
    """
    if readable is None or text in ("", *BACKBONES):
        return
    try:
        check_inside(text, readable)
    except DataError as error:
        raise DataError(f"pixel_backbone: {error}; or choose one of {', '.join(BACKBONES)}") from None


def check_prompt_place(path: str | Path, folders: Sequence[Path] | None) -> Path:
    """The path of a file of prompts, or of pictures; where others reach the server, by its ending too.

    No pipe: a page would wait for it. Raises DataError.
    """
    given = check_inside(path, folders)
    if os.path.isdir(given):
        return given
    if folders is not None and given.suffix.lower() not in (*TEXTS, *ENDINGS):
        raise DataError(f"{path!s:.300} is no file of prompts ({', '.join(TEXTS)}): rename it if it is one")
    check_file("prompt file", given)
    return given


def foreign(headers: Mapping[str, str]) -> str:
    """Why a request with these headers is refused: another site's page made it in the same browser; "" for all others.

    Browsers say where a request is from, and let no page change that: `Sec-Fetch-Site` on this machine and over TLS,
    whatever stands between, `Origin` with all that could change something. Programs send neither.
    """
    if site := headers.get("sec-fetch-site"):
        return "" if site in ("none", "same-origin") else f"not from another site's page ({site})"
    origin = headers.get("origin")
    place = (origin or "").partition("://")[2]
    if origin is None or (place and place in (headers.get("host"), headers.get("x-forwarded-host"))):
        return ""
    return (
        f"not from {origin:.100}: open the pages at this server's own address (a proxy must pass Host, or send "
        "X-Forwarded-Host)"
    )
