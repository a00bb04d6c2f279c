"""Transformers (Flux, Stable Diffusion 3, ...): layers of a single file <-> those of diffusers, which splits some.

Which rows of which weight make one of diffusers' is asked of diffusers' own converters: they are given numbers that say
where they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ...core import architecture as known
from ...core.header import Shapes
from ...core.low_rank import Change
from .tensors import ExportError

CLASSES = {
    known.SD3: "SD3Transformer2DModel",
    known.SD35_MEDIUM: "SD3Transformer2DModel",
    known.SD35_LARGE: "SD3Transformer2DModel",
    known.FLUX_DEV: "FluxTransformer2DModel",
    known.FLUX_SCHNELL: "FluxTransformer2DModel",
    known.FLUX2: "Flux2Transformer2DModel",
    known.CHROMA: "ChromaTransformer2DModel",
    known.LUMINA2: "Lumina2Transformer2DModel",
    known.SANA: "SanaTransformer2DModel",
    known.Z_IMAGE: "ZImageTransformer2DModel",
    known.QWEN_IMAGE: "QwenImageTransformer2DModel",
}
MOST_ROWS = 2**32  # more than any weight has


def rows_of(network: Shapes, architecture: str) -> dict[str, tuple[str, Tensor]]:
    """By diffusers' modules, the single file's module and the numbers of its rows that each is made of.

    Raises ExportError for an architecture that diffusers does not convert.
    """
    convert = _converter(architecture)
    names = list(network)
    probes: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        shape = network[name] or (1,)
        numbers = torch.arange(shape[0]) + i * MOST_ROWS
        probes[name] = numbers.view(-1, *(1 for _ in shape[1:])).expand(shape)
    try:
        converted = convert(checkpoint=probes)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise ExportError(f"diffusers cannot convert this {architecture} ({error!r:.200}): use --to kohya") from None
    found = {}
    for name, value in converted.items():
        if not name.endswith(".weight") or not value.ndim:
            continue
        numbers = value.flatten(1)[:, 0] if value.ndim > 1 else value
        sources = set((numbers // MOST_ROWS).tolist())
        if len(sources) == 1:
            source = names[sources.pop()]
            found[name.removesuffix(".weight")] = (source.removesuffix(".weight"), numbers % MOST_ROWS)
    return found


def _converter(architecture: str) -> Callable[..., dict[str, Tensor]]:
    try:
        from diffusers.loaders import single_file_model
    except ImportError as error:
        raise ExportError(f"this needs {error.name}: pip install 'turbodistill[demo]'") from None
    library = cast(Any, single_file_model)
    known_here = library.SINGLE_FILE_LOADABLE_CLASSES
    if (name := CLASSES.get(architecture, "")) not in known_here:
        raise ExportError(
            f"the installed diffusers converts no {architecture or 'model of this architecture'}: use --to kohya, or "
            "give the base as a diffusers folder"
        )
    return known_here[name]["checkpoint_mapping_fn"]


def split(layers: Mapping[str, Change], rows: Mapping[str, tuple[str, Tensor]]) -> dict[str, Change]:
    """A LoRA of a single file's modules as one of diffusers' modules: the same first half, of the second its rows."""
    made = {
        theirs: Change(layers[ours].down, layers[ours].up[numbers], layers[ours].scale)
        for theirs, (ours, numbers) in rows.items()
        if ours in layers
    }
    if missing := set(layers) - {ours for ours, _ in rows.values()}:
        raise ExportError(
            f"diffusers has no counterpart of {len(missing)} of the student's layers ({min(missing)}): use --to kohya"
        )
    return made
