"""Autoencoder and text encoders of Stable Diffusion: single-file names and shapes <-> those of diffusers' folders.

(The denoiser's names are in `core.naming`: its tensors are the same in both.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .tensors import ExportError

# Pairs of name patterns, diffusers' first; read either way, the first that fits counts. {i} and {j} are numbers, {r} is
# one that counts down on the other side, {end} is weight or bias.
VAE = (
    ("encoder.down_blocks.{i}.resnets.{j}.conv_shortcut.{end}", "encoder.down.{i}.block.{j}.nin_shortcut.{end}"),
    ("encoder.down_blocks.{i}.resnets.{j}.{rest}", "encoder.down.{i}.block.{j}.{rest}"),
    ("encoder.down_blocks.{i}.downsamplers.0.conv.{end}", "encoder.down.{i}.downsample.conv.{end}"),
    ("decoder.up_blocks.{r}.resnets.{j}.conv_shortcut.{end}", "decoder.up.{r}.block.{j}.nin_shortcut.{end}"),
    ("decoder.up_blocks.{r}.resnets.{j}.{rest}", "decoder.up.{r}.block.{j}.{rest}"),
    ("decoder.up_blocks.{r}.upsamplers.0.conv.{end}", "decoder.up.{r}.upsample.conv.{end}"),
    ("{side}.mid_block.resnets.0.{rest}", "{side}.mid.block_1.{rest}"),
    ("{side}.mid_block.resnets.1.{rest}", "{side}.mid.block_2.{rest}"),
    ("{side}.mid_block.attentions.0.group_norm.{end}", "{side}.mid.attn_1.norm.{end}"),
    ("{side}.mid_block.attentions.0.to_q.{end}", "{side}.mid.attn_1.q.{end}"),
    ("{side}.mid_block.attentions.0.to_k.{end}", "{side}.mid.attn_1.k.{end}"),
    ("{side}.mid_block.attentions.0.to_v.{end}", "{side}.mid.attn_1.v.{end}"),
    ("{side}.mid_block.attentions.0.to_out.0.{end}", "{side}.mid.attn_1.proj_out.{end}"),
    # As diffusers before 0.17 wrote the same layers.
    ("{side}.mid_block.attentions.0.query.{end}", "{side}.mid.attn_1.q.{end}"),
    ("{side}.mid_block.attentions.0.key.{end}", "{side}.mid.attn_1.k.{end}"),
    ("{side}.mid_block.attentions.0.value.{end}", "{side}.mid.attn_1.v.{end}"),
    ("{side}.mid_block.attentions.0.proj_attn.{end}", "{side}.mid.attn_1.proj_out.{end}"),
    ("{side}.conv_norm_out.{end}", "{side}.norm_out.{end}"),
    ("{side}.conv_in.{end}", "{side}.conv_in.{end}"),
    ("{side}.conv_out.{end}", "{side}.conv_out.{end}"),
    ("quant_conv.{end}", "quant_conv.{end}"),
    ("post_quant_conv.{end}", "post_quant_conv.{end}"),
)
# The CLIP of OpenCLIP; its three projections lie in one tensor (`_fused`).
OPEN_CLIP = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.{end}", "ln_final.{end}"),
    ("text_projection.weight", "text_projection"),
    ("text_model.encoder.layers.{i}.layer_norm1.{end}", "transformer.resblocks.{i}.ln_1.{end}"),
    ("text_model.encoder.layers.{i}.layer_norm2.{end}", "transformer.resblocks.{i}.ln_2.{end}"),
    ("text_model.encoder.layers.{i}.mlp.fc1.{end}", "transformer.resblocks.{i}.mlp.c_fc.{end}"),
    ("text_model.encoder.layers.{i}.mlp.fc2.{end}", "transformer.resblocks.{i}.mlp.c_proj.{end}"),
    ("text_model.encoder.layers.{i}.self_attn.out_proj.{end}", "transformer.resblocks.{i}.attn.out_proj.{end}"),
)
FUSED = re.compile(r"(transformer\.resblocks\.\d+\.attn\.in_proj)_(weight|bias)")
FIELDS = {"i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "r": r"(?P<r>\d+)", "rest": "(?P<rest>.+)"}
FIELDS |= {"side": "(?P<side>encoder|decoder)", "end": "(?P<end>weight|bias)"}
# What OpenCLIP has and the pictures do not depend on: diffusers' folders leave it out.
UNUSED = re.compile(r"logit_scale|attn_mask|transformer\.resblocks\.23\..*|text_projection")
LAST = 23  # the layer of Stable Diffusion 2's text encoder that nothing uses: the one before it is read


@dataclass(frozen=True)
class Piece:
    """A tensor in one layout made of those of the other: `make` takes the tensors called `sources`."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[[Sequence[Tensor]], Tensor]


