"""Autoencoder and text encoders of a diffusers folder in the names and shapes of Stable Diffusion's single files.

(The other direction is in `trainer.checkpoint.layout`, which loads such files.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ...core.header import Shapes
from ...trainer.checkpoint.layout import OPEN_CLIP, VAE, Piece, renamed, same, wrapped
from .tensors import ExportError

UNUSED = 23  # the layer of Stable Diffusion 2's text encoder that nothing uses: the one before it is read


def vae_to_single(shapes: Shapes) -> list[Piece]:
    """A diffusers autoencoder's tensors in the single-file layout: attention as 1 x 1 convolutions."""
    levels = len({n.split(".")[2] for n in shapes if n.startswith("decoder.up_blocks.")})
    pieces = []
    for name, shape in shapes.items():
        new = renamed(name, VAE, True, levels)
        if new is None:
            raise ExportError(f"{name} is no part of Stable Diffusion's autoencoder: give the base as a single file")
        if ".mid.attn_1." in new and len(shape) == 2:
            pieces.append(Piece(new, (name,), (*shape, 1, 1), lambda t: t[0][:, :, None, None]))
        else:
            pieces.append(same(new, name, shape))
    return pieces


def clip_to_single(shapes: Shapes) -> list[Piece]:
    """A transformers CLIP's tensors in the single-file layout of Stable Diffusion 1 and SDXL's first."""
    return [same(wrapped(n), n, s) for n, s in shapes.items() if n != "text_projection.weight"]


def open_clip_to_single(shapes: Shapes, complete: bool) -> list[Piece]:
    """A transformers CLIP's tensors in OpenCLIP's layout.

    `complete` adds what a folder of Stable Diffusion 2 leaves out, and hosts miss although nothing uses it: a last
    layer that changes nothing, and the projection of the summary.
    """
    known = {wrapped(n): n for n in shapes if not n.endswith("position_ids")}
    pieces = []
    for name, source in known.items():
        if match := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = tuple(known[name.replace("q_proj", f"{p}_proj")] for p in "qkv")
            rows = sum(shapes[p][0] for p in parts)
            new = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"
            pieces.append(Piece(new, parts, (rows, *shapes[source][1:]), lambda t: torch.cat(tuple(t))))
            continue
        if re.search(r"self_attn\.[kv]_proj", name):
            continue
        new = renamed(name, OPEN_CLIP, True)
        if new is None:
            raise ExportError(f"{source} is no part of a CLIP text encoder: give the base as a single file")
        if new == "text_projection":
            pieces.append(Piece(new, (source,), shapes[source][::-1], lambda t: t[0].T))
        else:
            pieces.append(same(new, source, shapes[source]))
    return pieces + (_unused(pieces) if complete else [])


def _unused(pieces: Sequence[Piece]) -> list[Piece]:
    """The last layer and the projection that a folder lacks: a residual block of zeros, and the identity."""
    have = {p.name: p.shape for p in pieces}
    width = have["ln_final.weight"][0]
    layer = f"transformer.resblocks.{UNUSED}."
    before = f"transformer.resblocks.{UNUSED - 1}."
    if any(n.startswith(layer) for n in have) or not any(n.startswith(before) for n in have):
        return []
    copied = {n.replace(before, layer): s for n, s in have.items() if n.startswith(before)}
    ones = {f"{layer}ln_1.weight", f"{layer}ln_2.weight"}
    added = [
        Piece(n, (), s, lambda _, s=s, n=n: torch.ones(s) if n in ones else torch.zeros(s)) for n, s in copied.items()
    ]
    if "text_projection" not in have:
        added.append(Piece("text_projection", (), (width, width), lambda _: torch.eye(width)))
    return [*added, Piece("logit_scale", (), (), lambda _: torch.tensor(100.0).log())]
