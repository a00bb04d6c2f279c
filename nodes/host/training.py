"""A loaded MODEL, CLIP and VAE as the trainer's host, on ComfyUI's own copy of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...core.borrowed import leave_inference_mode, watched
from ...core.decoder import Decoder
from ...core.denoiser import Cond, Guidance, with_lengths
from ...core.vision import Eye
from ...trainer.config import Config
from .decoder import own_decoder, tiny_decoder
from .denoiser import ModelDenoiser, attends_jointly, conditions, differentiable
from .patcher import KEY, architecture, clip_hash, clip_skip, load, model_hash
from .patches import check_guidance, check_patches
from .sampler import SamplerSampling


@contextmanager
def trainable(model) -> Iterator[Any]:
    """Within, gradients flow through the network of the MODEL that is given: loaded whole, its weights frozen.

    That is the MODEL itself, or one of the same weights where they cannot stay on the device (`resident`).
    ComfyUI loads in inference mode, and backward refuses what was made there. Such weights are
    replaced one by one by ordinary tensors of the same bits, which stay; every flag is restored.
    Raises ValueError as `check_trainable` and `load_whole` do.
    """
    check_trainable(model)
    with torch.inference_mode(False), torch.enable_grad():
        model = resident(model)
        flags = [
            (module, name, p.requires_grad)
            for module in model.model.modules()
            for name, p in module._parameters.items()
            if p is not None
        ]
        try:
            with differentiable(model):
                load_whole(model)
                yield model
        finally:
            for module, name, flag in flags:
                if (parameter := module._parameters.get(name)) is not None:
                    parameter.requires_grad_(flag)


# Formats of quantised weights that ComfyUI multiplies by in one direction alone: there is no gradient.
ONE_WAY = ("convrot_w4a4", "asym_w4a8_int8")


def check_trainable(model) -> None:
    """Raise ValueError for a MODEL through whose weights no gradient can flow."""
    formats: set[Any] = {getattr(module, "quant_format", None) for module in model.model.modules()}
    if found := formats.intersection(ONE_WAY):
        raise ValueError(
            f"this MODEL's weights are quantised as {', '.join(sorted(found))}, through which ComfyUI has no gradient: "
            "load the model in another format (float8, nvfp4, mxfp8 and int8 can be trained on)"
        )
    if is_dynamic(model) and model.cached_patcher_init is None:
        raise ValueError(
            "this MODEL's weights are streamed to the GPU (ComfyUI's dynamic VRAM), and its loader cannot load them "
            "another time: use ComfyUI's own loader, or start ComfyUI with --disable-dynamic-vram"
        )


def is_dynamic(model) -> bool:
    """Whether ComfyUI streams the MODEL's weights to the device for every pass; older cores know no such thing."""
    return getattr(model, "is_dynamic", lambda: False)()


def resident(model):
    """The MODEL, or one of the same file and patches whose weights can stay on the device.

    Dynamic VRAM streams weights there for every pass: what autograd keeps of them would not last, and the MODEL that
    others sample with is left alone.
    """
    return model.clone(disable_dynamic=True) if is_dynamic(model) else model


def load_whole(model) -> None:
    """All of the MODEL to where it computes, everything else away from there, and no weight in inference mode.

    Raises ValueError if weights stay elsewhere: gradients would be wrong, as ComfyUI casts each into one buffer.
    """
    comfy.model_management.load_models_gpu([model], memory_required=1e20, force_full_load=True)
    leave_inference_mode(model.model)
    model.model.requires_grad_(False)
    away = [p for p in model.model.diffusion_model.parameters() if p.device.type != model.load_device.type]
    if away:
        raise ValueError(
            f"{len(away)} of the model's weights stay on the {away[0].device.type}, a training needs all of them on "
            f"the {model.load_device.type}: start ComfyUI without --novram"
        )


@contextmanager
def cancellable(model) -> Iterator[None]:
    """Within, every pass of the MODEL's network first looks whether the user has pressed Cancel."""
    with watched(model.model.diffusion_model, comfy.model_management.throw_exception_if_processing_interrupted):
        yield


