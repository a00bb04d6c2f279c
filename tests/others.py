"""LoRA files as others write them: for some layers of a UNet, each with a rank of its own."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

# Linear and convolution layers in a UNet of two blocks, whatever its widths.
LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.1.resnets.0.conv1",
    "mid_block.resnets.0.time_emb_proj",
    "conv_in",
)


def pairs(unet, ranks=(1, 2, 3, 4), alphas=(2.0, 8.0), size=0.3, layers=LAYERS):
    """Halves and alpha by the UNet's layers."""
    weights, draw = dict(unet.named_parameters()), torch.Generator().manual_seed(3)
    found = {}
    for i, name in enumerate(layers):
        shape, rank = weights[f"{name}.weight"].shape, ranks[i % len(ranks)]
        down = torch.randn(rank, *shape[1:], generator=draw) * size
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=draw) * size
        found[name] = (down, up, alphas[i % len(alphas)])
    return found


def deltas(pairs, with_alpha=True):
    """What the pairs change in each layer's weight, by the definition of LoRA."""
    found = {}
    for name, (down, up, alpha) in pairs.items():
        product = torch.einsum("or,r...->o...", up.flatten(1), down)
        found[name] = product * (alpha / len(down) if with_alpha else 1.0)
    return found


def changed(unet, deltas):
    """Put the changes into the UNet's weights."""
    with torch.no_grad():
        for name, delta in deltas.items():
            unet.get_parameter(f"{name}.weight").add_(delta)
    return unet


def tensors(pairs, style, rename=lambda name: name):
    """A file's tensors: kohya, diffusers, processors, peft or comfy."""
    found, metadata = {}, {}
    for name, (down, up, alpha) in pairs.items():
        there = rename(name)
        if style == "kohya":
            key = "lora_unet_" + there.replace(".", "_")
            found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        elif style == "diffusers":
            found |= {f"unet.{there}.lora.down.weight": down, f"unet.{there}.lora.up.weight": up}
            found[f"unet.{there}.alpha"] = torch.tensor(alpha)
        elif style == "peft":
            key = f"base_model.model.{there}"
            found |= {f"{key}.lora_A.default.weight": down, f"{key}.lora_B.default.weight": up}
        elif style == "comfy":
            key = f"diffusion_model.{there}"
            found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return found, metadata


def write(path, pairs, style="kohya", more=None, rename=lambda name: name, **metadata):
    """A LoRA file."""
    found, about = tensors(pairs, style, rename)
    save_file({k: v.clone().contiguous() for k, v in {**found, **(more or {})}.items()}, path, about | metadata)
    return path


def peft_settings(pairs):
    """peft's settings of these pairs, as diffusers writes them into a header."""
    ranks, alphas = {n: len(d) for n, (d, _, _) in pairs.items()}, {n: a for n, (_, _, a) in pairs.items()}
    settings = {"unet.r": 4, "unet.lora_alpha": 1.0, "unet.rank_pattern": ranks, "unet.alpha_pattern": alphas}
    return json.dumps(settings)
