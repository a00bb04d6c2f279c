"""What the commands take: numbers within bounds, folders that are none of somebody's files."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.clip_skip import MOST as MOST_CLIP_SKIP
from ..trainer.setting import KINDS

EXPONENT = re.compile(r"(\d{1,3})[eE]\+?(\d{1,2})")
LONGEST = 255  # bytes of a file's name


def between(low: float, high: float, kind: type = int) -> Callable[[str], float]:
    """What argparse calls for a number from `low` to `high`."""

    def bounded(text: str) -> float:
        try:
            value = number(text, kind)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            words = "a whole number from " if kind is int else ""
            raise argparse.ArgumentTypeError(f"is {text[:60]!r}: give {words}{low} to {high}")
        return value

    return bounded


def number(text: str, kind: type = int) -> float:
    """A number as it was typed; a whole one may be 1e3. Raises ValueError."""
    if kind is int and (value := EXPONENT.fullmatch(text.strip())):
        return int(value[1]) * 10 ** int(value[2])
    return kind(text)


def setting(kind: type) -> Callable[[str], Any]:
    """What argparse calls for a setting's value, whose bounds Config knows."""

    def parsed(text: str) -> Any:
        try:
            return number(text, kind) if kind in (int, float) else text
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text[:60]!r}: give {KINDS[kind]}") from None

    return parsed


def place(text: str) -> Path:
    """What argparse calls for a file or a folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a path")
    if any(len(part.encode("utf-8", "surrogatepass")) > LONGEST for part in Path(text).parts):
        raise argparse.ArgumentTypeError(f"is {text[:60]!r}..., longer than a file's name can be: give a path")
    return Path(text)


# Of a checkpoint, besides its name -> what `load_model` takes and what is said of it.
OF_MODEL = {
    "revision": "branch, tag or commit of a model on the hub",
    "variant": "which of its weight files, such as fp16 (default: the plain ones, else what is there)",
    "components": "diffusers folder or model of the hub that gives what a single file lacks: text encoders, tokenizers",
    "vae": "autoencoder's file or folder in place of the checkpoint's own",
    "tokenizer": "file or folder of CLIP's vocabulary, for a single file (default: looked for on this machine)",
}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Flags for the model and how it is loaded."""
    parser.add_argument(
        "--model",
        type=place,
        help=".safetensors file, diffusers folder, or owner/name on the Hugging Face hub (default: the embedded model)",
    )
    group = parser.add_argument_group("model")
    for name, about in OF_MODEL.items():
        group.add_argument(f"--{name}", type=str if name in ("revision", "variant") else place, help=about)
    group.add_argument(
        "--clip-skip",
        type=between(1, MOST_CLIP_SKIP),
        help="layer of CLIP that prompts are read at, as AUTOMATIC1111 counts: 1 is the last, 2 the one before "
        "(default: the model's own)",
    )
    group.add_argument("--model-prediction", choices=("eps", "v"), help="what it predicts, where it says it wrongly")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `load_model` is asked for besides the model, by the flags of `add_model`."""
    how = {name: getattr(args, name) for name in (*OF_MODEL, "clip_skip")} | {"prediction": args.model_prediction}
    return {name: value for name, value in how.items() if value is not None}


def folder(text: str) -> Path:
    """What argparse calls for a folder that is written to."""
    path = place(text)
    # os.path's answers, unlike Path's, are false for what no folder can be called.
    there = next((p for p in (path.absolute(), *path.absolute().parents) if os.path.exists(p)), None)
    if there and not os.path.isdir(there):
        raise argparse.ArgumentTypeError(f"is {text!r}, but {there} is a file: give a folder")
    return path


def new_file(text: str) -> Path:
    """What argparse calls for a file that is written."""
    path = place(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"is {text!r}, a folder: give a file's name")
    folder(str(path.parent))
    return path
