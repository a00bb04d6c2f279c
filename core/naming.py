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
SINGLE = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)")
SINGLE_MIDDLE = re.compile(r"middle_block\.(\d+)\.(.+)")
# The parts of names, in either layout, that hold a "_": kohya's LoRA files have it in place of each dot, too.
UNDERSCORED = "input_blocks middle_block output_blocks time_embed label_emb in_layers out_layers emb_layers "
UNDERSCORED += "skip_connection down_blocks mid_block up_blocks time_embedding add_embedding linear_1 linear_2 conv_in "
UNDERSCORED += "conv_out time_emb_proj conv_shortcut transformer_blocks proj_in proj_out to_q to_k to_v to_out"
WORD = re.compile("|".join([*sorted(UNDERSCORED.split(), key=len, reverse=True), "[^_]+"]))


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether these are parameter or module names of a diffusers UNet."""
    return any(n.startswith(("down_blocks.", "mid_block.", "up_blocks.")) for n in names)


def to_single_file(names: Iterable[str]) -> dict[str, str]:
    """Parameter names of a diffusers UNet -> `input_blocks.*`, `middle_block.*`, `output_blocks.*`.

    Needs all the names of the UNet at once, or of all its attention: the number of layers and which blocks attend are
    read from them. Raises ValueError for a name that has no counterpart.
    """
    names = list(names)
    found = [m for m in map(BLOCK.match, names) if m]
    layers = 1 + max(int(m[4]) - (m[1] == "up") for m in found if m[3] in ("resnets", "attentions"))
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


def is_single_file(names: Iterable[str]) -> bool:
    """Whether these are parameter or module names of a UNet in the single-file layout."""
    return any(n.startswith(("input_blocks.", "middle_block.", "output_blocks.")) for n in names)


def to_diffusers(names: Iterable[str], layers: int = 0) -> dict[str, str]:
    """The inverse of `to_single_file`, for names of parameters or modules; those of another network are left out.

    `layers` are those of each block; 0 reads them from the names.
    """
    names = list(names)
    layers = layers or layers_of(names)
    found = {name: _diffusers_name(name, layers) for name in names}
    return {name: theirs for name, theirs in found.items() if theirs}


def layers_of(names: Iterable[str]) -> int:
    """How many layers each block of a UNet has, by its single-file names: up to the first downsampling.

    Where no name is a downsampling's (a LoRA on attention alone), the fewest with which no layer falls on one.
    """
    found = [m for m in map(SINGLE.match, names) if m and m[1] == "input" and m[2] != "0"]
    if ends := [int(m[2]) for m in found if m[4].partition(".")[0] == "op"]:
        return min(ends) - 1
    held = {int(m[2]) for m in found}
    return next(n for n in range(1, 2 + max(held, default=0)) if not any(i % (n + 1) == 0 for i in held))


def _diffusers_name(name: str, layers: int) -> str:
    """The name in diffusers' layout, "" where there is none."""
    for ours, theirs in OUTER.items():
        if f"{name}.".startswith(theirs + "."):
            return ours + name.removeprefix(theirs)
    if match := SINGLE_MIDDLE.match(name):
        index, rest = int(match[1]), match[2]
        return f"mid_block.attentions.0.{rest}" if index == 1 else f"mid_block.resnets.{index // 2}.{_outside(rest)}"
    match = SINGLE.match(name)
    if match is None:
        return ""
    side, number, place, rest = match.groups()
    number = int(number) - (side == "input")
    block, index = f"{'down' if side == 'input' else 'up'}_blocks.{number // (layers + 1)}", number % (layers + 1)
    head, _, tail = rest.partition(".")
    if head in ("op", "conv"):
        return f"{block}.{'downsamplers' if head == 'op' else 'upsamplers'}.0.conv" + (f".{tail}" if tail else "")
    return f"{block}.attentions.{index}.{rest}" if place == "1" else f"{block}.resnets.{index}.{_outside(rest)}"


def _outside(rest: str) -> str:
    """The rest of a residual block's name in diffusers' layout."""
    found = next((ours for ours, theirs in RESNET.items() if f"{rest}.".startswith(theirs + ".")), None)
    return f"{found}{rest.removeprefix(RESNET[found])}" if found else rest


def dotted(name: str) -> str:
    """A UNet module's name from that in a kohya file without its prefix, where each dot is a "_"."""
    return ".".join(WORD.findall(name))


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
