"""What other libraries write beside our own words: progress bars and warnings, which are nobody's to act on."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

# They are read when the libraries are imported.
SETTINGS = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Within, `libraries` (diffusers, transformers) show no bars and only errors, and Python's warnings are not shown.

    Whoever sets one of SETTINGS, or runs Python with -W, sees what was asked for.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with ExitStack() as stack:
        if not sys.warnoptions:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        for library in libraries:
            if find_spec(library):
                _hush(importlib.import_module(f"{library}.utils.logging"), stack, library)
        yield


def _hush(logging: Any, stack: ExitStack, library: str) -> None:
    """Errors alone, without progress bars, until the stack is closed."""
    stack.callback(logging.set_verbosity, logging.get_verbosity())
    if os.environ.get(f"{library.upper()}_VERBOSITY") == "error":
        logging.set_verbosity_error()
    bars = getattr(logging, "is_progress_bar_enabled", lambda: True)()
    logging.disable_progress_bar()
    if bars:
        stack.callback(logging.enable_progress_bar)
