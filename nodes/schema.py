"""How a node is described to ComfyUI, old and new."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_api.latest import io


def schema(search_aliases: Sequence[str], **about) -> io.Schema:
    """`io.Schema`, with further words to find the node by where this ComfyUI takes them (0.3.64 does not yet)."""
    if "search_aliases" in getattr(io.Schema, "__dataclass_fields__", {}):
        about["search_aliases"] = list(search_aliases)
    return io.Schema(**about)
