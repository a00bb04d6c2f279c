"""What the teacher sees of a picture: latents, also of it shifted and scaled, and a vision transformer's features.

Both are made once and kept in the recipe's folder.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from . import autoencoder, dataset

VIEWS = 6  # of each picture; the first is the picture itself
SHIFT, SMALLEST = 0.06, 0.85  # of half the picture's side; scale
FEATURES = 384  # channels of the vision transformer
BLOCKS = 9  # of its twelve: the last ones look tuned for another task
SIDE = 112  # at which it sees a picture: 8 x 8 patches of 14


def moved(images: Tensor, seed: int) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], each shrunk and shifted by a little on white.

    None is mirrored: there are letters and arrows among them.
    """
    draw = torch.Generator().manual_seed(seed)
    scale = SMALLEST + (1 - SMALLEST) * torch.rand(len(images), generator=draw)
    shift = SHIFT * (2 * torch.rand(len(images), 2, generator=draw) - 1)
    matrix = torch.zeros(len(images), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / scale
    matrix[:, :, 2] = shift
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    # What lies beyond the edge reads as nought: white, once white is nought.
    return F.grid_sample(images - 1, grid, mode="bicubic", align_corners=False).clamp(-2, 0) + 1


@torch.no_grad()
def latents(folder: Path, device: torch.device) -> Tensor:
    """Scaled latents (N, VIEWS, 4, 16, 16), float16, of all pictures."""
    path = folder / "views.safetensors"
    if not path.exists():
        images, _ = dataset.load(folder)
        with safe_open(folder / "autoencoder.safetensors", "pt") as file:
            scale = float(file.metadata()["scale_factor"])
        vae = autoencoder.build().to(device).eval()
        vae.load_state_dict(load_file(folder / "autoencoder.safetensors"))
        made = torch.empty(len(images), VIEWS, 4, 16, 16, dtype=torch.float16)
        for first in tqdm(range(0, len(images), 64), desc="latents"):
            x = images[first : first + 64].float() / 127.5 - 1
            for view in range(VIEWS):
                seen = moved(x, first * VIEWS + view) if view else x
                z = vae.encode(seen.to(device)).latent_dist.mean * scale
                made[first : first + 64, view] = z.half().cpu()
        save_file({"latents": made}, path)
    return load_file(path)["latents"]


@torch.no_grad()
def features(folder: Path) -> Tensor:
    """Features (N, 384, 8, 8), float16, of a ViT-S/14 of DINOv2's architecture."""
    path = folder / "features.safetensors"
    if not path.exists():
        from transformers import Dinov2Model

        network = folder / "vision"
        if not network.exists():
            command = [sys.executable, "-m", "turbodistill.demo.recipe.vision", "--folder", str(folder)]
            subprocess.run([*command, "--blocks", str(BLOCKS), "--out", str(network)], check=True)
        vit = Dinov2Model.from_pretrained(network, local_files_only=True).float().eval()
        images, _ = dataset.load(folder)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        made = []
        for chunk in tqdm(images.split(32), desc="features"):
            x = F.interpolate(chunk.float() / 255, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
            tokens = vit((x - mean) / std).last_hidden_state[:, 1:]
            made.append(tokens.transpose(1, 2).unflatten(2, (8, 8)).half())
        save_file({"features": torch.cat(made).contiguous()}, path)
    return load_file(path)["features"]
