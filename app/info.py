"""`turbodistill info`: what a file, a folder or a cached model of the hub is, and what it can be used for."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import place


def command(commands: Any) -> None:
    """Add `info` to the command line's subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "info", help="what a student, a checkpoint, a LoRA or a folder is, in words"
    )
    parser.add_argument("file", type=place, help="file, diffusers folder, or owner/name of a model in the hub's cache")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Print what it is; nothing but headers and descriptions is read."""
    from ..trainer.checkpoint.about import in_words

    print(in_words(args.file))
    return 0
