"""A WebUI's loaded checkpoint as the trainer's host: text and pictures go the way of its own generations."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from modules import devices, extra_networks, processing, prompt_parser, sd_models, shared
from torch import Tensor, nn

from ..core.architecture import architecture_of
from ..core.borrowed import watched
from ..core.card import fingerprint
from ..core.decoder import Decoder
from ..core.denoiser import Cond, Denoiser, with_lengths
from ..core.vision import Eye
from .host import clip_skip
from .host_decoder import FACTOR, tiny_decoder
from .host_denoiser import architecture

TEXT_SETTINGS = ("CLIP_stop_at_last_layers", "sdxl_clip_l_skip", "emphasis", "use_old_emphasis_implementation")
BESIDE = (
    "{} takes a picture or a mask beside the latent, as those for inpainting and editing do, and its student would "
    "never see one: load the ordinary model"
)


class Switched(ValueError):
    """The checkpoint that is trained was taken away by something that did not ask for the lock."""


def loaded() -> Any:
    """The chosen checkpoint's model, loaded now if it was not; raises ValueError where there is none."""
    none = "there is no checkpoint: put one into models/Stable-diffusion, and choose it"
    if hasattr(sd_models, "forge_model_reload"):
        if not sd_models.model_data.forge_loading_parameters.get("checkpoint_info"):
            raise ValueError(none)
        return sd_models.forge_model_reload()[0]
    try:
        sd_models.select_checkpoint()
    except FileNotFoundError:
        raise ValueError(none) from None
    model = shared.sd_model and sd_models.reload_model_weights()
    if model is None:
        raise ValueError("the chosen checkpoint could not be loaded: see the console, or choose another")
    return model


class WebUIHost:
    """`trainer.host.Host` over a loaded model; `width` and `height` are the pictures' pixels.

    `encode` is the host's way of pictures in [-1, 1] to latents. `others` is a context in which its
    text encoder and autoencoder compute, after which the network is back where it computes. `decoder` makes pictures
    with gradients. `joint`
    says that text and picture are one sequence to the network. Raises ValueError for sizes that it cannot make.
    """

    text_hash: str
    own = False
    eye: Eye | None = None
    beside = (0, 0)  # bytes: what is not trained is away meanwhile

    def __init__(
        self,
        model: Any,
        denoiser: Denoiser,
        encode: Callable[[Tensor], Tensor],
        others: Callable[[], AbstractContextManager[None]],
        size: tuple[int, int],
        channels: int,
        text_encoder: nn.Module,
        decoder: Decoder,
        joint: bool = False,
    ):
        self._resize(channels, *size)
        self.model, self.denoiser, self.decoder, self.joint = model, denoiser, decoder, joint
        self._encode, self._others = encode, others
        self.name = Path(model.sd_checkpoint_info.filename).name
        shapes = {name: parameter.shape for name, parameter in denoiser.backbone.named_parameters()}
        self.architecture = architecture_of(shapes) or architecture(model)
        self.base_hash = fingerprint(denoiser.backbone)
        self.clip_skip, self.sampling = clip_skip(model, self.architecture), None
        settings = {name: getattr(shared.opts, name, None) for name in TEXT_SETTINGS}
        self.text_hash = fingerprint(text_encoder) + hashlib.sha256(str(settings).encode()).hexdigest()[:8]

    @property
    def tiny_decoder(self) -> Decoder:
        return tiny_decoder(self.denoiser.device)

    def _resize(self, channels: int, width: int, height: int) -> None:
        if width % FACTOR or height % FACTOR:
            raise ValueError(f"{width} x {height} pixels: give multiples of {FACTOR}, which the VAE works in")
        self.resolution = (width, height)
        self.latent_shape = (channels, height // FACTOR, width // FACTOR)

    def aside(self, decodes: bool = False) -> AbstractContextManager[None]:
        """Nothing: the host takes text encoder and VAE off the GPU by itself."""
        return nullcontext()

    def sized(self, width: int, height: int) -> WebUIHost:
        """The same model at another size of pictures; raises ValueError for one that it cannot make."""
        other = copy.copy(self)
        other._resize(self.latent_shape[0], width, height)
        return other

    def encode_text(self, prompts: Sequence[str]) -> Cond:
        """Prompts -> a batch of conditions, on the CPU, as the host makes them; the empty one as its negative prompt.

        Texts of different lengths are repeated to the same; where that would change pictures, they go through the
        network as long as they are. Raises ValueError for a prompt that names LoRAs, or joins several with AND.
        """
        with self._others():
            found = [self._condition(prompt) for prompt in ["", *prompts]]
        usual = found.pop(0)
        for prompt, cond in zip(prompts, found, strict=True):
            if not cond.context.isfinite().all():
                raise ValueError(f"the text encoder makes no numbers of prompt {prompt[:80]!r}: leave it out")
        if self.joint:
            found = with_lengths(found, usual)
        return Cond.cat([cond.map(torch.clone) for cond in found])

    def _condition(self, prompt: str) -> Cond:
        """One prompt by the host's own parser, as it is at a first step."""
        named = extra_networks.parse_prompt(prompt)[1]
        if named:
            raise ValueError(
                f"prompt {prompt[:80]!r} names {', '.join(named)}: a student is made of the checkpoint alone, leave "
                "the <...> out"
            )
        width, height = self.resolution
        asked = prompt_parser.SdConditioning([prompt], is_negative_prompt=not prompt, width=width, height=height)
        (parts,) = prompt_parser.get_multicond_learned_conditioning(self.model, asked, 1).batch
        if len(parts) > 1:
            raise ValueError(f"prompt {prompt[:80]!r} joins {len(parts)} prompts with AND: give one")
        return conditions(parts[0].schedules[-1].cond)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) as the network takes them -> pictures (B, 3, height, width) in [0, 1]."""
        with self._others():
            pictures = processing.decode_latent_batch(
                self.model, latents.to(devices.device), target_device=torch.device("cpu"), check_for_nans=True
            )
        return (torch.stack([p.clone() for p in pictures]).float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, height, width) in [0, 1] -> latents (B, C, H, W) as the network takes them."""
        with self._others():
            latents = self._encode(images * 2 - 1)
        return latents.clone().float()


def conditions(found: Tensor | dict[str, Tensor]) -> Cond:
    """What the host's text encoders make of one prompt -> a batch of one, float32, on the CPU."""
    tensors = found if isinstance(found, dict) else {"crossattn": found}
    rows = {name: value[None].detach().float().cpu() for name, value in tensors.items()}
    return Cond(rows.pop("crossattn"), rows.pop("vector", None), rows)


@contextmanager
def held(model: Any, network: nn.Module) -> Iterator[None]:
    """Within, Switched is raised as soon as this is not the model that the host has loaded, or it was sent away."""
    file = model.sd_checkpoint_info.filename
    device = next(network.parameters()).device.type

    def check() -> None:
        if sd_models.model_data.sd_model is not model or model.sd_checkpoint_info.filename != file:
            raise Switched(
                f"another checkpoint was loaded in place of {Path(file).name} while it was trained; what is done is "
                "saved: load it again and resume"
            )
        if not any(p.device.type == device for p in network.parameters()):
            raise Switched(f"{Path(file).name} was unloaded while it was trained; what is done is saved: resume")

    with watched(network, check):
        try:
            yield
        except Exception:
            check()  # an error in the middle of a pass may come of it
            raise


@contextmanager
def emptied(networks: list | None) -> Iterator[None]:
    """The host's list is empty within."""
    before = list(networks or ())
    try:
        if networks is not None:
            networks.clear()
        yield
    finally:
        if networks is not None:
            networks[:] = before
