"""What the running graph says of where a node's inputs come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def file_names(prompt: Mapping[str, Any], node: str, through: str = "model") -> list[str]:
    """Weight files named upstream of a node's `through` input, the nearest first.

    `prompt` is ComfyUI's: node id -> {inputs: name -> value or [node id, output]}.
    """
    found: list[str] = []
    seen: set[str] = set()
    link = prompt.get(str(node), {}).get("inputs", {}).get(through)
    queue = [link[0]] if isinstance(link, list) else []
    while queue:
        current = str(queue.pop(0))
        if current in seen:
            continue
        seen.add(current)
        for value in prompt.get(current, {}).get("inputs", {}).values():
            if isinstance(value, list) and len(value) == 2:
                queue.append(value[0])
            elif isinstance(value, str) and value.lower().endswith(WEIGHTS):
                found.append(value)
    return found
