"""A pipeline's networks as core's Denoiser: one small adapter for each architecture.

Each calls the network as its diffusers pipeline does, so that a student is sampled as it was trained. Latents are
(B, C, H, W) throughout; a transformer's packing stays inside.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.denoiser import Cond, Denoiser
from ...core.schedule import DiscreteSchedule, Schedule, expand

GUIDANCE = 3.5  # the scale that a guidance-distilled transformer (FLUX.1 dev) takes: its pipeline's default


class NetworkDenoiser(Denoiser):
    """A network that diffusers' pipelines call, at its weights' own precision."""

    backbone: Any  # of diffusers' own class: nn.Module has no `config`

    def __init__(self, network: Any, schedule: Schedule, prediction: str = "flow"):
        self.backbone, self.schedule, self.prediction = network, schedule, prediction
        self.execution_device: torch.device | None = None  # where it computes, if its weights may lie elsewhere

    @property
    def device(self) -> torch.device:
        return self.execution_device or super().device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.backbone.parameters() if p.is_floating_point())

    @abc.abstractmethod
    def predict(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """The network's answer (B, C, H, W) to x at sigma, with the sign that `prediction` has."""

    def output(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        with in_eval_mode(self.backbone):
            return self.predict(x, sigma, cond)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self.schedule.to_x0(self.prediction, x, self.output(x, sigma, cond).to(x.dtype), sigma)

    def with_backbone(self, backbone: nn.Module) -> Denoiser:
        """The same over a copy of the network, in float32: lower weights are too coarse for an optimizer's steps."""
        other = copy.copy(self)
        other.backbone = backbone.float() if self.dtype != torch.float32 else backbone
        return other


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Within, the network neither drops out nor recomputes by itself, and is not compiled; all is put back.

    Diffusers' own gradient checkpointing would compute a student's block again as the teacher's, and what is compiled
    skips hooks that came later.
    """
    changed: list[tuple[nn.Module, str, Any]] = []
    for module in network.modules():
        for name, quiet in (("training", False), ("gradient_checkpointing", False), ("_compiled_call_impl", None)):
            value = module.__dict__.get(name, quiet)
            if value is not quiet:
                changed.append((module, name, value))
                module.__dict__[name] = quiet
    try:
        yield
    finally:
        for module, name, value in changed:
            module.__dict__[name] = value


class UNetDenoiser(NetworkDenoiser):
    """The UNet of Stable Diffusion 1, 2 and XL, which predicts eps or v on a discrete schedule."""

    schedule: DiscreteSchedule

    def __init__(self, network: Any, schedule: DiscreteSchedule, prediction: str):
        super().__init__(network, schedule, prediction)

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        alpha, _ = self.schedule.alpha_sigma(sigma)
        t = self.schedule.timestep(sigma)
        added = cond.extra | ({"text_embeds": cond.pooled} if cond.pooled is not None else {})
        added = {k: v.to(self.dtype) for k, v in added.items()}
        return self.backbone(
            (expand(alpha, x) * x).to(self.dtype), t, cond.context.to(self.dtype), added_cond_kwargs=added or None
        ).sample


class TransformerDenoiser(NetworkDenoiser):
    """A transformer that predicts a flow: its timestep is sigma, the pipeline's t / 1000."""

    lora_style = "peft"


class SD3Denoiser(TransformerDenoiser):
    """Stable Diffusion 3 and 3.5."""

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        assert cond.pooled is not None
        return self.backbone(
            hidden_states=x.to(self.dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=cond.context.to(self.dtype),
            pooled_projections=cond.pooled.to(self.dtype),
            return_dict=False,
        )[0]


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) -> tokens (B, H/2 W/2, 4 C), one for each square of 2 x 2."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, to latents of this height and width."""
    batch, _, channels = tokens.shape
    x = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def image_ids(x: Tensor) -> Tensor:
    """Where the tokens of packed latents (B, C, H, W) stand: (H/2 W/2, 3), as (0, row, column)."""
    rows, columns = (torch.arange(side // 2, device=x.device, dtype=x.dtype) for side in x.shape[-2:])
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], 1)


class FluxDenoiser(TransformerDenoiser):
    """FLUX.1, dev and schnell."""

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        x, context = x.to(self.dtype), cond.context.to(self.dtype)
        tokens = self.backbone(
            hidden_states=pack(x),
            timestep=sigma.to(self.dtype),
            encoder_hidden_states=context,
            img_ids=image_ids(x),
            txt_ids=context.new_zeros(context.shape[1], 3),
            return_dict=False,
            **self.extra_inputs(x, cond),
        )[0]
        return unpack(tokens, *x.shape[-2:])

    def extra_inputs(self, x: Tensor, cond: Cond) -> dict[str, Any]:
        """Further inputs of this transformer: the pooled text, and the guidance that it was distilled with."""
        assert cond.pooled is not None
        embeds = self.backbone.config.guidance_embeds
        guidance = torch.full((len(x),), GUIDANCE, device=x.device) if embeds else None
        return {"pooled_projections": cond.pooled.to(self.dtype), "guidance": guidance}


class ChromaDenoiser(FluxDenoiser):
    """Chroma: Flux's blocks, with a mask of the text in place of the pooled text."""

    def extra_inputs(self, x: Tensor, cond: Cond) -> dict[str, Any]:
        mask = cond.extra["mask"].to(self.dtype)
        picture = mask.new_ones(len(x), x.shape[-2] * x.shape[-1] // 4)
        return {"attention_mask": torch.cat([mask, picture], 1)}


class QwenImageDenoiser(TransformerDenoiser):
    """Qwen-Image."""

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        x = x.to(self.dtype)
        height, width = x.shape[-2:]
        mask = cond.extra["mask"]
        used = int(mask.sum(1).max())  # the fill behind the longest text would cost time alone
        mask = mask[:, :used]
        tokens = self.backbone(
            hidden_states=pack(x),
            timestep=sigma.to(self.dtype),
            guidance=torch.full((len(x),), GUIDANCE, device=x.device) if self.backbone.config.guidance_embeds else None,
            encoder_hidden_states=cond.context[:, :used].to(self.dtype),
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


class SanaDenoiser(TransformerDenoiser):
    """Sana."""

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        found = self.backbone(
            x.to(self.dtype),
            encoder_hidden_states=cond.context.to(self.dtype),
            encoder_attention_mask=cond.extra["mask"].to(self.dtype),
            timestep=1000 * sigma * self.backbone.config.timestep_scale,
            return_dict=False,
        )[0]
        return found[:, : x.shape[1]]  # the first half, where the network puts out a variance as well


class Lumina2Denoiser(TransformerDenoiser):
    """Lumina 2, whose time and sign run the other way: 1 is the picture, and it predicts x0 - noise."""

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return -self.backbone(
            hidden_states=x.to(self.dtype),
            timestep=1 - sigma,
            encoder_hidden_states=cond.context.to(self.dtype),
            encoder_attention_mask=cond.extra["mask"].bool(),
            return_dict=False,
        )[0]

    def picture_part(self, tap: str, output: Tensor | tuple, x: Tensor, cond: Cond) -> Tensor:
        """The picture's tokens begin where each row's text ends."""
        tokens: Any = output
        texts, count = cond.extra["mask"].sum(1), self._tokens(x)
        rows = texts[:, None] + torch.arange(count, device=x.device)
        return tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[-1]))

    def _tokens(self, x: Tensor) -> int:
        patch = self.backbone.config.patch_size
        return (x.shape[-2] // patch) * (x.shape[-1] // patch)


class ZImageDenoiser(TransformerDenoiser):
    """Z-Image, whose time and sign run as Lumina 2's, and which takes its samples one by one."""

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        lengths = cond.extra["mask"].sum(1).tolist()
        texts = [row[:count] for row, count in zip(cond.context.to(self.dtype), lengths, strict=True)]
        pictures = list(x.to(self.dtype).unsqueeze(2).unbind(0))
        return -torch.stack(self.backbone(pictures, 1 - sigma, texts, return_dict=False)[0]).squeeze(2)

    def picture_part(self, tap: str, output: Tensor | tuple, x: Tensor, cond: Cond) -> Tensor:
        """The picture's tokens come first."""
        tokens: Any = output
        return tokens[:, : x.shape[-2] * x.shape[-1] // 4]
