"""How a node is described to ComfyUI, old and new, and held to what its description says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from comfy_api.latest import io


def schema(search_aliases: Sequence[str], **about) -> io.Schema:
    """`io.Schema`, with further words to find the node by where this ComfyUI takes them (0.3.64 does not yet)."""
    if "search_aliases" in getattr(io.Schema, "__dataclass_fields__", {}):
        about["search_aliases"] = list(search_aliases)
    return io.Schema(**about)


def within_bounds(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """A node's `execute` that raises ValueError for a number out of its widget's bounds.

    ComfyUI looks at those that are written into a graph, not at those that come from another node.
    """

    @functools.wraps(execute)
    def checked(cls: type[io.ComfyNode], **given: Any) -> io.NodeOutput:
        for widget in cls.define_schema().inputs:
            low, high = getattr(widget, "min", None), getattr(widget, "max", None)
            value = given.get(widget.id)
            if low is not None and high is not None and value is not None and not low <= value <= high:
                raise ValueError(f"{widget.id} is {value!s:.60}: give {low} to {high}")
        return execute(cls, **given)

    return checked
