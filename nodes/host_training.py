"""A loaded MODEL, CLIP and VAE as the trainer's host, on ComfyUI's own copy of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import comfy.model_management
import torch
from torch import Tensor, nn

from ..core.card import fingerprint
from ..core.denoiser import Cond
from .host import KEY, base_weights
from .host_denoiser import ModelDenoiser, conditions


@contextmanager
def trainable(model) -> Iterator[None]:
    """Within, gradients flow through the MODEL's network: it is loaded whole, and its weights are frozen.

    ComfyUI loads in inference mode, and backward refuses what was made there. Such weights are
    replaced one by one by ordinary tensors of the same bits, which stay; every flag is restored.
    """
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.load_models_gpu([model], memory_required=1e20, force_full_load=True)
        modules = list(model.model.modules())
        flags = [
            (module, name, p.requires_grad)
            for module in modules
            for name, p in module._parameters.items()
            if p is not None
        ]
        try:
            for module in modules:
                _thaw(module)
            yield
        finally:
            for module, name, flag in flags:
                if (parameter := module._parameters.get(name)) is not None:
                    parameter.requires_grad_(flag)


def _thaw(module: nn.Module) -> None:
    """A module's own parameters and buffers as ordinary tensors, without gradients."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_inference():
            module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        elif parameter is not None:
            parameter.requires_grad_(False)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_inference():
            module._buffers[name] = buffer.clone()


class CheckpointHost:
    """`trainer.host.Host` over what a checkpoint loader gives; `width` and `height` are the pictures' pixels.

    Raises ValueError for a MODEL that is a student already, or sizes that the VAE cannot make.
    """

    def __init__(self, model, clip, vae, name: str, width: int, height: int):
        if KEY in model.attachments:
            raise ValueError(
                f"this MODEL is sampled as {model.attachments[KEY].name} already: connect the model as it was loaded"
            )
        self.model, self.clip, self.vae, self.name = model, clip, vae, name
        self.denoiser = ModelDenoiser(model)
        self.architecture = type(model.model).__name__
        self.base_hash = fingerprint(base_weights(model))
        self.resolution = (width, height)
        factor = vae.spacial_compression_encode()
        if width % factor or height % factor:
            raise ValueError(f"{width} x {height} pixels: give multiples of {factor}, which the VAE works in")
        channels = model.get_model_object("latent_format").latent_channels
        self.latent_shape = (channels, height // factor, width // factor)

    def encode_text(self, prompts: Sequence[str]) -> Cond:
        """Prompts -> a batch of conditions, on the CPU; texts of different lengths are repeated to the same."""
        empty = torch.zeros(1, *self.latent_shape)
        found = []
        for prompt in prompts:
            with torch.inference_mode():  # as ComfyUI runs its own networks
                conditioning = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
                cond = conditions(self.model, conditioning, empty)
            found.append(cond.map(lambda v: v.cpu().clone()))
        return Cond.cat(found)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) as the network takes them -> pictures (B, 3, height, width) in [0, 1]."""
        with torch.inference_mode():
            pictures = self.vae.decode(self.denoiser.latent_out(latents.float()))
        return pictures.clone().movedim(-1, 1)[:, :3].float()

    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, height, width) in [0, 1] -> latents (B, C, H, W) as the network takes them."""
        with torch.inference_mode():
            latents = self.vae.encode(images.movedim(1, -1))
        return self.denoiser.latent_in(latents.clone().float())
