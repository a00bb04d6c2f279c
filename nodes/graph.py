"""What the running graph says of where a node's inputs come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def file_names(prompt: Mapping[str, Any], node: str, through: str = "model") -> list[str]:
    """Weight files named upstream of a node's `through` input, the nearest first.

    `prompt` is ComfyUI's: node id -> {inputs: name -> value or [node id, output]}.
    """
    values = (value for entry in upstream(prompt, node, through) for value in entry.get("inputs", {}).values())
    return [value for value in values if isinstance(value, str) and value.lower().endswith(WEIGHTS)]


def clip_layer(prompt: Mapping[str, Any], node: str, through: str = "positive") -> int | None:
    """Where the CLIP behind a node's conditioning stops: what the nearest CLIP Set Last Layer says, -1 or less.

    None where there is no such node, 0 where another node gives the number, or no CLIP is behind it.
    """
    reads = False
    for entry in upstream(prompt, node, through):
        inputs = entry.get("inputs", {})
        reads = reads or isinstance(inputs.get("clip"), list)
        if entry.get("class_type") == "CLIPSetLastLayer":
            layer = inputs.get("stop_at_clip_layer")
            return layer if isinstance(layer, int) else 0
    return None if reads else 0


def upstream(prompt: Mapping[str, Any], node: str, through: str) -> Iterator[Mapping[str, Any]]:
    """The nodes that a node's `through` input comes from, the nearest first."""
    seen: set[str] = set()
    link = prompt.get(str(node), {}).get("inputs", {}).get(through)
    queue = [link[0]] if isinstance(link, list) else []
    while queue:
        current = str(queue.pop(0))
        if current in seen:
            continue
        seen.add(current)
        entry = prompt.get(current, {})
        queue += [v[0] for v in entry.get("inputs", {}).values() if isinstance(v, list) and len(v) == 2]
        yield entry
