"""Names of UNet parameters: diffusers' layout <-> the single-file layout that hosts and LoRA files use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether these are parameter or module names of a diffusers UNet."""
    return any(n.startswith(("down_blocks.", "mid_block.", "up_blocks.")) for n in names)


def to_single_file(names: Iterable[str]) -> dict[str, str]:
    """Parameter names of a diffusers UNet -> `input_blocks.*`, `middle_block.*`, `output_blocks.*`.

    Needs all the names of the UNet at once: the number of layers and which blocks attend are read
    from them. Raises ValueError for a name that has no counterpart.
    """
    names = list(names)
    found = [m for m in map(BLOCK.match, names) if m]
    layers = 1 + max(int(m[4]) for m in found if m[1] == "down" and m[3] == "resnets")
    attending = {int(m[2]) for m in found if m[1] == "up" and m[3] == "attentions"}
    return {name: _single_file_name(name, layers, attending) for name in names}


def _single_file_name(name: str, layers: int, attending: set[int]) -> str:
    for ours, theirs in OUTER.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    if match := MIDDLE.match(name):
        kind, index, rest = match.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{_inside(kind, rest)}"
    match = BLOCK.match(name)
    if match is None:
        raise ValueError(f"{name!r} is no parameter of a Stable Diffusion UNet in diffusers' layout")
    side, block, kind, index, rest = match.groups()
    block, index = int(block), int(index)
    if side == "down":
        if kind == "downsamplers":  # the last of the block's modules, after its layers
            return f"input_blocks.{1 + block * (layers + 1) + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{1 + block * (layers + 1) + index}.{int(kind == 'attentions')}.{_inside(kind, rest)}"
    if kind == "upsamplers":  # shares a module with the block's last layer
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if block in attending else 1}.{rest}"
    return f"output_blocks.{block * (layers + 1) + index}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    if kind != "resnets":
        return rest
    head, _, tail = rest.partition(".")
    return f"{RESNET[head]}.{tail}"


def suggestion(name: str, known: Sequence[str]) -> str:
    """How a message about an unknown name ends: with the known one that was most likely meant, if one is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; the nearest is {near[0]!r}" if near else ""
