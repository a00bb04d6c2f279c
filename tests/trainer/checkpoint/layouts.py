"""Names and shapes of transformers in their original layouts, of any size, and files of them that take no room."""

from __future__ import annotations

import json
import struct
from pathlib import Path

Shapes = dict[str, tuple[int, ...]]
BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F8_E4M3": 1, "I64": 8, "U8": 1}


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def convolution(name: str, out: int, into: int, side: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into, side, side)} | ({f"{name}.bias": (out,)} if bias else {})


def sd3(depth: int = 2, width: int = 128, dual: int = 0, text: int = 64, pooled: int = 32, grid: int = 24) -> Shapes:
    """Stable Diffusion 3's; 3.5 norms queries and keys, and its medium one attends twice in its first blocks."""
    found = linear("context_embedder", width, text) | convolution("x_embedder.proj", width, 16, 2)
    found |= {"pos_embed": (1, grid * grid, width)}
    for name, into in (("t_embedder", 256), ("y_embedder", pooled)):
        found |= linear(f"{name}.mlp.0", width, into) | linear(f"{name}.mlp.2", width, width)
    found |= linear("final_layer.adaLN_modulation.1", 2 * width, width) | linear("final_layer.linear", 64, width)
    for i in range(depth):
        for side in ("x", "context"):
            at, last = f"joint_blocks.{i}.{side}_block", side == "context" and i == depth - 1
            twice = side == "x" and i < dual
            found |= linear(f"{at}.adaLN_modulation.1", (2 if last else 9 if twice else 6) * width, width)
            for attention in ("attn", "attn2")[: 1 + twice]:
                found |= linear(f"{at}.{attention}.qkv", 3 * width, width)
                found |= {} if last else linear(f"{at}.{attention}.proj", width, width)
                found |= {f"{at}.{attention}.ln_{p}.weight": (64,) for p in "qk"} if dual else {}
            found |= (
                {} if last else linear(f"{at}.mlp.fc1", 4 * width, width) | linear(f"{at}.mlp.fc2", width, 4 * width)
            )
    return found


def flux(double: int = 1, single: int = 1, guidance: bool = True, width: int = 3072, text: int = 64) -> Shapes:
    """Flux's, whose width diffusers' conversion takes for granted."""
    found = linear("img_in", width, 64) | linear("txt_in", width, text)
    for name, into in (("time", 256), ("vector", 32), *((("guidance", 256),) if guidance else ())):
        found |= linear(f"{name}_in.in_layer", width, into) | linear(f"{name}_in.out_layer", width, width)
    found |= linear("final_layer.linear", 64, width) | linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return found | _flux_blocks(double, single, width, True)


def chroma(double: int = 1, single: int = 1, width: int = 3072, text: int = 64) -> Shapes:
    """Chroma's: Flux's blocks, whose modulations another network gives."""
    found = linear("img_in", width, 64) | linear("txt_in", width, text) | linear("final_layer.linear", 64, width)
    at, hidden = "distilled_guidance_layer", 128
    found |= linear(f"{at}.in_proj", hidden, 64) | linear(f"{at}.out_proj", width, hidden)
    for i in range(2):
        found |= linear(f"{at}.layers.{i}.in_layer", hidden, hidden) | linear(
            f"{at}.layers.{i}.out_layer", hidden, hidden
        )
        found |= {f"{at}.norms.{i}.scale": (hidden,)}
    return found | _flux_blocks(double, single, width, False)


def _flux_blocks(double: int, single: int, width: int, modulated: bool) -> Shapes:
    found: Shapes = {}
    for i in range(double):
        for side in ("img", "txt"):
            at = f"double_blocks.{i}.{side}"
            found |= linear(f"{at}_mod.lin", 6 * width, width) if modulated else {}
            found |= linear(f"{at}_attn.qkv", 3 * width, width) | linear(f"{at}_attn.proj", width, width)
            found |= linear(f"{at}_mlp.0", 4 * width, width) | linear(f"{at}_mlp.2", width, 4 * width)
            found |= {f"{at}_attn.norm.{p}_norm.scale": (128,) for p in ("query", "key")}
    for i in range(single):
        at = f"single_blocks.{i}"
        found |= linear(f"{at}.modulation.lin", 3 * width, width) if modulated else {}
        found |= linear(f"{at}.linear1", 7 * width, width) | linear(f"{at}.linear2", width, 5 * width)
        found |= {f"{at}.norm.{p}_norm.scale": (128,) for p in ("query", "key")}
    return found


