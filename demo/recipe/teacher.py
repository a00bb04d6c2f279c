"""Train the latent denoiser: Stable Diffusion 2's UNet in miniature, v-prediction, classifier-free guidance.

python -m turbodistill.demo.recipe.teacher --minutes 240
"""

from __future__ import annotations

import random

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, autocast, nn
from tqdm import tqdm

from ..text_encoder import LENGTH, WIDTH, TextEncoder
from . import dataset
from .fit import arguments, fit

CONFIG = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    block_out_channels=(64, 128, 160),
    attention_head_dim=(2, 4, 5),  # heads of 32 channels; diffusers' name for their number
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=WIDTH,
    norm_num_groups=32,
    use_linear_projection=True,
)
DROP_TEXT = 0.1


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's schedule: 1000 steps, sqrt(beta) linear from sqrt(.00085) to sqrt(.012)."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def load_text_encoder(folder) -> TextEncoder:
    with safe_open(folder / "text_encoder.safetensors", "pt") as file:
        encoder = TextEncoder(file.metadata()["tokenizer"])
    encoder.load_state_dict(load_file(folder / "text_encoder.safetensors"))
    return encoder.eval()


def prompts_of(record: dict) -> list[str]:
    """The ways in which a training picture is described: its caption, its name, its everyday words."""
    style = dataset.STYLES[record["style"]]
    words = ", ".join(random.Random(record["caption"]).sample(record["keywords"], min(3, len(record["keywords"]))))
    return [record["caption"], f"{record['name']}, {style}", f"{words or record['name']}, {style}"]


def train(args) -> None:
    _, records = dataset.load(args.folder)
    rows = [i for i, r in enumerate(records) if r["split"] == "train"]
    with safe_open(args.folder / "autoencoder.safetensors", "pt") as file:
        scale = float(file.metadata()["scale_factor"])
    latents = load_file(args.folder / "latents.safetensors")["latents"][rows].mul(scale).to(args.device)
    encoder = load_text_encoder(args.folder)
    texts = [prompts_of(records[i]) for i in rows]
    states = torch.empty(len(rows), 3, LENGTH, WIDTH, dtype=torch.float16, device=args.device)
    for i, chunk in enumerate(tqdm(texts, desc="captions")):
        states[i] = encoder.encode(chunk)
    empty = encoder.encode([""]).half().to(args.device)
    cumulative = alphas_cumprod().to(args.device)
    alpha, sigma = cumulative.sqrt().float(), (1 - cumulative).sqrt().float()

    torch.manual_seed(0)
    model = UNet2DConditionModel(**CONFIG).to(args.device)
    model.set_attn_processor(AttnProcessor())  # on a CPU the fused backward in bf16 is slower

    def loss(model: nn.Module, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        index = torch.randint(len(rows), (args.batch,), generator=draw)
        variant = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), args.batch, True, generator=draw)
        drop = torch.rand(args.batch, generator=draw) < DROP_TEXT
        t = torch.randint(1000, (args.batch,), generator=draw).to(args.device)
        context = states[index, variant]
        context[drop] = empty
        x0 = latents[index]
        noise = torch.randn(x0.shape, generator=draw).to(args.device)
        a, s = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        with autocast(args.device, torch.bfloat16):
            v = model(a * x0 + s * noise, t, context.float()).sample
        return (v.float() - (a * noise - s * x0)).square().mean()

    average = fit(model, loss, args.folder / "teacher.pt", args.minutes, args.lr)
    weights = {k: v.contiguous().cpu() for k, v in average.state_dict().items()}
    save_file(weights, args.folder / "teacher.safetensors")


if __name__ == "__main__":
    train(arguments(__doc__, minutes=240).parse_args())
