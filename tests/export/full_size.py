"""Synthetic Stable Diffusion 1.5, 2.1 and XL in full size: single files of random numbers in float16; their students.

Written tensor by tensor from one pool of noise, so that making them takes neither memory nor time.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from turbodistill.core.naming import to_single_file
from turbodistill.generate.export import layout
from turbodistill.generate.export.merge import TEXT_ENCODERS
from turbodistill.trainer.checkpoint.identify import SD2_BIAS, TEXTS
from turbodistill.trainer.data.tensor_file import Entry, write_safetensors

TOKENS = 49408
XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Kind:
    """A full-size model: its UNet's settings, and of each text encoder (width, layers, middle, projected)."""

    architecture: str
    unet: dict[str, Any]
    texts: tuple[tuple[int, int, int, bool], ...]
    prediction: str = "eps"
    marks: tuple[str, ...] = ()


SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL = XL | {"cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True}
CLIP_L, CLIP_H, CLIP_G = (768, 12, 3072, False), (1024, 23, 4096, False), (1280, 32, 5120, True)
XL_NAME = "stable-diffusion-xl-v1-base"
KINDS = {
    "sd15": Kind("stable-diffusion-v1", {"cross_attention_dim": 768, "attention_head_dim": 8}, (CLIP_L,)),
    "sd21": Kind("stable-diffusion-v2", SD2, (CLIP_H,), "v"),
    "sdxl": Kind(XL_NAME, SDXL, (CLIP_L, CLIP_G)),
    "sdxl-v": Kind(XL_NAME, SDXL, (CLIP_L, CLIP_G), "v", ("v_pred", "ztsnr")),
}


def modules(kind: Kind) -> dict[str, Any]:
    """The networks without weights, by diffusers' names of a pipeline's parts."""
    import diffusers
    import transformers

    library: Any = diffusers
    with torch.device("meta"):
        parts: dict[str, Any] = {"unet": library.UNet2DConditionModel(sample_size=64, **kind.unet)}
        parts["vae"] = library.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        )  # fmt: skip
        for i, (width, layers, middle, projected) in enumerate(kind.texts):
            config = transformers.CLIPTextConfig(
                vocab_size=TOKENS, hidden_size=width, intermediate_size=middle, num_hidden_layers=layers,
                num_attention_heads=width // 64, projection_dim=width,
            )  # fmt: skip
            model = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
            parts["text_encoder_2" if i else "text_encoder"] = model(config)
    return parts