class ComfyUIHost:
    """`trainer.host.Host` over what a checkpoint loader gives; `width` and `height` are the pictures' pixels.

    It trains on the MODEL `trained`, as `trainable` gives it, or only samples; either comes back when text encoder or
    VAE were used, which may have taken its place.
    Raises ValueError for a MODEL that is a student already, that cannot be trained on or that nodes have changed where
    no training sees it, a VAE of another kind, or sizes that it cannot make.
    """

    own = False
    eye: Eye | None = None
    beside = (0, 0)  # bytes: what is not trained is away meanwhile

    def __init__(self, model, clip, vae, name: str, width: int, height: int, trained=None):
        if KEY in model.attachments:
            raise ValueError(
                f"this MODEL is sampled as {model.attachments[KEY].name} already: connect the model as it was loaded"
            )
        check_patches(model)
        check_trainable(model)  # before pairs are made for nothing
        self.model, self.clip, self.vae, self.name = trained or model, clip, vae, name
        self._load = load_whole if trained else load
        self.denoiser = ModelDenoiser(self.model)
        self.architecture = architecture(model)
        self.base_hash = model_hash(model)
        self.text_hash, self.clip_skip = clip_hash(clip), clip_skip(clip.layer_idx, self.architecture)
        self.sampling: SamplerSampling | None = None
        channels = model.get_model_object("latent_format").latent_channels
        if vae.latent_channels != channels:
            raise ValueError(
                f"the VAE makes latents of {vae.latent_channels} channels, the model wants {channels}: connect the VAE "
                "that belongs to it"
            )
        self.decoder = own_decoder(self.denoiser, vae)
        self._resize(channels, width, height)

    @property
    def tiny_decoder(self) -> Decoder:
        return tiny_decoder(self.denoiser, self.decoder.factor)

    def _resize(self, channels: int, width: int, height: int) -> None:
        factor = self.vae.spacial_compression_encode()
        if width % factor or height % factor:
            raise ValueError(f"{width} x {height} pixels: give multiples of {factor}, which the VAE works in")
        self.resolution = (width, height)
        self.latent_shape = (channels, height // factor, width // factor)

    def aside(self, decodes: bool = False) -> AbstractContextManager[None]:
        """Nothing: the host takes text encoder and VAE off the GPU by itself."""
        return nullcontext()

    def sized(self, width: int, height: int) -> ComfyUIHost:
        """The same model at another size of pictures; raises ValueError for one that the VAE does not work in."""
        other = copy.copy(self)
        other._resize(self.latent_shape[0], width, height)
        return other

    def sampled_by(self, sampler, sigmas: Tensor | None, config: Config) -> ComfyUIHost:
        """The same model whose teacher samples with this SAMPLER and these SIGMAS, of which either may be None.

        Raises ValueError as SamplerSampling, and as `check_guidance`.
        """
        check_guidance(self.model, Guidance.of(config))
        other = copy.copy(self)
        if sampler is not None or sigmas is not None:
            given = (sampler, sigmas, config.pair_sampler, config.pair_steps)
            other.sampling = SamplerSampling(self.model, self.denoiser.schedule, *given)
        return other

    @contextmanager
    def _others(self) -> Iterator[None]:
        """Text encoder and VAE compute within, as ComfyUI runs its own networks; then the MODEL is back."""
        with torch.inference_mode():
            yield
        self._load(self.model)

    def encode_text(self, prompts: Sequence[str]) -> Cond:
        """Prompts -> a batch of conditions, on the CPU.

        Texts of different lengths are repeated to the same. Where that would change pictures, they are filled up, and
        go through the network without that.
        """
        with self._others():
            texts = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt)) for prompt in ("", *prompts)]
        # The MODEL is back: some prepare the text in their network.
        empty, found = torch.zeros(1, *self.latent_shape, device=self.denoiser.device), []
        joint = attends_jointly(self.model, texts[0], empty)
        while texts:  # each is let go of as soon as it is prepared
            found.append(conditions(self.model, texts.pop(0), empty).map(torch.Tensor.cpu))
        usual = found.pop(0)
        if joint:
            beside = self.denoiser.layout.texts if self.denoiser.layout else ()
            found = with_lengths(found, usual, ("context", *beside))
        return Cond.cat(found)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) as the network takes them -> pictures (B, 3, height, width) in [0, 1]."""
        latents = self.denoiser.latent_out(latents.float())
        with self._others():
            pictures = self.vae.decode(latents.unsqueeze(2))[:, 0] if self.denoiser.frame else self.vae.decode(latents)
        return pictures.clone().movedim(-1, 1)[:, :3].float()

    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, height, width) in [0, 1] -> latents (B, C, H, W) as the network takes them."""
        pictures = images.movedim(1, -1)
        with self._others():
            if self.denoiser.frame:  # of several it would make a video
                latents = torch.cat([self.vae.encode(picture[None]) for picture in pictures]).squeeze(2)
            else:
                latents = self.vae.encode(pictures)
        return self.denoiser.latent_in(latents.clone().float())
