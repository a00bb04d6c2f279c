"""A checkpoint through diffusers' classes, for the command line: the embedded model, or a diffusers folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.architecture import architecture_of
from ..core.card import fingerprint
from ..core.denoiser import Cond, Denoiser
from ..core.lora import check_match
from ..core.schedule import DiscreteSchedule, expand, scaled_linear
from ..demo.files import HEADER, MODEL
from ..demo.text_encoder import TextEncoder
from .host import decoded_at_once
from .run.memory import is_out_of_memory


class ModelError(ValueError):
    """A checkpoint that cannot be loaded: the message says why and what to do."""


class DiffusersDenoiser(Denoiser):
    """A diffusers UNet that predicts eps or v on a discrete schedule, as a Denoiser."""

    def __init__(self, unet, schedule: DiscreteSchedule, prediction: str):
        self.backbone, self.schedule, self.prediction = unet, schedule, prediction
        self.dtype: torch.dtype = unet.dtype

    def output(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        alpha, _ = self.schedule.alpha_sigma(sigma)
        t = self.schedule.timestep(sigma)
        added = cond.extra | ({"text_embeds": cond.pooled} if cond.pooled is not None else {})
        return self.backbone(
            (expand(alpha, x) * x).to(self.dtype), t, cond.context.to(self.dtype), added_cond_kwargs=added or None
        ).sample

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self.schedule.to_x0(self.prediction, x, self.output(x, sigma, cond).to(x.dtype), sigma)


class DiffusersHost:
    """A loaded UNet, autoencoder and text encoder, as `trainer.host.Host` asks for them."""

    def __init__(
        self, unet, vae, encode_text, schedule, prediction: str, name: str, architecture: str, size: tuple[int, int]
    ):
        self.denoiser: Denoiser = DiffusersDenoiser(unet, schedule, prediction)
        self.vae = vae.requires_grad_(False)
        # Its attention leaves the channels last: a CPU's group norm is slow backwards then, above all in bfloat16.
        vae.decoder.mid_block.register_forward_hook(lambda _module, _args, maps: maps.contiguous())
        self._encode_text = encode_text
        self.name, self.architecture, self.resolution = name, architecture, size
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (vae.config.latent_channels, size[1] // factor, size[0] // factor)
        self.base_hash, self.text_hash = fingerprint(unet), ""

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Cond:
        return self._encode_text(prompts)

    def decoder(self, latents: Tensor) -> Tensor:
        z = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        images = [self.vae.decode(chunk).sample for chunk in z.split(decoded_at_once(self.resolution))]
        return torch.cat(images).float() / 2 + 0.5

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        x = images.to(self.vae.device, self.vae.dtype) * 2 - 1
        return self.vae.encode(x).latent_dist.mean * self.vae.config.scaling_factor


def load_model(path: str | Path | None = None, device: str | None = None) -> DiffusersHost:
    """The embedded model, another single file with its architecture in the header, or a diffusers folder.

    Raises ModelError for anything else, and for a device that is not there, with the reason.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"device {device!r} cannot be used ({reason}): leave it out, or install a torch for it"
        ) from None
    path = MODEL if path is None else Path(path)
    if not os.path.exists(path):  # unlike Path's, false for what no file can be called
        raise ModelError(f"model {path!s:.300} does not exist: check the name")
    try:
        return _load_folder(path, device) if path.is_dir() else _load_single_file(path, device)
    except ModelError:
        raise
    except Exception as error:  # there is no end to what the libraries below raise for odd files
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{path} cannot be loaded as a model ({type(error).__name__}: {error!s:.300}): get it again"
        ) from None