Shapes = Mapping[str, tuple[int, ...]]


def renamed(name: str, pairs: Iterable[tuple[str, str]], to_single: bool, count: int = 0) -> str | None:
    """A tensor's name in the other layout, or None; `count` is of what {r} counts."""
    for diffusers, single in pairs:
        given, wanted = (diffusers, single) if to_single else (single, diffusers)
        if match := _compiled(given).fullmatch(name):
            fields = match.groupdict()
            if "r" in fields:
                fields["r"] = str(count - 1 - int(fields["r"]))
            return wanted.format(**fields)
    return None


@lru_cache(1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", lambda m: FIELDS[m[1]], re.escape(pattern)))


def same(name: str, source: str, shape: tuple[int, ...]) -> Piece:
    """The tensor as it is."""
    return Piece(name, (source,), shape, lambda t: t[0])


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


def vae_to_diffusers(shapes: Shapes) -> list[Piece]:
    """A single file's autoencoder (names without prefix) as diffusers has it: attention as linear layers."""
    levels = len({n.split(".")[2] for n in shapes if n.startswith("decoder.up.")})
    pieces = []
    for name, shape in shapes.items():
        if name.startswith("loss.") or "model_ema" in name:
            continue  # of its training
        new = renamed(name, VAE, False, levels)
        if new is None:
            raise ExportError(f"{name} is no part of Stable Diffusion's autoencoder: diffusers' folder cannot hold it")
        if ".attentions.0." in new and len(shape) > 2:
            pieces.append(Piece(new, (name,), shape[:2], lambda t: t[0].flatten(1)))
        else:
            pieces.append(same(new, name, shape))
    return pieces


def clip_to_single(shapes: Shapes) -> list[Piece]:
    """A transformers CLIP's tensors in the single-file layout of Stable Diffusion 1 and SDXL's first."""
    return [same(f"transformer.{wrapped(n)}", n, s) for n, s in shapes.items() if n != "text_projection.weight"]


def clip_to_diffusers(shapes: Shapes) -> list[Piece]:
    """The inverse; the numbers of positions, which newer versions of transformers make themselves, are left out."""
    return [
        same(n.removeprefix("transformer."), n, s)
        for n, s in shapes.items()
        if n.startswith("transformer.text_model.") and not n.endswith("position_ids")
    ]


def wrapped(name: str) -> str:
    """A text encoder's name with `text_model.`, which files from transformers 5.6 on may lack."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


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
    layer = f"transformer.resblocks.{LAST}."
    if any(n.startswith(layer) for n in have) or not any(
        n.startswith(f"transformer.resblocks.{LAST - 1}.") for n in have
    ):
        return []
    before = {n.replace(f".{LAST - 1}.", f".{LAST}."): s for n, s in have.items() if f"resblocks.{LAST - 1}." in n}
    ones = {f"{layer}ln_1.weight", f"{layer}ln_2.weight"}
    added = [
        Piece(n, (), s, lambda _, s=s, n=n: torch.ones(s) if n in ones else torch.zeros(s)) for n, s in before.items()
    ]
    if "text_projection" not in have:
        added.append(Piece("text_projection", (), (width, width), lambda _: torch.eye(width)))
    return [*added, Piece("logit_scale", (), (), lambda _: torch.tensor(100.0).log())]


def open_clip_to_diffusers(shapes: Shapes, projected: bool) -> list[Piece]:
    """The inverse, without what is not used; `projected` keeps the projection and every layer (SDXL's second)."""
    pieces = []
    for name, shape in shapes.items():
        if name in ("logit_scale", "attn_mask") or (not projected and UNUSED.fullmatch(name)):
            continue
        if match := FUSED.fullmatch(name):
            width, layer = shape[0] // 3, match[1].split(".")[2]
            for k, part in enumerate("qkv"):
                new = f"text_model.encoder.layers.{layer}.self_attn.{part}_proj.{match[2]}"
                rows = slice(k * width, (k + 1) * width)
                pieces.append(Piece(new, (name,), (width, *shape[1:]), lambda t, rows=rows: t[0][rows]))
            continue
        new = renamed(name, OPEN_CLIP, False)
        if new is None:
            raise ExportError(f"{name} is no part of an OpenCLIP text encoder: diffusers' folder cannot hold it")
        if new == "text_projection.weight":
            pieces.append(Piece(new, (name,), shape[::-1], lambda t: t[0].T))
        else:
            pieces.append(same(new, name, shape))
    return pieces
