"""A student's file, as an export reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ...core.architecture import KNOWN, QWEN_IMAGE, UNETS, WAN
from ...core.card import StudentCard, read_card, read_student
from ...core.lora import PARTS, PEFT_PARTS
from ...core.low_rank import Change
from ...core.naming import dotted, is_diffusers, is_single_file, layers_of, to_diffusers, to_single_file
from ...core.student import FULL_PREFIX
from .tensors import ExportError, Weights

# Architectures of which a single file has one layer where diffusers has three, and diffusers' names of those.
FUSED = KNOWN - {*UNETS.values(), QWEN_IMAGE, WAN}
SPLIT = re.compile(r"transformer_blocks|(attention|attn)[._]to_")
KOHYA, COMFY, PEFT = "lora_unet_", "diffusion_model.", ("unet.", "transformer.")


class StudentFile:
    """A student: `layers` of its LoRA by their names in the file without prefix, or `full`, its whole network.

    Raises CardError for a file that is no student, or of which weights are no numbers.
    """

    def __init__(self, path: Path):
        self.path = path
        self.card: StudentCard = read_card(path)
        self.full: Weights | None = Weights(path) if self.card.kind == "full" else None
        self.layers: dict[str, Change] = {} if self.full else _layers(read_student(path)[0], path)
        if self.full and not self.full.starting(FULL_PREFIX):
            raise ExportError(f"{path} has the card of a full student, but no network in it: get the file again")

    def of_a_unet(self) -> bool:
        """Whether this is a LoRA of a Stable Diffusion UNet, by its names."""
        modules = list(map(_module, self.layers))
        return is_single_file(modules) or is_diffusers(modules)

    def splits_layers(self) -> bool:
        """Whether this is of a transformer in diffusers' names, whose layers a single file fuses."""
        return self.card.architecture in FUSED and any(map(SPLIT.search, self.full or self.layers))

    def of(self, network: Iterable[str] | None) -> dict[str, Change]:
        """The LoRA by its modules' single-file names, which are those of `network`'s weights.

        Without a network they are read from the file's own names, which only those of a UNet allow. Raises ExportError.
        """
        if network is None:
            if not self.of_a_unet():
                raise ExportError(
                    f"{self.path} is no LoRA of a Stable Diffusion UNet ({next(iter(self.layers))}): give its base by "
                    "--base, which names its layers"
                )
            modules = {name: _module(name) for name in self.layers}
            if is_diffusers(modules.values()):
                table = to_single_file(f"{m}.weight" for m in modules.values())
                modules = {name: table[f"{m}.weight"].removesuffix(".weight") for name, m in modules.items()}
            return {modules[name]: layer for name, layer in self.layers.items()}
        known = aliases(n.removesuffix(".weight") for n in network if n.endswith(".weight"))
        missing = [n for n in self.layers if n not in known]
        if missing:
            raise ExportError(
                f"{self.path} does not fit this base: {len(missing)} of its {len(self.layers)} layers are not there "
                f"({missing[0]}). Its base is {self.card.base_model}"
            )
        return {known[name]: layer for name, layer in self.layers.items()}


def aliases(modules: Iterable[str]) -> dict[str, str]:
    """What files call a network's modules, without prefix: with dots or "_", in single-file or diffusers' names."""
    modules = list(modules)
    other = to_diffusers(modules, layers_of(modules)) if is_single_file(modules) else {m: m for m in modules}
    names = {theirs: m for m, theirs in other.items()} | {m: m for m in modules}
    return {n.replace(".", "_"): m for n, m in names.items()} | names


def _layers(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Change]:
    layers = {}
    for key in tensors:
        for down_part, up_part in (PARTS[:2], PEFT_PARTS):
            if key.endswith(f".{down_part}"):
                name = key.removesuffix(f".{down_part}")
                down, up = tensors[key], tensors.get(f"{name}.{up_part}")
                if up is None:
                    raise ExportError(f"{path} lacks {name}.{up_part}: get the file again")
                alpha = tensors.get(f"{name}.alpha")
                scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
                layers[_bare(name)] = Change(down, up, scale)
    if not layers:
        raise ExportError(f"{path} has the card of a LoRA, but no LoRA in it: get the file again")
    return layers


def _bare(name: str) -> str:
    for prefix in (KOHYA, COMFY, *PEFT):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _module(name: str) -> str:
    return name if "." in name else dotted(name)