def _load_single_file(path: Path, device: str) -> DiffusersHost:
    with _opened(path) as file:
        about = file.metadata() or {}
    if HEADER not in about:
        raise ModelError(
            f"{path} does not say its architecture in its header. Convert it to a diffusers folder first, "
            "or load it in ComfyUI or the WebUI and distil it there"
        )
    try:
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
        from diffusers.models.attention_processor import AttnProcessor
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    except ImportError as error:
        raise ModelError(f"loading a model here needs {error.name}: pip install 'turbodistill[demo]'") from None
    try:
        model = json.loads(about[HEADER])
        table = scaled_linear(model["schedule"]["steps"], model["schedule"]["start"], model["schedule"]["end"])
        prediction, size = model["prediction"], tuple(model["resolution"])
        unet: Any = UNet2DConditionModel(**model["unet"])
        scale = model["vae"].pop("scaling_factor")
        vae: Any = AutoencoderKL(**model["vae"], scaling_factor=scale)
        encoder = TextEncoder(json.dumps(model["text_encoder"]["tokenizer"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: the architecture in its header cannot be read ({error!r:.300}): get the file again"
        ) from None
    with _opened(path) as file:
        tensors = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118 - no dict
    prefix = "cond_stage_model."
    parts = (
        ("denoiser", unet, lambda: convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config))),
        ("autoencoder", vae, lambda: convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config))),
        (
            "text encoder",
            encoder,
            lambda: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)},
        ),
    )
    for what, module, convert in parts:
        try:
            weights = convert()
            check_match(what, weights, module.state_dict())
            module.load_state_dict(weights)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{path}: the {what} does not fit the architecture in the header: {error!s:.500}"
            ) from None
        module.to(device).eval().requires_grad_(False)
    unet.set_attn_processor(AttnProcessor())  # few tokens: the plain product is the faster one on a CPU
    architecture = about.get("modelspec.architecture", "unknown")
    name = about.get("modelspec.title", path.stem)
    return DiffusersHost(
        unet,
        vae,
        lambda texts: Cond(encoder.encode(texts)),
        DiscreteSchedule(table),
        prediction,
        name,
        architecture,
        size,
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, of which nothing but the header has been read; raises ModelError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is no complete safetensors file ({error}). If the download broke off, get it again; "
            "pickle files (.ckpt, .pt) are not loaded, since they can run code"
        ) from None


def _check_index(path: Path) -> None:
    """Raise ModelError for a folder of another kind of pipeline, before any of its weights is read."""
    try:
        index = dict(json.loads((path / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return  # diffusers says what is wrong with it
    if "unet" not in index or "text_encoder_2" in index:
        raise ModelError(
            f"{path} is a folder of {index.get('_class_name')!s:.60}, the command line loads Stable Diffusion 1.x and "
            "2.x: distil it in ComfyUI or the WebUI"
        )


def _load_folder(path: Path, device: str) -> DiffusersHost:
    """A Stable Diffusion 1.x or 2.x pipeline folder."""
    _check_index(path)
    try:
        import diffusers
        import transformers

        library: Any = diffusers
        kinds: dict[str, Any] = {
            "unet": library.UNet2DConditionModel,
            "vae": library.AutoencoderKL,
            "text_encoder": transformers.CLIPTextModel,
        }
        parts = {}
        for name, kind in kinds.items():
            # What a file lacks would else be random.
            parts[name], info = kind.from_pretrained(
                path, subfolder=name, local_files_only=True, output_loading_info=True
            )
            if missing := sorted(info["missing_keys"]):
                raise ValueError(f"{len(missing)} weights of {name} are missing, such as {missing[0]}")
        pipe = library.StableDiffusionPipeline.from_pretrained(
            path, local_files_only=True, safety_checker=None, **parts
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{path} is no Stable Diffusion folder that diffusers can load: {error!s:.500}") from None
    pipe.to(device)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.float().eval().requires_grad_(False)  # files in float16 come as that

    def encode_text(prompts: list[str]) -> Cond:
        tokens = pipe.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=pipe.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return Cond(pipe.text_encoder(tokens.input_ids.to(device))[0])

    kind = {"epsilon": "eps", "v_prediction": "v"}.get(pipe.scheduler.config.prediction_type)
    if kind is None:
        raise ModelError(
            f"{path} predicts {pipe.scheduler.config.prediction_type!r:.100}: known are epsilon and v_prediction"
        )
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    side = pipe.unet.config.sample_size * factor
    return DiffusersHost(
        pipe.unet,
        pipe.vae,
        encode_text,
        DiscreteSchedule(pipe.scheduler.alphas_cumprod),
        kind,
        path.name,
        architecture_of({name: parameter.shape for name, parameter in pipe.unet.named_parameters()}) or "unknown",
        (side, side),
    )
