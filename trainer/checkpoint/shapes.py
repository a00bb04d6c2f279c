"""What the shapes of a network's weights tell of its configuration, so that a pruned or small relative loads, too.

Names are those of the original layouts, without a prefix. What shapes do not tell stands in `configs/`.
"""

from __future__ import annotations

import re
from typing import Any

from ...core.header import Shapes

Config = dict[str, Any]
HEAD = 64  # the width of an attention head in UNets with linear projections, and in CLIP

# Lumina 2's settings -> Z-Image's, of the same layers.
Z_IMAGE = {
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_refiner_layers": "n_refiner_layers",
    "num_attention_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
}


def count(shapes: Shapes, before: str) -> int:
    """How many layers there are whose names begin so: one more than the highest number that follows."""
    pattern = re.compile(re.escape(before) + r"(\d+)\.")
    return 1 + max((int(m[1]) for m in map(pattern.match, shapes) if m), default=-1)


def unet(shapes: Shapes) -> Config:
    """Of a UNet in LDM's names: widths, depths, and what it attends to."""
    blocks = count(shapes, "input_blocks.")
    first = next((i for i in range(blocks) if f"input_blocks.{i}.0.op.weight" in shapes), blocks)
    layers = first - 1
    starts = range(1, blocks, first)  # of each level's blocks: its layers, and one that halves the size
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in starts]
    depths = [_depths(shapes, "input_blocks", range(i, i + layers)) for i in starts]
    outer = [_depths(shapes, "output_blocks", range(i * first, (i + 1) * first)) for i in range(len(widths))]
    middle = count(shapes, "middle_block.1.transformer_blocks.")
    linear = any(n.endswith("proj_in.weight") and len(s) == 2 for n, s in shapes.items())
    inner = [*(d or 1 for d in depths[:-1]), middle or depths[-1] or 1]
    found = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in outer],
        "cross_attention_dim": next(s[1] for n, s in shapes.items() if n.endswith("attn2.to_k.weight")),
        "use_linear_projection": linear,
        # Diffusers' name for the number of heads: eight, or as many as are 64 wide.
        "attention_head_dim": [max(1, w // HEAD) for w in widths] if linear else 8,
    }
    if inner != [1] * len(inner):
        found["transformer_layers_per_block"] = inner
    if [d for d in outer if d] != [d for d in reversed(depths) if d]:
        found["reverse_transformer_layers_per_block"] = [d or 1 for d in outer]
    if "label_emb.0.0.weight" in shapes:
        found["projection_class_embeddings_input_dim"] = shapes["label_emb.0.0.weight"][1]
    return found


def _depths(shapes: Shapes, side: str, numbers: range) -> int | list[int]:
    """How many transformer blocks each layer of a block has; one number where they are equal, 0 for none."""
    depths = [count(shapes, f"{side}.{i}.1.transformer_blocks.") for i in numbers]
    return depths[0] if len(set(depths)) == 1 else depths


def vae(shapes: Shapes) -> Config:
    """Of an autoencoder in LDM's names."""
    levels = count(shapes, "encoder.down.")
    return {
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)],
        "layers_per_block": count(shapes, "encoder.down.0.block."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip(shapes: Shapes) -> Config:
    """Of a CLIP text encoder in transformers' names."""
    tokens, width = shapes["text_model.embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight")
    return {
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count(shapes, "text_model.encoder.layers."),
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
    } | ({"projection_dim": projection[0]} if projection else {})


def t5(shapes: Shapes) -> Config:
    """Of T5's encoder in transformers' names."""
    tokens, width = shapes["shared.weight"]
    gate = next(s for n, s in shapes.items() if n.endswith("DenseReluDense.wi_0.weight"))
    heads, inner = (
        shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][1],
        shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0],
    )
    return {
        "vocab_size": tokens,
        "d_model": width,
        "d_ff": gate[0],
        "num_heads": heads,
        "d_kv": inner // heads,
        "num_layers": count(shapes, "encoder.block."),
    }


def sd3(shapes: Shapes) -> Config:
    """Of Stable Diffusion 3's transformer."""
    width, latents = shapes["x_embedder.proj.weight"][:2]
    dual = sorted({int(n.split(".")[1]) for n in shapes if ".x_block.attn2." in n})
    return {
        "in_channels": latents,
        "out_channels": latents,
        "num_layers": count(shapes, "joint_blocks."),
        "num_attention_heads": width // 64,
        "caption_projection_dim": width,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": round(shapes["pos_embed"][1] ** 0.5),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if any(".ln_q." in n for n in shapes) else None,
    }


def flux(shapes: Shapes) -> Config:
    """Of Flux's transformer."""
    width, packed = shapes["img_in.weight"]
    return {
        "in_channels": packed,
        "num_layers": count(shapes, "double_blocks."),
        "num_single_layers": count(shapes, "single_blocks."),
        "num_attention_heads": width // 128,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }


def chroma(shapes: Shapes) -> Config:
    """Of Chroma's transformer."""
    width, packed = shapes["img_in.weight"]
    hidden, channels = shapes["distilled_guidance_layer.in_proj.weight"]
    return {
        "in_channels": packed,
        "num_layers": count(shapes, "double_blocks."),
        "num_single_layers": count(shapes, "single_blocks."),
        "num_attention_heads": width // 128,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": count(shapes, "distilled_guidance_layer.layers."),
    }


def lumina2(shapes: Shapes) -> Config:
    """Of Lumina 2's transformer."""
    width, patch = shapes["x_embedder.weight"]
    head = shapes["layers.0.attention.q_norm.weight"][0]
    return {
        "hidden_size": width,
        "in_channels": patch // 4,
        "num_layers": count(shapes, "layers."),
        "num_refiner_layers": count(shapes, "context_refiner."),
        "num_attention_heads": width // head,
        "num_kv_heads": (shapes["layers.0.attention.qkv.weight"][0] - width) // (2 * head),
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
    }


def z_image(shapes: Shapes) -> Config:
    """Of Z-Image's transformer: Lumina 2's layers, whose numbers diffusers calls otherwise."""
    return {Z_IMAGE.get(name, name): value for name, value in lumina2(shapes).items()}


def qwen_image(shapes: Shapes) -> Config:
    """Of Qwen-Image's transformer."""
    width, packed = shapes["img_in.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "in_channels": packed,
        "out_channels": packed // 4,
        "num_layers": count(shapes, "transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_norm.weight"][0],
    }


def sana(shapes: Shapes) -> Config:
    """Of Sana's transformer; its cross-attention's heads go with its width."""
    width, latents = shapes["x_embedder.proj.weight"][:2]
    heads = {2240: 20, 1152: 16}.get(width, max(1, width // 112))
    return {
        "in_channels": latents,
        "out_channels": latents,
        "num_layers": count(shapes, "blocks."),
        "num_attention_heads": width // 32,
        "cross_attention_dim": width,
        "num_cross_attention_heads": heads,
        "cross_attention_head_dim": width // heads,
        "caption_channels": shapes["y_embedder.y_proj.fc1.weight"][1],
        "mlp_ratio": shapes["blocks.0.mlp.inverted_conv.conv.weight"][0] / width / 2,
    }
