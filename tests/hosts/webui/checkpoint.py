"""Small random Stable Diffusion 1 checkpoints, in the ordinary single-file layout, that the WebUIs load.

Forge takes only what has SD 1.5's widths, text encoder and autoencoder: its file shares a few storages
among all tensors, and so is small. AUTOMATIC1111 takes any that a .yaml beside the file describes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY = 49408


@dataclass(frozen=True)
class Shape:
    """Sizes of the three networks; the UNet has two levels of one block, with attention in the first."""

    channels: int  # of the UNet
    context: int  # of the text encoder
    text_layers: int
    vae: tuple[int, ...]  # widths of the autoencoder's levels
    vae_blocks: int


FORGE = Shape(320, 768, 12, (128, 256, 512, 512), 2)
A1111 = Shape(64, 64, 1, (32, 32, 32, 32), 1)


class Weights:
    """A state dict in the making: every weight is a view of one pool of noise per fan-in, of variance 1 / fan-in."""

    def __init__(self, seed: int):
        self.tensors: dict[str, Tensor] = {}
        self.pools: dict[int, Tensor] = {}
        self.draw = torch.Generator().manual_seed(seed)
        self.zero = torch.zeros(1, dtype=torch.float16)

    def noise(self, shape: tuple[int, ...], fan_in: int) -> Tensor:
        count, shift = torch.Size(shape).numel(), int(torch.randint(0, 4096, (), generator=self.draw))
        if len(self.pools.get(fan_in, ())) < count + shift:
            self.pools[fan_in] = (torch.randn(count + 4096, generator=self.draw) / fan_in**0.5).half()
        return self.pools[fan_in][shift : shift + count].view(shape)

    def layer(self, name: str, *shape: int, bias: bool = True, zero: bool = False) -> None:
        """A linear layer or convolution."""
        fan_in = torch.Size(shape[1:]).numel()
        self.tensors[f"{name}.weight"] = self.zero.expand(shape) if zero else self.noise(shape, fan_in)
        if bias:
            self.tensors[f"{name}.bias"] = self.zero.expand(shape[0])

    def norm(self, name: str, width: int) -> None:
        self.tensors[f"{name}.weight"] = torch.ones(1, dtype=torch.float16).expand(width)
        self.tensors[f"{name}.bias"] = self.zero.expand(width)

    def table(self, name: str, rows: int, width: int) -> None:
        """An embedding whose rows overlap."""
        self.tensors[f"{name}.weight"] = self.noise((rows + width,), 1).as_strided((rows, width), (1, 1))


def unet(weights: Weights, shape: Shape, at: str = "model.diffusion_model.") -> None:
    wide, time = shape.channels, 4 * shape.channels

    def residual(name: str, width: int = wide) -> None:
        weights.norm(f"{at}{name}.in_layers.0", width)
        weights.layer(f"{at}{name}.in_layers.2", wide, width, 3, 3)
        weights.layer(f"{at}{name}.emb_layers.1", wide, time)
        weights.norm(f"{at}{name}.out_layers.0", wide)
        weights.layer(f"{at}{name}.out_layers.3", wide, wide, 3, 3)
        if width != wide:
            weights.layer(f"{at}{name}.skip_connection", wide, width, 1, 1)

    def attention(name: str) -> None:
        block = f"{at}{name}.transformer_blocks.0"
        weights.norm(f"{at}{name}.norm", wide)
        weights.layer(f"{at}{name}.proj_in", wide, wide, 1, 1)
        for kind, width in (("attn1", wide), ("attn2", shape.context)):
            weights.layer(f"{block}.{kind}.to_q", wide, wide, bias=False)
            weights.layer(f"{block}.{kind}.to_k", wide, width, bias=False)
            weights.layer(f"{block}.{kind}.to_v", wide, width, bias=False)
            weights.layer(f"{block}.{kind}.to_out.0", wide, wide)
        weights.layer(f"{block}.ff.net.0.proj", 8 * wide, wide)
        weights.layer(f"{block}.ff.net.2", wide, 4 * wide)
        for number in (1, 2, 3):
            weights.norm(f"{block}.norm{number}", wide)
        weights.layer(f"{at}{name}.proj_out", wide, wide, 1, 1)

    weights.layer(f"{at}time_embed.0", time, wide)
    weights.layer(f"{at}time_embed.2", time, time)
    weights.layer(f"{at}input_blocks.0.0", wide, 4, 3, 3)
    for name in ("input_blocks.1", "input_blocks.3", "middle_block"):
        residual(f"{name}.0")
    weights.layer(f"{at}input_blocks.2.0.op", wide, wide, 3, 3)
    residual("middle_block.2")
    for number in range(4):
        residual(f"output_blocks.{number}.0", 2 * wide)
    weights.layer(f"{at}output_blocks.1.1.conv", wide, wide, 3, 3)
    for name in ("input_blocks.1.1", "middle_block.1", "output_blocks.2.1", "output_blocks.3.1"):
        attention(name)
    weights.norm(f"{at}out.0", wide)
    weights.layer(f"{at}out.2", 4, wide, 3, 3)


def autoencoder(weights: Weights, shape: Shape, at: str = "first_stage_model.") -> None:
    """Its residual parts are nought and its latents as large as a trained one's and certain.

    So pictures are as near to each other as their latents, and noise does to them what it does to a trained model's.
    """

    def residual(name: str, given: int, wide: int) -> None:
        weights.norm(f"{name}.norm1", given)
        weights.layer(f"{name}.conv1", wide, given, 3, 3)
        weights.norm(f"{name}.norm2", wide)
        weights.layer(f"{name}.conv2", wide, wide, 3, 3, zero=True)
        if given != wide:
            weights.layer(f"{name}.nin_shortcut", wide, given, 1, 1)

    def middle(name: str, wide: int) -> None:
        residual(f"{name}.mid.block_1", wide, wide)
        residual(f"{name}.mid.block_2", wide, wide)
        weights.norm(f"{name}.mid.attn_1.norm", wide)
        for part in ("q", "k", "v", "proj_out"):
            weights.layer(f"{name}.mid.attn_1.{part}", wide, wide, 1, 1, zero=part == "proj_out")

    encoder, decoder, last = f"{at}encoder", f"{at}decoder", len(shape.vae) - 1
    wide = shape.vae[0]
    weights.layer(f"{encoder}.conv_in", wide, 3, 3, 3)
    for level, width in enumerate(shape.vae):
        for block in range(shape.vae_blocks):
            residual(f"{encoder}.down.{level}.block.{block}", wide, width)
            wide = width
        if level < last:
            weights.layer(f"{encoder}.down.{level}.downsample.conv", wide, wide, 3, 3)
    middle(encoder, wide)
    weights.norm(f"{encoder}.norm_out", wide)
    weights.layer(f"{encoder}.conv_out", 8, wide, 3, 3)
    weights.layer(f"{decoder}.conv_in", wide, 4, 3, 3)
    middle(decoder, wide)
    for level, width in reversed(list(enumerate(shape.vae))):
        for block in range(shape.vae_blocks + 1):
            residual(f"{decoder}.up.{level}.block.{block}", wide, width)
            wide = width
        if level:
            weights.layer(f"{decoder}.up.{level}.upsample.conv", wide, wide, 3, 3)
    weights.norm(f"{decoder}.norm_out", wide)
    weights.layer(f"{decoder}.conv_out", 3, wide, 3, 3)
    weights.layer(f"{at}quant_conv", 8, 8, 1, 1)
    rows = torch.arange(8) < 4  # the mean; below it the logarithm of the variance
    weights.tensors[f"{at}quant_conv.weight"] = weights.tensors[f"{at}quant_conv.weight"] * 10 * rows.view(8, 1, 1, 1)
    weights.tensors[f"{at}quant_conv.bias"] = -30.0 * (~rows).half()
    weights.layer(f"{at}post_quant_conv", 4, 4, 1, 1)


def text_encoder(weights: Weights, shape: Shape, at: str = "cond_stage_model.transformer.text_model.") -> None:
    wide = shape.context
    weights.tensors[f"{at}embeddings.position_ids"] = torch.arange(77)[None]
    weights.table(f"{at}embeddings.token_embedding", VOCABULARY, wide)
    weights.table(f"{at}embeddings.position_embedding", 77, wide)
    for number in range(shape.text_layers):
        layer = f"{at}encoder.layers.{number}"
        for part in ("layer_norm1", "layer_norm2"):
            weights.norm(f"{layer}.{part}", wide)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights.layer(f"{layer}.self_attn.{part}", wide, wide)
        weights.layer(f"{layer}.mlp.fc1", 4 * wide, wide)
        weights.layer(f"{layer}.mlp.fc2", wide, 4 * wide)
    weights.norm(f"{at}final_layer_norm", wide)
    # Else the mean is nought, by which the hosts divide for the prompt's emphasis.
    weights.tensors[f"{at}final_layer_norm.bias"] = torch.full((wide,), 0.1, dtype=torch.float16)


def write(path: Path, shape: Shape, seed: int = 0) -> Path:
    """The checkpoint: .safetensors, or the smaller .ckpt; and for AUTOMATIC1111 the .yaml that describes it."""
    weights = Weights(seed)
    unet(weights, shape)
    autoencoder(weights, shape)
    text_encoder(weights, shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".ckpt":  # the old format: AUTOMATIC1111's check of pickles knows no newer records
        torch.save({"state_dict": weights.tensors}, path, _use_new_zipfile_serialization=False)
    else:
        save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in weights.tensors.items()}, path)
    if shape == A1111:
        told = description(shape, tokenizer(path.with_suffix(".clip"), shape))
        path.with_suffix(".yaml").write_text(json.dumps(told))
    return path


def tokenizer(folder: Path, shape: Shape) -> Path:
    """A folder with the text encoder's description and a tokenizer that knows single letters."""
    folder.mkdir(exist_ok=True)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in (*plain, *range(256, 256 + 256 - len(plain)))]  # CLIP's names of the 256 bytes
    words = {text: number for number, text in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    begin, end = "<|startoftext|>", "<|endoftext|>"
    words |= {begin: VOCABULARY - 2, end: VOCABULARY - 1}
    files: dict[str, Any] = {
        "vocab.json": words,
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "bos_token": begin, "eos_token": end, "unk_token": end,
            "pad_token": end, "model_max_length": 77, "do_lower_case": True,
        },
        "config.json": {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": shape.context,
            "intermediate_size": 4 * shape.context, "num_attention_heads": 1, "num_hidden_layers": shape.text_layers,
            "max_position_embeddings": 77, "vocab_size": VOCABULARY, "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5, "projection_dim": shape.context, "bos_token_id": 0, "eos_token_id": 2,
            "pad_token_id": 1,
        },
    }  # fmt: skip
    for name, told in files.items():
        (folder / name).write_text(json.dumps(told))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def description(shape: Shape, text: Path) -> dict[str, Any]:
    """What AUTOMATIC1111 builds the networks by (JSON is YAML)."""

    def part(target: str, **params: Any) -> dict[str, Any]:
        return {"target": target, "params": params}

    network = part(
        "ldm.modules.diffusionmodules.openaimodel.UNetModel", image_size=32, in_channels=4, out_channels=4,
        model_channels=shape.channels, attention_resolutions=[1], num_res_blocks=1, channel_mult=[1, 1], num_heads=8,
        use_spatial_transformer=True, transformer_depth=1, context_dim=shape.context, use_checkpoint=False,
        legacy=False,
    )  # fmt: skip
    sizes = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": shape.vae[0],
        "ch_mult": [width // shape.vae[0] for width in shape.vae], "num_res_blocks": shape.vae_blocks,
        "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    return {
        "model": part(
            "ldm.models.diffusion.ddpm.LatentDiffusion", linear_start=0.00085, linear_end=0.012, num_timesteps_cond=1,
            timesteps=1000, first_stage_key="jpg", cond_stage_key="txt", image_size=64, channels=4,
            cond_stage_trainable=False, conditioning_key="crossattn", scale_factor=0.18215, use_ema=False,
            unet_config=network,
            first_stage_config=part(
                "ldm.models.autoencoder.AutoencoderKL", embed_dim=4, monitor="val/rec_loss", ddconfig=sizes,
                lossconfig=part("torch.nn.Identity"),
            ),
            cond_stage_config=part("ldm.modules.encoders.modules.FrozenCLIPEmbedder", version=str(text)),
        )
    }  # fmt: skip
