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


def to_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Parameter names of a UNet in single-file layout -> diffusers' names: the inverse of `to_single_file`.

    Needs all the names of the UNet at once; names of another network are left out.
    """
    names = list(names)
    blocks = [(int(m[1]), m[2]) for m in (re.match(r"input_blocks\.(\d+)\.0\.(op)?", n) for n in names) if m]
    last = max((number for number, _ in blocks), default=0)
    # A level is its layers and a downsampling; a UNet without one is one level.
    level = min((number for number, op in blocks if op), default=last + 1)
    found = {n: _diffusers_name(n, level) for n in names}
    return {n: name for n, name in found.items() if name}


def _diffusers_name(name: str, level: int) -> str:
    for theirs, ours in OUTER.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    side, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    if side == "middle_block" and number in ("0", "1", "2"):
        attends = number == "1"
        return f"mid_block.attentions.0.{rest}" if attends else f"mid_block.resnets.{int(number) // 2}.{_outside(rest)}"
    index, _, rest = rest.partition(".")
    if side == "input_blocks":
        block, layer = divmod(int(number) - 1, level)
        if rest.startswith("op."):
            return f"down_blocks.{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    elif side == "output_blocks":
        block, layer = divmod(int(number), level)
        if index != "0" and rest.startswith("conv."):
            return f"up_blocks.{block}.upsamplers.0.{rest}"
    else:
        return ""
    end = "down" if side == "input_blocks" else "up"
    kind, inner = ("attentions", rest) if index == "1" else ("resnets", _outside(rest))
    return f"{end}_blocks.{block}.{kind}.{layer}.{inner}"


def _outside(rest: str) -> str:
    """The rest of a residual block's name in diffusers' layout."""
    found = next((ours for ours, theirs in RESNET.items() if rest.startswith(theirs + ".")), None)
    return f"{found}{rest.removeprefix(RESNET[found])}" if found else rest


def of_an_adapter(name: str) -> bool:
    """Whether a module or parameter of this name is part of a LoRA that peft has put into the network."""
    return any(part.startswith("lora_") for part in name.split("."))


def without_adapter(name: str) -> str:
    """The name that a layer has without peft's LoRA around it."""
    return name.replace(".base_layer", "")


def suggestion(name: str, known: Sequence[str]) -> str:
    """How a message about an unknown name ends: with the known one that was most likely meant, if one is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; the nearest is {near[0]!r}" if near else ""
