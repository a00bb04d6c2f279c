"""Which version this is."""

import importlib.metadata
import re
from pathlib import Path


def _version() -> str:
    """The installed version; that of the clone's own pyproject.toml where it runs without being installed."""
    try:
        return importlib.metadata.version("turbodistill")
    except importlib.metadata.PackageNotFoundError:
        text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
        found = re.search(r'^version = "(.+)"', text, re.MULTILINE)
        return found[1] if found else "unknown"


VERSION = _version()