def shapes_of(module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def single_file_shapes(kind: Kind) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the whole single file."""
    parts = {name: shapes_of(module) for name, module in modules(kind).items()}
    table = to_single_file(parts["unet"])
    found = {"model.diffusion_model." + table[n]: s for n, s in parts["unet"].items()}
    found |= {"first_stage_model." + p.name: p.shape for p in layout.vae_to_single(parts["vae"])}
    for part, prefix in TEXT_ENCODERS[kind.architecture].items():
        if TEXTS[prefix] == "clip_l":
            pieces = layout.clip_to_single(parts[part])
        else:
            pieces = layout.open_clip_to_single(parts[part], complete=True)
        found |= {prefix + p.name: p.shape for p in pieces}
    return found | dict.fromkeys(kind.marks, (0,))


BYTES = {"sd15": 8e9, "sd21": 8e9, "sdxl": 17e9, "sdxl-v": 17e9}  # of free memory


class Noise:
    """Random weights of a network that neither dies nor explodes, as views of one pool."""

    def __init__(self, seed: int = 0):
        self.pool = torch.randn(2**22, generator=torch.Generator().manual_seed(seed))
        self.at = 0

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name == f"model.diffusion_model.{SD2_BIAS}":  # by which a Stable Diffusion 2 that predicts v is told
            return torch.tensor([1.0, -1.0]).repeat(shape[0] // 2).half()
        if name.endswith("text_model.final_layer_norm.bias"):  # hosts divide by the mean of what it gives
            return torch.full(shape, 0.1).half()
        if len(shape) < 2:
            is_norm = "norm" in name or "ln_" in name or ".in_layers.0" in name or ".out_layers.0" in name
            one = name.endswith("weight") and (is_norm or name.endswith("out.0.weight"))
            return torch.full(shape, float(one)).half()
        count, scale = torch.Size(shape).numel(), torch.Size(shape[1:]).numel() ** -0.5
        self.at = (self.at + 40_503) % (len(self.pool) // 2)
        end = self.at + count
        pool = self.pool if end <= len(self.pool) else self.pool.repeat(-(-end // len(self.pool)))
        return (pool[self.at : end] * scale).half().view(shape)


def write(path: Path, kind: str) -> Path:
    """The checkpoint as a single file."""
    noise = Noise()
    entries = [
        Entry(n, s, torch.float16, lambda n=n, s=s: noise(n, s)) for n, s in single_file_shapes(KINDS[kind]).items()
    ]
    for _ in write_safetensors(path, entries, {}):
        pass
    return path


def apart(function: Callable[..., None], place: Path, kind: str, tokenizer: Path) -> None:
    """One of the functions below in a process of its own, whose memory is free again when it ends."""
    subprocess.run([sys.executable, __file__, function.__name__, *map(str, (place, kind, tokenizer))], check=True)


def distil(place: Path, kind: str, tokenizer: Path) -> None:
    """student.safetensors in `place`: of base.safetensors there, on all layers, by one update of each phase."""
    import turbodistill as td

    config = td.Config(
        rank=4, targets="all", pairs=4, pair_steps=2, updates=2, regression_updates=1, batch_size=1, lr=0.01,
        discriminator_warmup=0, adversarial_ramp=0, lr_decay=0, precision="float32", gradient_checkpointing=True,
        evaluate_every=0,
    )  # fmt: skip
    model = td.load_model(place / "base.safetensors", tokenizer=tokenizer, size=(128, 128))
    assert (model.architecture, model.denoiser.prediction) == (KINDS[kind].architecture, KINDS[kind].prediction)
    steps = [e for e in td.distill(model, config, place / "run", prompts=["a b", "c"]) if isinstance(e, td.Step)]
    assert ["regression" in step.losses for step in steps] == [True, False] and "adversarial" in steps[1].losses
    (place / "run" / "student.safetensors").rename(place / "student.safetensors")


def one_step(place: Path, kind: str, tokenizer: Path) -> None:
    """inputs.safetensors: noisy latents and conditions, as ComfyUI's networks take them; and x0 made of them.

    That is in expected.safetensors, of student and teacher.
    """
    import turbodistill as td
    from diffusers.models.embeddings import Timesteps
    from turbodistill.core.denoiser import Cond

    torch.manual_seed(0)
    model = td.load_model(place / "base.safetensors", tokenizer=tokenizer)
    sigma = model.denoiser.schedule.sigma(torch.tensor([999.0])).float()
    width = sum(text[0] for text in KINDS[kind].texts)
    given = {"x": sigma * torch.randn(1, 4, 16, 16), "sigma": sigma, "states": torch.randn(1, 77, width)}
    cond = Cond(given["states"])
    if len(KINDS[kind].texts) == 2:
        pooled, sizes = torch.randn(1, 1280), torch.tensor([[128.0, 128, 0, 0, 128, 128]])
        given["y"] = torch.cat([pooled, Timesteps(256, True, 0)(sizes.flatten()).reshape(1, -1)], 1)
        cond = Cond(given["states"], pooled, {"time_ids": sizes})
    student, _ = td.load_student(place / "student.safetensors", model)
    with torch.no_grad():
        made = {"student": student(given["x"], sigma, cond), "teacher": model.denoiser(given["x"], sigma, cond)}
    save_file(given, place / "inputs.safetensors")
    save_file(made, place / "expected.safetensors")


def skip_without_memory(kind: str) -> None:
    """Skip a test that this machine has no room for."""
    import pytest

    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if free < (needed := BYTES[kind]):
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory: there are {free / 1e9:.0f} GB")


if __name__ == "__main__":
    asked, where, of, letters = sys.argv[1:]
    {"distil": distil, "one_step": one_step}[asked](Path(where), of, Path(letters))
