"""Train the KL autoencoder: 64x64 pictures <-> 4x16x16 latents (Stable Diffusion's, in miniature).

    python -m turbodistill.demo.recipe.autoencoder --minutes 20
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from . import dataset
from .fit import arguments, fit

CONFIG = dict(
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


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 on pixels and on their differences: no pretrained network, so that none is favoured by the metrics."""
    loss = (output - target).abs().mean()
    for a, b in zip(edges(output), edges(target), strict=True):
        loss = loss + (a - b).abs().mean()
    return loss


def train(args) -> None:
    images, records = dataset.load(args.folder)
    rows = torch.tensor([i for i, r in enumerate(records) if r["split"] == "train"])
    torch.manual_seed(0)
    model = AutoencoderKL(**CONFIG).to(args.device)

    def loss(model: nn.Module, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        x = images[rows[torch.randint(len(rows), (args.batch,), generator=draw)]].to(args.device)
        x = x.float() / 127.5 - 1
        if step % 2:
            x = x.flip(-1)
        with torch.autocast(args.device, torch.bfloat16):
            posterior = model.encode(x).latent_dist
            output = model.decode(posterior.sample()).sample
        kl = posterior.kl().mean()
        return reconstruction_loss(output.float(), x) + KL_WEIGHT * kl.float()

    average = fit(model, loss, args.folder / "autoencoder.pt", args.minutes, args.lr)
    encode_all(average, images, args)


@torch.no_grad()
def encode_all(model: AutoencoderKL, images: Tensor, args) -> None:
    """Cache every latent (unscaled mean) beside the weights; report the error and the latents' spread."""
    latents, errors = [], []
    for chunk in tqdm(images.split(64), desc="latents"):
        x = chunk.to(args.device).float() / 127.5 - 1
        with torch.autocast(args.device, torch.bfloat16):
            mean = model.encode(x).latent_dist.mean.float()
            output = model.decode(mean).sample.float()
        errors.append((output - x).square().mean(dim=(1, 2, 3)).cpu())
        latents.append(mean.cpu())
    z = torch.cat(latents).contiguous()
    psnr = 10 * (4 / torch.cat(errors)).log10()
    print(f"PSNR {psnr.mean():.2f} dB (std {psnr.std():.2f}); latent std {z.std():.4f}, mean {z.mean():.4f}")
    weights = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
    save_file(weights, args.folder / "autoencoder.safetensors", {"scale_factor": f"{1 / z.std().item():.6f}"})
    save_file({"latents": z}, args.folder / "latents.safetensors")


if __name__ == "__main__":
    train(arguments(__doc__, minutes=20).parse_args())
