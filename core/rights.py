"""Files and folders that may not be read or written: libraries say of them that they are not there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

RIGHTS = "may not be read: change its rights, or those of the folders above it"


def denied(path: str | Path) -> str:
    """Why a file or folder may not be read, in words; "" where it may, and where something else is wrong with it."""
    try:
        if stat.S_ISREG(os.stat(path).st_mode):  # a pipe would not end
            os.close(os.open(path, os.O_RDONLY))
        elif not os.access(path, os.R_OK):
            return _words(path)
    except PermissionError:
        return _words(path)
    except (OSError, ValueError):
        pass
    return ""


def _words(path: str | Path) -> str:
    return f"{path!s:.300} {RIGHTS}"
