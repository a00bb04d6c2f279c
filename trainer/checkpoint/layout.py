"""Autoencoder and text encoders of Stable Diffusion: names and shapes of a single file <-> those of diffusers.

(A UNet's names are in `core.naming`: its tensors are the same in both.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from ...core.header import Shapes

# The layers of an autoencoder's attention: LDM's name, diffusers', and the one of diffusers before 0.17. Programs have
# written each of them into single files, and the last two into folders.
ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q", "query"),
    ("k", "to_k", "key"),
    ("v", "to_v", "value"),
    ("proj_out", "to_out.0", "proj_attn"),
)
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
    *(
        (f"{{side}}.mid_block.attentions.0.{diffusers}.{{end}}", f"{{side}}.mid.attn_1.{single}.{{end}}")
        for single, new, *old in ATTENTION
        for diffusers, single in ((new, single), *((n, single) for n in old), *((new, n) for n in (new, *old)))
    ),
    ("{side}.conv_norm_out.{end}", "{side}.norm_out.{end}"),
    ("{side}.conv_in.{end}", "{side}.conv_in.{end}"),
    ("{side}.conv_out.{end}", "{side}.conv_out.{end}"),
    ("quant_conv.{end}", "quant_conv.{end}"),
    ("post_quant_conv.{end}", "post_quant_conv.{end}"),
)
# OpenCLIP; what of its attention lies in one tensor is FUSED.
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
PROJECTION = "text_projection.weight"
# What OpenCLIP has and the pictures of Stable Diffusion 2 do not depend on: diffusers' folders leave it out.
UNUSED = re.compile(r"transformer\.resblocks\.23\..*|text_projection")
MADE = re.compile(r"(^|\.)(position_ids|logit_scale)$")  # what transformers makes itself, or has no use for


@dataclass(frozen=True)
class Piece:
    """A tensor in one layout made of those of the other: `make` takes the tensors called `sources`."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[[Sequence[Tensor]], Tensor]


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


def vae_to_diffusers(shapes: Shapes) -> tuple[list[Piece], list[str]]:
    """A single file's autoencoder (names without prefix) as diffusers has it: attention as linear layers.

    Also the names of no layer that is known.
    """
    levels = len({n.split(".")[2] for n in shapes if n.startswith("decoder.up.")})
    pieces, unknown = [], []
    for name, shape in shapes.items():
        if name.startswith("loss.") or "model_ema" in name:
            continue  # of its training
        new = renamed(name, VAE, False, levels)
        if new is None:
            unknown.append(name)
        elif ".attentions.0." in new and len(shape) > 2:
            pieces.append(Piece(new, (name,), shape[:2], lambda t: t[0].flatten(1)))
        else:
            pieces.append(same(new, name, shape))
    return pieces, unknown


def text_encoder_to_diffusers(kind: str, shapes: Shapes, projected: bool) -> tuple[list[Piece], list[str]]:
    """A single file's text encoder (names without prefix), of a kind of `identify.TEXTS`, in transformers' names.

    Without what is not used; `projected` keeps the projection and every layer. Also the names that are not known.
    """
    shapes = {n: s for n, s in shapes.items() if not MADE.search(n)}
    if kind.startswith("open_clip"):
        return _open_clip(shapes, projected)
    names = {n: n if kind == "t5xxl" else wrapped(n) for n in shapes}
    return [same(new, n, shapes[n]) for n, new in names.items() if projected or new != PROJECTION], []


def _open_clip(shapes: Shapes, projected: bool) -> tuple[list[Piece], list[str]]:
    """The same of OpenCLIP, whose three projections of the attention lie in one tensor."""
    pieces, unknown = [], []
    for name, shape in shapes.items():
        if not projected and UNUSED.fullmatch(name):
            continue
        if match := FUSED.fullmatch(name):
            width, layer = shape[0] // 3, match[1].split(".")[2]
            for k, part in enumerate("qkv"):
                new = f"text_model.encoder.layers.{layer}.self_attn.{part}_proj.{match[2]}"
                rows = slice(k * width, (k + 1) * width)
                pieces.append(Piece(new, (name,), (width, *shape[1:]), lambda t, rows=rows: t[0][rows]))
        elif (new := renamed(name, OPEN_CLIP, False)) == PROJECTION:
            pieces.append(Piece(new, (name,), shape[::-1], lambda t: t[0].T.contiguous()))
        elif new:
            pieces.append(same(new, name, shape))
        elif name.startswith("transformer."):  # else no layer: a mask, a scale of the loss
            unknown.append(name)
    return pieces, unknown


def wrapped(name: str) -> str:
    """A text encoder's name with `text_model.`, which files from transformers 5.6 on may lack."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
