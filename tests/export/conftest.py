"""Small pipelines of real classes, of the sizes by which Stable Diffusion 1, 2 and XL are told, and their students."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from turbodistill.core.card import StudentCard, fingerprint
from turbodistill.core.denoiser import Cond
from turbodistill.core.schedule import DiscreteSchedule
from turbodistill.core.student import Student, load_student, student_bytes
from turbodistill.generate.export.export import Export
from turbodistill.trainer.pipeline.denoisers import UNetDenoiser

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
WORDS = ["!", "<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
SHARED = {"sample_size": 8, "layers_per_block": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
SHARED |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
UNETS = {
    "sd1": SHARED | {"block_out_channels": (32, 64), "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd2": SHARED
    | {
        "block_out_channels": (64, 128),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": SHARED
    | {
        "block_out_channels": (64, 128, 192),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 2, 3),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 64,
    },
}
# Widths and numbers of layers of the text encoders; an SDXL is told by the second one's tenth layer.
TEXTS = {"sd1": [(768, 2)], "sd2": [(1024, 2)], "sdxl": [(1984, 1), (64, 10)]}
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
}
READINGS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def write_tokenizer(folder: Path) -> Path:
    """Files of a CLIP tokenizer that knows single letters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def text_encoder(width: int, layers: int, projected: bool, activation: str):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=77, hidden_act=activation, projection_dim=width,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def make_pipeline(kind: str, folder: Path, prediction: str = "eps", unet: dict | None = None):
    """A pipeline of random weights that float16 holds exactly, saved in `folder`."""
    import diffusers
    from transformers import CLIPTokenizer

    library: Any = diffusers
    torch.manual_seed(0)
    files = write_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    acts = ["gelu" if kind == "sd2" else "quick_gelu", "gelu"]
    tokenizers = [
        CLIPTokenizer(
            str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=77,
            pad_token="!" if act == "gelu" else "<|endoftext|>",  # OpenCLIP's
        ) for act in acts
    ]  # fmt: skip
    vae = library.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=4,
        scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
    )  # fmt: skip
    scheduler = library.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=READINGS[prediction],
    )  # fmt: skip
    network = library.UNet2DConditionModel(**(unet or UNETS[kind])).eval()
    texts = [text_encoder(w, n, i == 1, acts[i]) for i, (w, n) in enumerate(TEXTS[kind])]
    for module in (network, vae, *texts):
        module.half().float()
    if kind == "sdxl":
        pipe = library.StableDiffusionXLPipeline(vae, texts[0], texts[1], *tokenizers, network, scheduler)
    else:
        pipe = library.StableDiffusionPipeline(
            vae, texts[0], tokenizers[0], network, scheduler, None, None, requires_safety_checker=False
        )
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass
class Made:
    """A base model as a pipeline and its folder, and what samples it: `cond` is of one random prompt."""

    kind: str
    pipe: Any
    folder: Path
    denoiser: UNetDenoiser
    noise: Tensor
    cond: Cond

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    def card(self, **changes) -> StudentCard:
        about = {
            "kind": "lora", "base_model": self.folder.name, "base_hash": fingerprint(self.denoiser.backbone),
            "architecture": ARCHITECTURES[self.kind], "prediction": self.denoiser.prediction,
            "base_prediction": self.denoiser.prediction, "timesteps": (999,), "guidance": 4.0, "resolution": (64, 64),
            "rank": 4, "alpha": 2.0,
        }  # fmt: skip
        return StudentCard(**about | changes)

    def student(
        self, path: Path, dtype=torch.float16, full: bool = False, targets: str = "all", style: str = "", **changes
    ) -> Path:
        """A student's file that has learnt something: a LoRA in a style of `core.lora`, or as a training writes it."""
        student = Student(self.denoiser, 0 if full else 4, 2.0, targets)
        with torch.no_grad():
            if full:
                for k, weight in enumerate(student.backbone.parameters()):
                    torch.manual_seed(k)
                    weight += 0.02 * torch.randn(weight.shape)
            else:
                for branch in student.lora.each():
                    branch.up.normal_(std=0.1)
        about = {"kind": "full", "rank": 0, "alpha": 0.0} if full else {"targets": targets}
        card = self.card(**about | changes)
        if style:
            path.write_bytes(save(student.lora.export(student.backbone, style, dtype), card.to_metadata()))
        else:
            path.write_bytes(student_bytes(student, card, dtype))
        student.release()
        return path

    def picture(self, path: Path) -> Tensor:
        """The latents that a student's file makes in one step, through our own loader."""
        student, _, warning = load_student(path, self.denoiser)
        assert warning == ""
        try:
            return student.generate(self.noise, self.cond)
        finally:
            student.release()

    def through(self, pipe) -> Tensor:
        """The latents that a diffusers pipeline makes in one step of a stock scheduler."""
        from diffusers import EulerDiscreteScheduler

        pipe.set_progress_bar_config(disable=True)
        stock = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        before, pipe.scheduler = pipe.scheduler, stock
        more = {"pooled_prompt_embeds": self.cond.pooled} if self.kind == "sdxl" else {}
        try:
            return pipe(
                prompt_embeds=self.cond.context, num_inference_steps=1, guidance_scale=0, latents=self.noise.clone(),
                height=64, width=64, output_type="latent", **more,
            ).images  # fmt: skip
        finally:
            pipe.scheduler = before


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of what is expected."""
    return float((found - expected).detach().abs().max() / expected.detach().std())


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """A kind and options of `make_pipeline` -> Made; each is made once."""
    made: dict[Any, Made] = {}

    def build(kind: str, prediction: str = "eps") -> Made:
        if (kind, prediction) not in made:
            folder = tmp_path_factory.mktemp("bases") / f"tiny-{kind}"
            pipe = make_pipeline(kind, folder, prediction)
            torch.manual_seed(1)
            width = UNETS[kind]["cross_attention_dim"]
            pooled = torch.randn(1, 64) if kind == "sdxl" else None
            more = {"time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])} if kind == "sdxl" else {}
            cond = Cond(torch.randn(1, 77, width), pooled, more)
            denoiser = UNetDenoiser(pipe.unet, DiscreteSchedule(), prediction)
            made[kind, prediction] = Made(kind, pipe, folder, denoiser, torch.randn(1, 4, 8, 8), cond)
        return made[kind, prediction]

    return build


@pytest.fixture(scope="session", params=["sd1", "sd2", "sdxl"])
def base(request, make) -> Made:
    """Each kind of base model."""
    return make(request.param)


def export(student: Path, to: str, out: Path, **options) -> Export:
    """Run an export to its end."""
    made = Export(student, to, out, **options)
    for _ in made.run():
        pass
    return made


@pytest.fixture(scope="session")
def kit():
    """The functions above: tests are no package, and nothing can import a conftest."""
    from types import SimpleNamespace

    return SimpleNamespace(**globals())


@pytest.fixture(scope="session")
def peft():
    """peft, without which diffusers loads no LoRA."""
    if importlib.util.find_spec("peft") is None:
        pytest.skip("needs peft, by which diffusers loads LoRA files: pip install peft")
