"""The pipelines of diffusers that can be distilled: what is where in each, and how its noise levels run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...core.architecture import SD1, SDXL
from ...core.clip_skip import OWN
from ...core.schedule import DiscreteSchedule, FlowSchedule, Schedule, prediction_of_name
from . import denoisers, texts
from .host import ModelError, Size


@dataclass(frozen=True)
class PipelineKind:
    """One kind of pipeline.

    `network` is the name of its component and the class that it must be; `multiple` is how many latents wide a square
    is that the network takes as one; `packs` says that the pipeline's own latents are such squares; `side` gives the
    default width of its pictures, in latents or, where no setting gives it, in pixels over the factor. `clip_skip` is
    its own; 0 where the text is of no layer that could be chosen.
    """

    network: tuple[str, str]
    denoiser: type[denoisers.NetworkDenoiser]
    encode: texts.Encode
    multiple: int = 2
    packs: bool = False
    side: Callable[[Any], Any] = lambda pipe: 128
    clip_skip: int = 0

    @property
    def flows(self) -> bool:
        return issubclass(self.denoiser, denoisers.TransformerDenoiser)


def _sample_size(pipe: Any) -> Any:
    """What the network's own settings say."""
    return (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).config.sample_size


_UNET = ("unet", "UNet2DConditionModel")
KINDS = {
    "StableDiffusion": PipelineKind(
        _UNET, denoisers.UNetDenoiser, texts.stable_diffusion, 1, side=_sample_size, clip_skip=OWN[SD1]
    ),
    "StableDiffusionXL": PipelineKind(
        _UNET, denoisers.UNetDenoiser, texts.stable_diffusion_xl, 1, side=_sample_size, clip_skip=OWN[SDXL]
    ),
    "StableDiffusion3": PipelineKind(
        ("transformer", "SD3Transformer2DModel"),
        denoisers.SD3Denoiser,
        texts.stable_diffusion_3,
        side=lambda pipe: pipe.default_sample_size,
    ),
    "Flux": PipelineKind(("transformer", "FluxTransformer2DModel"), denoisers.FluxDenoiser, texts.flux, packs=True),
    "Chroma": PipelineKind(
        ("transformer", "ChromaTransformer2DModel"), denoisers.ChromaDenoiser, texts.chroma, packs=True
    ),
    "Lumina2": PipelineKind(
        ("transformer", "Lumina2Transformer2DModel"), denoisers.Lumina2Denoiser, texts.lumina2, side=_sample_size
    ),
    "ZImage": PipelineKind(("transformer", "ZImageTransformer2DModel"), denoisers.ZImageDenoiser, texts.z_image),
    "QwenImage": PipelineKind(
        ("transformer", "QwenImageTransformer2DModel"), denoisers.QwenImageDenoiser, texts.qwen_image, packs=True
    ),
    "Sana": PipelineKind(
        ("transformer", "SanaTransformer2DModel"), denoisers.SanaDenoiser, texts.sana, multiple=1, side=_sample_size
    ),
}
TASKS = ("Pipeline", "Img2ImgPipeline", "InpaintPipeline")  # of one model, which share all its parts


def kind_of(pipe: Any) -> PipelineKind:
    """The kind of a pipeline, or of the class that it is derived from; raises ModelError for any other."""
    known = {name + task: kind for name, kind in KINDS.items() for task in TASKS}
    for base in type(pipe).__mro__:
        if base.__name__ in known:
            return known[base.__name__]
    raise ModelError(
        f"a {type(pipe).__name__} cannot be distilled: give one of {', '.join(f'{name}Pipeline' for name in KINDS)}"
    )


def network_of(pipe: Any, kind: PipelineKind) -> Any:
    """The network of a pipeline, without what torch.compile has put around it."""
    network = getattr(pipe, kind.network[0], None)
    return getattr(network, "_orig_mod", network)


def channels_of(network: Any, kind: PipelineKind) -> int:
    """Channels of the latents that a network takes."""
    return network.config.in_channels // (4 if kind.packs else 1)


def default_size(pipe: Any, kind: PipelineKind) -> Size:
    """The size (width, height) of pictures that a pipeline makes when none is asked for."""
    side, factor = kind.side(pipe), pipe.vae_scale_factor
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    return width * factor, height * factor


def prediction_of(pipe: Any, kind: PipelineKind) -> str:
    """What a pipeline's network predicts, in a card's words; raises ModelError for what is not known here."""
    if kind.flows:
        return "flow"
    name = pipe.scheduler.config.get("prediction_type", "epsilon")
    prediction = prediction_of_name(name)
    if prediction not in ("eps", "v"):
        raise ModelError(f"its scheduler's prediction_type is {name!r:.100}: known are epsilon and v_prediction")
    return prediction


def schedule_of(pipe: Any, kind: PipelineKind, size: Size) -> Schedule:
    """A pipeline's noise levels at a size of pictures, by its scheduler; raises ModelError for one of another kind."""
    scheduler = pipe.scheduler
    name = type(scheduler).__name__
    if not kind.flows:
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ModelError(f"the scheduler {name} has no alphas_cumprod: give the pipeline its own scheduler again")
        table = scheduler.alphas_cumprod.clone()
        if scheduler.config.get("rescale_betas_zero_snr"):
            table[-1] = 0  # some of diffusers' schedulers put a small number there, each its own
        return DiscreteSchedule(table)
    config = scheduler.config
    if not (name.startswith("FlowMatch") or config.get("use_flow_sigmas")):
        raise ModelError(f"the scheduler {name} is none for a flow: give the pipeline its own scheduler again")
    return FlowSchedule(flow_shift(config, pixels_to_tokens(pipe, kind, size)), config.num_train_timesteps)


def pixels_to_tokens(pipe: Any, kind: PipelineKind, size: Size) -> int:
    """The number that a pipeline takes for that of the picture's tokens when it shifts its noise levels."""
    if kind.denoiser is denoisers.Lumina2Denoiser:
        return channels_of(network_of(pipe, kind), kind)  # diffusers counts channels there
    width, height = (side // (pipe.vae_scale_factor * kind.multiple) for side in size)
    return width * height


def flow_shift(config: Any, tokens: int) -> float:
    """The shift of a flow's noise levels, which depends on the size of the picture in FLUX.1 and its like.

    mu is linear in the number of tokens (arXiv 2403.03206, section 5.3.2, as in FLUX.1's own code), the shift its
    exponential.
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or config.get("flow_shift") or 1.0)
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (tokens - few) * (high - low) / (many - few)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
