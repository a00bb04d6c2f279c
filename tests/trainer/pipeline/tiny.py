"""A tiny pipeline of each real class, with random weights and tokenizers of letters, made without a network."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
WIDTH = 16  # of every text
CHAT = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% endfor %}"
PLAIN = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 32}
FLOW = {"num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAILING = {"timestep_spacing": "trailing"}
HEADS: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2}
FLUX: dict[str, Any] = HEADS | {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "axes_dims_rope": (2, 2, 4)}
FLUX |= {"joint_attention_dim": 2 * WIDTH}
FLUX_VAE = {"shift_factor": 0.1159, "scaling_factor": 0.3611}


@cache
def clip_tokenizer():
    from transformers import CLIPTokenizer

    entries = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(a + "</w>" for a in LETTERS)]
    with tempfile.TemporaryDirectory() as folder:
        words, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        words.write_text(json.dumps({w: i for i, w in enumerate(entries)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(words), str(merges), model_max_length=16)


@cache
def letter_tokenizer():
    """One token a letter."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<pad>", "<unk>", *LETTERS, " ", ":", "<", ">", "|", "\n"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(entries)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", chat_template=CHAT, padding_side="right"
    )


def clip(projects: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **PLAIN, vocab_size=54, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, projection_dim=WIDTH
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def t5(width: int = 2 * WIDTH):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def gemma():
    from transformers import Gemma2Config, Gemma2Model

    sizes = {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 4096}
    return Gemma2Model(Gemma2Config(**PLAIN, **sizes, vocab_size=40))


def qwen3():
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**PLAIN, num_key_value_heads=1, head_dim=8, vocab_size=40))


def qwen_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = PLAIN | {"vocab_size": 40, "num_key_value_heads": 1, "pad_token_id": 0}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def vae(channels: int = 4, levels: int = 2, **more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        latent_channels=channels,
        **more,
    )


def unet(text: int, **more):
    from diffusers import UNet2DConditionModel

    sizes: Any = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(cross_attention_dim=text, **(sizes | more))


def stable_diffusion(prediction: str = "epsilon", **more):
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    scheduler = EulerDiscreteScheduler(**BETAS, **TRAILING, prediction_type=prediction, **more)
    parts = (vae(), clip(), clip_tokenizer(), unet(WIDTH), scheduler)
    return StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


def stable_diffusion_xl(zeros: bool = True):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    added: Any = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    added["down_block_types"] = ("DownBlock2D", "CrossAttnDownBlock2D")  # what is upsampled attends, as in the real one
    added["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    network = unet(2 * WIDTH, **added, projection_class_embeddings_input_dim=6 * 8 + WIDTH)
    return StableDiffusionXLPipeline(
        vae(scaling_factor=0.13025, force_upcast=True),
        clip(),
        clip(projects=True),
        clip_tokenizer(),
        clip_tokenizer(),
        network,
        EulerDiscreteScheduler(**BETAS, **TRAILING),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def stable_diffusion_3(layers: int = 2, **more):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    network = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        **HEADS,
        caption_projection_dim=16,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        **more,
    )
    autoencoder = vae(shift_factor=0.06, scaling_factor=1.53)
    clips = (clip(projects=True), clip_tokenizer(), clip(projects=True), clip_tokenizer())
    scheduler = FlowMatchEulerDiscreteScheduler(**FLOW)
    return StableDiffusion3Pipeline(network, scheduler, autoencoder, *clips, t5(), letter_tokenizer())


def flux(guidance: bool = True):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    network = FluxTransformer2DModel(**FLUX, pooled_projection_dim=WIDTH, guidance_embeds=guidance)
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return FluxPipeline(scheduler, vae(**FLUX_VAE), clip(), clip_tokenizer(), t5(), letter_tokenizer(), network)


def chroma():
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    network = ChromaTransformer2DModel(
        **FLUX, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
    )
    return ChromaPipeline(FlowMatchEulerDiscreteScheduler(**FLOW), vae(**FLUX_VAE), t5(), letter_tokenizer(), network)


def lumina2():
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    network = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(2, 2, 4),
        axes_lens=(400, 32, 32),
        cap_feat_dim=WIDTH,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(**FLOW)
    return Lumina2Pipeline(network, scheduler, vae(levels=4, shift_factor=0.1159), gemma(), letter_tokenizer())


def z_image():
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[2, 2, 4],
        axes_lens=[600, 32, 32],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(**FLOW)
    return ZImagePipeline(scheduler, vae(shift_factor=0.1159), qwen3(), letter_tokenizer(), network)


def qwen_image():
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    network = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        **HEADS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[2.0, 1.5, 1.0, 0.5],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC, shift_terminal=0.02)
    return QwenImagePipeline(scheduler, autoencoder, qwen_vl(), letter_tokenizer(), network)


def sana():
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    network = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        **HEADS,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=16,
    )
    blocks = {"block_out_channels": (8,) * 6, "layers_per_block": (1,) * 6, "block_types": ("ResBlock",) * 6}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()}
    sides["encoder_qkv_multiscales"] = sides["decoder_qkv_multiscales"] = ((),) * 6
    autoencoder = AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.4, **sides)
    return SanaPipeline(letter_tokenizer(), gemma(), autoencoder, network, FlowMatchEulerDiscreteScheduler(**FLOW))


MAKERS: dict[str, Any] = {
    "sd": stable_diffusion,
    "sd-v": lambda: stable_diffusion("v_prediction", rescale_betas_zero_snr=True),
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux-dev": flux,
    "flux-schnell": lambda: flux(guidance=False),
    "chroma": chroma,
    "lumina2": lumina2,
    "z-image": z_image,
    "qwen-image": qwen_image,
    "sana": sana,
}


def make(name: str, **more) -> Any:
    """A fresh pipeline of one kind, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        try:
            pipe = MAKERS[name](**more)
        except ImportError as error:
            pytest.skip(f"needs a newer diffusers or transformers: {error}")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
