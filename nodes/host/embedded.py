"""The embedded model on ComfyUI's own UNet, autoencoder and text-encoder classes."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...demo.files import HEADER, MODEL, STUDENT  # noqa: F401 - the student for the nodes
from ...demo.text_encoder import TextEncoder


class Ratio(float):
    """A channel multiplier whose product with the base width is whole: 2.5 times 64 is the integer 160."""

    def __mul__(self, other):
        return round(float(self) * other)

    __rmul__ = __mul__


class DemoLatent(comfy.latent_formats.LatentFormat):
    """The embedded model's latents: their scale, pixels for each, and a rough preview in colours."""

    latent_channels = 4

    def __init__(self, scale_factor: float = 1.0, ratio: int = 8, rgb: list | None = None):
        self.scale_factor = scale_factor
        self.spacial_downscale_ratio = ratio
        self.latent_rgb_factors = rgb


class DemoConfig(comfy.supported_models_base.BASE):
    """Stable Diffusion 2's architecture in miniature, v-prediction."""

    title = "TurboDistill demo: emoji in three styles"
    architecture = "turbodistill-demo"
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = DemoLatent

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION


def unet_config(unet: dict[str, Any]) -> dict[str, Any]:
    """The description that diffusers has of a UNet -> what ComfyUI's UNetModel is built from."""
    widths, blocks = unet["block_out_channels"], unet["layers_per_block"]
    depth = [int(kind.startswith("CrossAttn")) for kind in unet["down_block_types"]]
    return {
        "image_size": unet["sample_size"],
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": widths[0],
        "channel_mult": tuple(Ratio(w / widths[0]) for w in widths),
        "num_res_blocks": [blocks] * len(widths),
        "num_heads": -1,
        "num_head_channels": widths[0] // unet["attention_head_dim"][0],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": unet["use_linear_projection"],
        "transformer_depth": [d for d in depth for _ in range(blocks)],
        "transformer_depth_output": [d for d in depth for _ in range(blocks + 1)],
        "transformer_depth_middle": 1,
        "context_dim": unet["cross_attention_dim"],
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }


def vae_config(vae: dict[str, Any]) -> dict[str, Any]:
    """The description that diffusers has of an autoencoder -> ComfyUI's."""
    widths = vae["block_out_channels"]
    return {
        "params": {
            "embed_dim": vae["latent_channels"],
            "ddconfig": {
                "double_z": True,
                "z_channels": vae["latent_channels"],
                "resolution": vae["sample_size"],
                "in_channels": vae["in_channels"],
                "out_ch": vae["out_channels"],
                "ch": widths[0],
                "ch_mult": [w // widths[0] for w in widths],
                "num_res_blocks": vae["layers_per_block"],
                "attn_resolutions": [],
                "dropout": 0.0,
            },
        }
    }


class Tokenizer:
    """As ComfyUI's CLIP calls it; the text goes on whole, its weights in brackets are left out."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_) -> dict[str, str]:
        parts = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
        return {"text": comfy.sd1_clip.unescape_important("".join(part for part, _ in parts))}

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def encoder_class(tokenizer: str):
    """The text encoder as ComfyUI's CLIP builds and calls it."""

    class Encoder(TextEncoder):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(tokenizer)
            self.to(device, torch.float32)
            self.dtypes = {torch.float32}

        def set_clip_options(self, options):
            pass

        def reset_clip_options(self):
            pass

        def encode_token_weights(self, tokens):
            states = self.encode([tokens["text"]])
            return states.to(comfy.model_management.intermediate_device()), None

    return Encoder


def description() -> dict[str, Any]:
    """What the embedded model's header says of its networks."""
    with safe_open(MODEL, "pt") as file:
        return json.loads(file.metadata()[HEADER])


def factor(about: dict[str, Any]) -> int:
    """Pixels for each of the latents, in either direction."""
    return 2 ** (len(about["vae"]["block_out_channels"]) - 1)


def load() -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the embedded model."""
    about, tensors = description(), load_file(MODEL)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    return (
        _model(about, part("model.diffusion_model.")),
        _clip(about, part("cond_stage_model.")),
        _vae(about, part("first_stage_model.")),
    )


def _model(about, weights):
    config = DemoConfig(unet_config(about["unet"]))
    latent_format: Any = DemoLatent(about["vae"]["scaling_factor"], factor(about), about.get("latent_rgb"))
    config.latent_format = latent_format
    device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(
        supported_dtypes=[torch.float16, torch.float32], weight_dtype=torch.float16
    )
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device))
    model = config.get_model({}, device=comfy.model_management.unet_offload_device())
    missing, unknown = model.diffusion_model.load_state_dict(weights, strict=False)
    if missing or unknown:
        raise RuntimeError(
            f"the embedded model does not fit ComfyUI's UNet: {missing[:3]} missing, {unknown[:3]} unknown"
        )
    return comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())


def _clip(about, weights):
    target = comfy.supported_models_base.ClipTarget(
        Tokenizer, encoder_class(json.dumps(about["text_encoder"]["tokenizer"]))
    )
    clip = comfy.sd.CLIP(target)
    clip.cond_stage_model.load_state_dict({k: v.float() for k, v in weights.items()})
    return clip


def _vae(about, weights):
    vae = comfy.sd.VAE(sd=weights, config=vae_config(about["vae"]))
    vae.downscale_ratio = vae.upscale_ratio = factor(about)
    return vae


def empty_latent(batch_size: int) -> dict[str, Any]:
    """ComfyUI's empty latent (batch_size, C, H, W) of the size that the model was made for."""
    about = description()
    (width, height), ratio = about["resolution"], factor(about)
    samples = torch.zeros(batch_size, about["vae"]["latent_channels"], height // ratio, width // ratio)
    return {"samples": samples, "downscale_ratio_spacial": ratio}
