"""The error of a checkpoint that cannot be loaded."""

from __future__ import annotations


class ModelError(ValueError):
    """A checkpoint that cannot be loaded, or a pipeline that cannot be used: the message says why and what to do."""
