"""comfy.supported_models_base, sd and sd1_clip: what a model is built from, and saved by."""

from __future__ import annotations

import re

import torch
from safetensors.torch import save_file

from .models import CPU, BaseModel, LatentFormat, ModelSamplingDiscrete, model_sampling

UNetModel = AutoencoderKL = None  # set by the tests that build a model from its configuration


class BASE:
    unet_extra_config: dict = {"num_heads": -1, "num_head_channels": 64}  # noqa: RUF012 - as it is there
    latent_format = LatentFormat

    def __init__(self, unet_config):
        self.unet_config = unet_config | self.unet_extra_config
        self.latent_format = self.latent_format()

    def set_inference_dtype(self, dtype, manual_cast_dtype):
        self.unet_config["dtype"] = dtype

    def get_model(self, state_dict, prefix="", device=None):
        reading = self.model_type(state_dict, prefix).value
        made = BaseModel(
            UNetModel(**self.unet_config), model_sampling(reading, ModelSamplingDiscrete), self.latent_format
        )
        made.model_config = self
        return made


class ClipTarget:
    def __init__(self, tokenizer, clip):
        self.tokenizer, self.clip, self.params = tokenizer, clip, {}


class CLIP:
    def __init__(self, target):
        self.cond_stage_model = target.clip(**target.params, device=CPU, dtype=torch.float16, model_options={})
        self.tokenizer = target.tokenizer(embedding_directory=None, tokenizer_data={})
        assert self.cond_stage_model.dtypes

    def tokenize(self, text, return_word_ids=False, **options):
        return self.tokenizer.tokenize_with_weights(text, return_word_ids, **options)

    @torch.no_grad()
    def encode_from_tokens(self, tokens):
        self.cond_stage_model.reset_clip_options()
        self.cond_stage_model.set_clip_options({"layer": None})
        cond, _pooled = self.cond_stage_model.encode_token_weights(tokens)[:2]
        return cond


class VAE:
    def __init__(self, sd, config):
        self.first_stage_model = AutoencoderKL(**config["params"])
        self.first_stage_model.load_state_dict(sd)
        self.downscale_ratio = self.upscale_ratio = 8


def token_weights(string, current_weight):
    """Bracketed parts apart from the rest; one level of brackets and `:weight` are enough here."""
    parts = re.findall(r"\(([^()]*?)(?::([\d.]+))?\)|([^()]+)", string)
    return [(plain, current_weight) if plain else (text, float(w or 1.1)) for text, w, plain in parts]


def escape_important(text):
    return text.replace(r"\)", "\0\1").replace(r"\(", "\0\2")


def unescape_important(text):
    return text.replace("\0\1", ")").replace("\0\2", "(")


def save_checkpoint(output_path, model, clip=None, vae=None, clip_vision=None, metadata=None, extra_keys=None):
    """The MODEL's weights with its patches merged in, and the others', as one single file."""
    with model.loaded() as network:
        parts = [("model.", network.state_dict())]
        parts += [("cond_stage_model.", clip.get_sd())] if clip else []
        parts += [("first_stage_model.", vae.get_sd())] if vae else []
        save_file({p + k: v.clone() for p, sd in parts for k, v in sd.items()}, output_path, metadata)