def next_dit(width: int, kv: int, text: int, layers: int = 1, head: int = 96) -> Shapes:
    """Lumina 2's, and Z-Image's with as many heads for keys as for queries and two tokens of padding."""
    z_image = kv == width
    time = 256 if z_image else min(width, 1024)
    inner = int(width / 3 * 8) if z_image else 256 * -(-4 * width // 256)
    found = linear("x_embedder", width, 64) | {"cap_embedder.0.weight": (text,)} | linear("cap_embedder.1", width, text)
    found |= linear("t_embedder.mlp.0", 1024 if z_image else time, 256)
    found |= linear("t_embedder.mlp.2", time, 1024 if z_image else time)
    found |= linear("final_layer.linear", 64, width) | linear("final_layer.adaLN_modulation.1", width, time)
    found |= {"x_pad_token": (1, width), "cap_pad_token": (1, width)} if z_image else {"norm_final.weight": (width,)}
    blocks = [("layers", layers, True), ("noise_refiner", 2, True), ("context_refiner", 2, False)]
    for name, count, modulated in blocks:
        for at in (f"{name}.{i}" for i in range(count)):
            found |= linear(f"{at}.attention.qkv", width + 2 * kv, width, False)
            found |= linear(f"{at}.attention.out", width, width, False)
            found |= {f"{at}.attention.{p}_norm.weight": (head,) for p in "qk"}
            found |= linear(f"{at}.feed_forward.w1", inner, width, False)
            found |= linear(f"{at}.feed_forward.w2", width, inner, False)
            found |= linear(f"{at}.feed_forward.w3", inner, width, False)
            found |= {f"{at}.{p}_norm{n}.weight": (width,) for p in ("attention", "ffn") for n in (1, 2)}
            which = "adaLN_modulation.0" if z_image else "adaLN_modulation.1"
            found |= linear(f"{at}.{which}", 4 * width, time) if modulated else {}
    return found


def sana(layers: int = 1, width: int = 224, text: int = 48) -> Shapes:
    found = convolution("x_embedder.proj", width, 32, 1) | {"pos_embed": (1, 1024, width)}
    found |= linear("t_embedder.mlp.0", width, 256) | linear("t_embedder.mlp.2", width, width)
    found |= linear("t_block.1", 6 * width, width) | {"attention_y_norm.weight": (width,)}
    found |= linear("y_embedder.y_proj.fc1", width, text) | linear("y_embedder.y_proj.fc2", width, width)
    found |= {"y_embedder.y_embedding": (300, text), "final_layer.scale_shift_table": (2, width)}
    found |= linear("final_layer.linear", 32, width)
    for at in (f"blocks.{i}" for i in range(layers)):
        found |= {f"{at}.scale_shift_table": (6, width)} | linear(f"{at}.attn.qkv", 3 * width, width, False)
        found |= linear(f"{at}.attn.proj", width, width) | linear(f"{at}.cross_attn.q_linear", width, width)
        found |= linear(f"{at}.cross_attn.kv_linear", 2 * width, width) | linear(f"{at}.cross_attn.proj", width, width)
        found |= convolution(f"{at}.mlp.inverted_conv.conv", 5 * width, width, 1)
        found |= convolution(f"{at}.mlp.depth_conv.conv", 5 * width, 1, 3)
        found |= convolution(f"{at}.mlp.point_conv.conv", width, 5 * width // 2, 1, False)
    return found


def sparse(path: Path, shapes: Shapes, kind: str = "F16", values: dict[str, list[float]] | None = None) -> Path:
    """A safetensors file of zeros, of any size, of which the disk holds little more than the header.

    `values` are those of a few weights in float16 that are not zero.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        size = BYTES[kind]
        for side in shape:
            size *= side
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for name, numbers in (values or {}).items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(struct.pack(f"<{len(numbers)}e", *numbers))
    return path
