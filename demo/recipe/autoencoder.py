"""Train the KL autoencoder: 64x64 pictures <-> 4x16x16 latents (Stable Diffusion's, in miniature).

    python -m turbodistill.demo.recipe.autoencoder
    python -m turbodistill.demo.recipe.autoencoder --decoder-only

The second sharpens the decoder on the cached latents, which it leaves as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Conv2d, GroupNorm, LeakyReLU
from tqdm import tqdm

from ...core import losses
from . import dataset
from .fit import Training, arguments, check_arguments, fit, low_precision

CONFIG: dict[str, Any] = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(32, 64, 96),
    layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=32,
    sample_size=64,
)
# Small enough to keep edges, large enough that latents stay smooth for a small denoiser.
KL_WEIGHT = 1e-6
WORST_WEIGHT = 0.15
ADVERSARIAL_WEIGHT = 0.1  # of the decoder's refinement


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences (..., W - 1) and (..., H - 1, W) between neighbouring pixels of x (..., H, W)."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 on pixels, on their differences, on 8x8 means and on the worst 3x3.

    No pretrained network, so that the metrics favour none.
    The differences keep edges sharp; the means see to colours, which small convolutions learn last. The worst place
    counts by itself, or the decoder puts a coloured dot there, by which it steers its group norms (as in
    arXiv 1912.04958, section 2): too small to cost anything in a mean.
    """
    loss = 2 * (output - target).abs().mean()
    loss = loss + 4 * (F.avg_pool2d(output, 8) - F.avg_pool2d(target, 8)).abs().mean()
    for a, b in zip(edges(output), edges(target), strict=True):
        loss = loss + 0.5 * (a - b).abs().mean()
    errors = F.avg_pool2d((output - target).abs().mean(1, keepdim=True), 3, 1, 1)
    return loss + WORST_WEIGHT * errors.flatten(1).amax(1).mean()


def build() -> Any:
    """A fresh autoencoder; Any, because diffusers mistypes its `to`, `encode` and `decode`."""
    return AutoencoderKL(**CONFIG)


