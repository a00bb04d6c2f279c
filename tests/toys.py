"""Toy denoisers that have what real ones have, in a few thousand parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import Conv2d, Linear, Upsample
from turbodistill.core.denoiser import Cond, Denoiser
from turbodistill.core.schedule import DiscreteSchedule, FlowSchedule, Schedule, expand

CHANNELS, SIZE, TEXT = 4, 8, 6


class ConvBackbone(nn.Module):
    """A strided convolution, a text and a time projection, a middle and a way up: a UNet's parts."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.conv_in = Conv2d(CHANNELS, width, 3, padding=1)
        self.text = Linear(TEXT, width)
        self.time = Linear(1, width)
        self.down = Conv2d(width, width, 3, stride=2, padding=1)
        self.up = Upsample(scale_factor=2)
        self.conv_out = Conv2d(width, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        added = self.text(context).mean(1) + self.time(time[:, None])
        h = torch.tanh(self.conv_in(x) + added[:, :, None, None])
        return self.conv_out(h + self.up(torch.tanh(self.down(h))))


class Toy(Denoiser):
    """A backbone called with (scaled x, time in [0, 1], text tokens) as a Denoiser."""

    def __init__(self, backbone: nn.Module, schedule: Schedule, prediction: str):
        self.backbone, self.schedule, self.prediction = backbone, schedule, prediction

    def output(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        scale = 1.0 if self.prediction == "flow" else expand(self.schedule.alpha_sigma(sigma)[0], x)
        return self.backbone(scale * x, self.schedule.timestep(sigma) / self.schedule.timesteps, cond.context)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self.schedule.to_x0(self.prediction, x, self.output(x, sigma, cond), sigma)


class Block(nn.Module):
    """A residual block, which gradient checkpointing knows by its place in `blocks` and its parts."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = Conv2d(width, width, 3, padding=1)
        self.outer = Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor, added: Tensor) -> Tensor:
        return h + self.outer(torch.tanh(self.inner(h) + added))


class BlockBackbone(nn.Module):
    """Its input plus a small change by a row of blocks, so that as eps it is near the answer and x0 stays bounded."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.conv_in = Conv2d(CHANNELS, width, 3, padding=1)
        self.text = Linear(TEXT, width)
        self.time = Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.conv_out = Conv2d(width, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        added = (self.text(context).mean(1) + self.time(time[:, None]))[:, :, None, None]
        h = self.conv_in(x)
        for block in self.blocks:
            h = block(h, added)
        return x + 0.2 * self.conv_out(h)


class PlainBackbone(nn.Module):
    """Its input plus a small change by convolutions that gradient checkpointing does not know."""

    def __init__(self, width: int = 12, text: int = TEXT):
        super().__init__()
        self.conv_in = Conv2d(CHANNELS, width, 3, padding=1)
        self.blocks = nn.ModuleList(Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.text = Linear(text, width)
        self.time = Linear(1, width)
        self.conv_out = Conv2d(width, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        added = self.text(context.mean(1)) + self.time(time[:, None])
        h = self.conv_in(x) + added[:, :, None, None]
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return x + 0.2 * self.conv_out(h)


def conv(prediction: str = "eps", seed: int = 0, backbone: type[nn.Module] = ConvBackbone) -> Toy:
    """A toy teacher of pictures (B, 4, 8, 8)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = backbone()
    schedule = FlowSchedule(shift=3.0) if prediction == "flow" else DiscreteSchedule()
    return Toy(made, schedule, prediction)


def row(prediction: str = "eps", seed: int = 0) -> Toy:
    """Another, whose backbone is a row of blocks."""
    return conv(prediction, seed, BlockBackbone)


class Recorder(Denoiser):
    """A denoiser that keeps what it is called with, and answers by `answer(x, sigma, cond)`."""

    prediction = "x0"

    def __init__(self, answer=lambda x, sigma, cond: torch.zeros_like(x), schedule: Schedule | None = None):
        self.answer, self.schedule, self.calls = answer, schedule or DiscreteSchedule(), []
        self.backbone = Linear(1, 1)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        self.calls.append((x, sigma, cond))
        return self.answer(x, sigma, cond)


def cond(batch: int = 2, value: float | None = None) -> Cond:
    """Token states (B, 3, 6): random, or all `value`."""
    if value is None:
        return Cond(torch.randn(batch, 3, TEXT))
    return Cond(torch.full((batch, 3, TEXT), value))


def picture(batch: int = 2) -> Tensor:
    return torch.randn(batch, CHANNELS, SIZE, SIZE)


def nudge(lora: nn.Module, scale: float = 0.1) -> None:
    """Give a fresh LoRA, whose up weights are zero, something to do."""
    with torch.no_grad():
        for branch in lora.branches:
            branch.up.normal_(std=scale)


def small_unet(text: int = TEXT, attention: bool = True):
    """A diffusers UNet of four blocks' kinds, with seeded weights."""
    from diffusers import UNet2DConditionModel

    cross = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D") if attention else ("DownBlock2D", "UpBlock2D")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            down_block_types=(cross[0], "DownBlock2D"),
            up_block_types=("UpBlock2D", cross[1]),
            block_out_channels=(8, 16),
            layers_per_block=2,
            cross_attention_dim=text,
            attention_head_dim=4,
            norm_num_groups=4,
        ).eval()


class UNetDenoiser(Toy):
    """A diffusers UNet as a Denoiser, without the trainer's host."""

    def output(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        alpha = expand(self.schedule.alpha_sigma(sigma)[0], x)
        return self.backbone(alpha * x, self.schedule.timestep(sigma), cond.context).sample


def unet(prediction: str = "eps") -> UNetDenoiser:
    return UNetDenoiser(small_unet(), DiscreteSchedule(), prediction)


def ring(modes: int = 8, radius: float = 2.0) -> Tensor:
    """Means (modes, 2) on a circle."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


class MixtureBackbone(nn.Module):
    """eps of a mixture of Gaussians on a ring, exactly, plus a net that starts at zero and can learn.

    Points are pictures (B, 2, 1, 1).
    """

    def __init__(self, means: Tensor, std: float, schedule: DiscreteSchedule, width: int = 64):
        super().__init__()
        self.register_buffer("means", means)
        self.std, self.schedule = std, schedule
        self.inner = Conv2d(3, width, 1)
        self.hidden = Conv2d(width, width, 1)
        self.out = Conv2d(width, 2, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def exact(self, scaled: Tensor, time: Tensor) -> Tensor:
        sigma = self.schedule.sigma(time * self.schedule.timesteps)[:, None].to(scaled)
        x = scaled.flatten(1) * (sigma**2 + 1).sqrt()
        spread = sigma**2 + self.std**2
        nearest = (-(torch.cdist(x, self.means) ** 2) / (2 * spread)).softmax(1)
        mean = nearest @ self.means
        # The posterior mean of a Gaussian, averaged over the modes' posterior weights.
        x0 = mean + (x - mean) * self.std**2 / spread
        return ((x - x0) / sigma)[:, :, None, None]

    def forward(self, scaled: Tensor, time: Tensor, context: Tensor) -> Tensor:
        h = torch.cat([scaled, time[:, None, None, None].expand(-1, 1, *scaled.shape[2:])], 1)
        h = torch.tanh(self.hidden(torch.tanh(self.inner(h))))
        return self.exact(scaled, time) + self.out(h)


class AffineBackbone(nn.Module):
    """A matrix for the point, one for the text, and what is added to both; points are pictures (B, 2, 1, 1)."""

    def __init__(self):
        super().__init__()
        self.point = Conv2d(2, 2, 1)
        self.text = Linear(TEXT, 2)

    def forward(self, scaled: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.point(scaled) + self.text(context.mean(1))[:, :, None, None]


def affine(prediction: str) -> Toy:
    """A teacher whose guidance another of its kind gives exactly."""
    return conv(prediction, backbone=AffineBackbone)


def mixture(means: Tensor, std: float = 0.1) -> Toy:
    """A teacher whose score is known: of Gaussians at `means` (M, 2), on points (B, 2, 1, 1)."""
    schedule = DiscreteSchedule()
    return Toy(MixtureBackbone(means, std, schedule), schedule, "eps")
