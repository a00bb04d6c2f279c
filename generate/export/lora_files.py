"""LoRA files in the names that each program reads."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.architecture import SD1, SD2
from ...core.low_rank import Change
from ...core.naming import is_single_file, layers_of, to_diffusers
from .student import COMFY, KOHYA
from .tensors import cast

STANDARD = 2  # layers of each block in Stable Diffusion's UNets; WebUIs read diffusers' names as of no others


def lora_tensors(
    layers: Mapping[str, Change], style: str, dtype: torch.dtype, architecture: str, per_block: int = 0
) -> dict[str, Tensor]:
    """The tensors of a LoRA file: `kohya`, `comfy` or `peft`; `layers` by their modules' single-file names.

    `per_block` says how many layers each block of a UNet has; 0 reads it from the names. Raises ExportError for numbers
    that have no room in `dtype`.
    """
    per_block = per_block or layers_of(layers)
    if style == "peft":
        return _peft(layers, dtype, per_block)
    standard = architecture in (SD1, SD2) and is_single_file(layers) and per_block == STANDARD
    names = {n: (COMFY if style == "comfy" else KOHYA) + n for n in layers}
    if style == "kohya":
        # diffusers reads its own names here, but of SDXL the single file's as well; kohya writes just these.
        names = to_diffusers(layers, per_block) if standard else {n: n for n in layers}
        names = {n: KOHYA + theirs.replace(".", "_") for n, theirs in names.items()}
    tensors = {}
    for module, layer in layers.items():
        name = names[module]
        down, up = in_range(layer, dtype, name)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors[f"{name}.alpha"] = torch.tensor(layer.scale * down.shape[0])
    return tensors


def _peft(layers: Mapping[str, Change], dtype: torch.dtype, per_block: int) -> dict[str, Tensor]:
    """As diffusers saves them: alpha is the rank, so the scale goes into B; one rank for all.

    Releases before 0.38 take the most frequent rank as every layer's alpha.
    """
    unet = is_single_file(layers)
    names = to_diffusers(layers, per_block) if unet else {m: m for m in layers}
    rank = max(layer.down.shape[0] for layer in layers.values())
    tensors = {}
    for module, layer in layers.items():
        name = f"{'unet' if unet else 'transformer'}.{names[module]}"
        down, up = in_range(Change(layer.down, layer.up.float() * layer.scale, 1.0), dtype, name)
        missing = rank - down.shape[0]
        tensors[f"{name}.lora_A.weight"] = F.pad(down, (0, 0) * (down.ndim - 1) + (0, missing))
        tensors[f"{name}.lora_B.weight"] = F.pad(up, (0, 0) * (up.ndim - 2) + (0, missing))
    return tensors


def in_range(layer: Change, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
    """Down and up in `dtype`; what is too large for it moves from one to the other by a power of two, exactly.

    Raises ExportError where both are too large.
    """
    down, up = layer.down.float(), layer.up.float()
    peaks = [float(t.abs().max()) if t.numel() else 0.0 for t in (down, up)]
    if max(peaks) > torch.finfo(dtype).max and all(0 < p < math.inf for p in peaks):
        shift = 2.0 ** round(math.log2(peaks[1] / peaks[0]) / 2)
        down, up = down * shift, up / shift
    return cast(down, dtype, f"{name}'s first half"), cast(up, dtype, f"{name}'s second half")