def train(args) -> None:
    """Train encoder and decoder, and write them with the pictures' latents."""
    images, records = dataset.load(args.folder)
    rows = torch.tensor([i for i, r in enumerate(records) if r["split"] == "train"])
    torch.manual_seed(0)
    model = build().to(args.device)

    def loss(model: Any, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        x = images[rows[torch.randint(len(rows), (args.batch_size,), generator=draw)]].to(args.device)
        x = x.float() / 127.5 - 1
        if step % 2:
            x = x.flip(-1)
        with low_precision(args.device):
            posterior = model.encode(x).latent_dist
            output = model.decode(posterior.sample()).sample
        kl = posterior.kl().mean()
        return reconstruction_loss(output.float(), x) + KL_WEIGHT * kl.float()

    encode_all(fitted(model, loss, args.folder / "autoencoder.pt", args), images, args)


def fitted(model: nn.Module, loss, path: Path, args) -> Any:
    """The average of `model` after `--updates`, the learning rate falling over the last third."""
    training = Training(model, {"batch_size": args.batch_size, "lr": args.lr})
    fit(training, loss, path, args.lr, args.batch_size, args.updates, decay=args.updates // 3)
    return training.finish()


class Critic(nn.Sequential):
    """A patch discriminator (arXiv 1611.07004, section 3.2.2): pictures (B, 3, 64, 64) -> logits (B, 1, 14, 14)."""

    def __init__(self) -> None:
        super().__init__(
            Conv2d(3, 32, 4, 2, 1),
            LeakyReLU(0.2),
            Conv2d(32, 64, 4, 2, 1),
            GroupNorm(8, 64),
            LeakyReLU(0.2),
            Conv2d(64, 128, 3),
            GroupNorm(8, 128),
            LeakyReLU(0.2),
            Conv2d(128, 1, 3, padding=1),
        )


class Refined(nn.Module):
    """A decoder in training with its critic: one module, so that one state file holds both."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder, self.critic = decoder, Critic()


def refine_decoder(args) -> None:
    """Train the decoder on the cached latents, noised, since a denoiser's are never exact; edges by a critic.

    What the latents do not hold, a mean error blurs; the critic asks for one sharp answer instead.
    """
    images, records = dataset.load(args.folder)
    rows = torch.tensor([i for i, r in enumerate(records) if r["split"] == "train"])
    path = args.folder / "autoencoder.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    latents = load_file(args.folder / "latents.safetensors")["latents"]
    noise = 0.25 * latents.std()
    decoder = build()
    decoder.load_state_dict(load_file(path))
    decoder.encoder.requires_grad_(False)
    decoder.quant_conv.requires_grad_(False)
    torch.manual_seed(0)
    model = Refined(decoder).to(args.device)

    def loss(model: Refined, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        index = rows[torch.randint(len(rows), (args.batch_size,), generator=draw)]
        level = noise * torch.rand(args.batch_size, 1, 1, 1, generator=draw)
        z = latents[index] + level * torch.randn(args.batch_size, *latents.shape[1:], generator=draw)
        x = images[index].to(args.device).float() / 127.5 - 1
        with low_precision(args.device):
            output = model.decoder.decode(z.to(args.device)).sample.float()
            model.critic.requires_grad_(False)
            fooled = losses.relativistic_student([model.critic(output)], [model.critic(x)])
            model.critic.requires_grad_(True)
            critic_loss = losses.relativistic_discriminator([model.critic(x)], [model.critic(output.detach())])
        rise = min(1.0, step / 500)  # a fresh critic's gradient is noise
        return reconstruction_loss(output, x) + rise * ADVERSARIAL_WEIGHT * fooled + critic_loss

    average = fitted(model, loss, args.folder / "decoder.pt", args).decoder
    report_error(average, images, latents, args)
    weights = {k: v.contiguous().cpu() for k, v in average.state_dict().items()}
    save_file(weights, path, about)


@torch.no_grad()
def report_error(model: Any, images: Tensor, latents: Tensor, args) -> None:
    """Print the PSNR, in dB, of latents (N, 4, 16, 16), decoded, to their pictures (N, 3, 64, 64), uint8."""
    errors = []
    for z, chunk in zip(latents.split(64), images.split(64), strict=True):
        with low_precision(args.device):
            output = model.decode(z.to(args.device)).sample.float().cpu()
        errors.append((output - (chunk.float() / 127.5 - 1)).square().mean(dim=(1, 2, 3)))
    psnr = 10 * (4 / torch.cat(errors)).log10()
    print(f"PSNR {psnr.mean():.2f} dB (std {psnr.std():.2f}) over {len(psnr)} pictures")


@torch.no_grad()
def encode_all(model: Any, images: Tensor, args) -> None:
    """Cache every latent (unscaled mean) beside the weights; report the error and the latents' spread."""
    latents = []
    for chunk in tqdm(images.split(64), desc="latents"):
        with low_precision(args.device):
            latents.append(model.encode(chunk.to(args.device).float() / 127.5 - 1).latent_dist.mean.float().cpu())
    z = torch.cat(latents).contiguous()
    report_error(model, images, z, args)
    print(f"latent std {z.std():.4f}, mean {z.mean():.4f}")
    weights = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
    save_file(weights, args.folder / "autoencoder.safetensors", {"scale_factor": f"{1 / z.std().item():.6f}"})
    save_file({"latents": z}, args.folder / "latents.safetensors")


if __name__ == "__main__":
    parser = arguments(__doc__ or "", updates=2000)
    parser.add_argument("--decoder-only", action="store_true", help="go on with the decoder, keep the latents")
    args = parser.parse_args()
    check_arguments(parser, args)
    refine_decoder(args) if args.decoder_only else train(args)
