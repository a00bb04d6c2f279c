"""The page of a student on the Hugging Face hub: README.md with front matter, picture, usage, settings and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.architecture import SD1, SD2, SDXL
from ...core.card import StudentCard
from ...core.schedule import LAST_TIMESTEP
from ...trainer.checkpoint.single_file import pipeline_config
from ..export.tensors import ExportError

LORA_NAME = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a repository
ORDINARY = "KSampler at CFG 1, with sampler, scheduler and steps as for the base."
TAGS = {SD1: "stable-diffusion", SD2: "stable-diffusion", SDXL: "stable-diffusion-xl"}


@dataclass(frozen=True)
class Page:
    """What the page speaks of: `file` is the student's name in the repository, "" where that is a diffusers folder.

    `lora` says that there is a LoRA for diffusers, `whole` that the file holds text encoder and autoencoder as well.
    """

    repo: str
    card: StudentCard
    license: str
    base_model: str = ""
    file: str = ""
    lora: bool = False
    whole: bool = False
    grid: str = ""


def readme(page: Page) -> str:
    """README.md; raises ImportError where huggingface_hub is not installed."""
    from huggingface_hub import ModelCardData

    data: dict[str, Any] = {
        "license": page.license,
        **({"library_name": "diffusers"} if _diffusers(page) else {}),
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "turbodistill", *_tags(page)],
    }
    if page.base_model:
        data |= {"base_model": page.base_model}
        data |= {"base_model_relation": "adapter" if page.card.kind == "lora" else "finetune"}
    front = ModelCardData(**data).to_yaml()
    return f"---\n{front}\n---\n\n" + "\n\n".join(filter(None, _sections(page))) + "\n"


def _tags(page: Page) -> list[str]:
    kind = "guidance-distillation" if page.card.guidance_only else "one-step"
    lora = ["lora"] if page.card.kind == "lora" else []
    return [kind, "distillation", *lora, *filter(None, [TAGS.get(page.card.architecture)])]


def _sections(page: Page) -> list[str]:
    card = page.card
    width, height = card.resolution
    if card.guidance_only:
        makes = f"is sampled as its base, with {card.steps_in_words()}, at half the cost"
    else:
        steps = "one step" if len(card.timesteps) == 1 else card.steps_in_words()
        makes = f"makes a picture of {width} x {height} in {steps}"
    form = f"a LoRA of rank {card.rank}" if card.kind == "lora" else "a full model"
    return [
        f"# {page.repo.partition('/')[2]}",
        f"A student of `{page.base_model or card.base_model}` that {makes}: "
        f"{form}, distilled by {card.method} with TurboDistill. {card.guidance_in_words()}: sample at CFG 1, where "
        "negative prompts do nothing.",
        card.affixes_in_words(),
        f"![Teacher and student from the same noise]({page.grid})" if page.grid else "",
        "## How to use",
        _comfyui(page),
        _webui(page),
        _diffusers(page),
        _table("Settings", card.training),
        _table("Metrics", card.metrics),
        f"## Base model\n\n`{card.base_model}` ({card.architecture}), hash `{card.base_hash}`.",
    ]


def _stock(card: StudentCard) -> bool:
    """Whether a sampler that knows nothing of the student can make its picture."""
    return card.timesteps[0] == LAST_TIMESTEP and card.prediction == card.base_prediction


def _comfyui(page: Page) -> str:
    if not page.file:
        return ""
    ordinary = page.card.guidance_only
    if page.whole:
        words = f"Put `{page.file}` into `models/checkpoints` and load it as any checkpoint: "
        words += ORDINARY if ordinary else "KSampler with 1 step, CFG 1, sampler `euler`, scheduler `sgm_uniform`."
        return "### ComfyUI\n\n" + words
    folder = "loras" if page.card.kind == "lora" else "diffusion_models"
    words = (
        f"Put `{page.file}` into `models/{folder}`. With TurboDistill's nodes: *Load Student* on the base model, then "
    )
    words += ORDINARY if ordinary else "*One-Step Sample*."
    if ordinary and page.card.kind == "lora":
        words += " Without them: *Load LoRA* at strength 1 does the same."
    elif _stock(page.card) and page.card.kind == "lora":
        words += " Without them: *Load LoRA* at strength 1, KSampler with 1 step, CFG 1, sampler `euler`, scheduler "
        words += "`sgm_uniform`."
    return "### ComfyUI\n\n" + words


def _webui(page: Page) -> str:
    if not page.file:
        return ""
    name = page.file.removesuffix(".safetensors")
    if page.whole:
        words = f"Put `{page.file}` into `models/Stable-diffusion` and choose it."
    elif page.card.kind == "lora":
        words = f"Put `{page.file}` into `models/Lora` and write `<lora:{name}:1>` into the prompt."
    else:
        return ""
    if page.card.guidance_only:
        return "### AUTOMATIC1111, Forge\n\n" + words + " Sampler, schedule type and steps as for the base, CFG 1."
    words += " With TurboDistill: sampler *ADD 1-step*, 1 step, CFG 1."
    if _stock(page.card):
        words += " Without it: sampler Euler, schedule type SGM Uniform, 1 step, CFG 1."
    return "### AUTOMATIC1111, Forge\n\n" + words


def _diffusers(page: Page) -> str:
    """Lines of Python that run, for what diffusers loads."""
    card, unet = page.card, page.card.architecture in TAGS
    pipeline = pipeline_config(card.architecture)["pipeline"] if unet else "DiffusionPipeline"
    base = page.base_model or "the-base-model"
    if not page.file:
        load = [f'pipe = DiffusionPipeline.from_pretrained("{page.repo}", torch_dtype=torch.float16).to("cuda")']
    elif page.whole and unet:
        load = [
            f'path = hf_hub_download("{page.repo}", "{page.file}")',
            f'pipe = {pipeline}.from_single_file(path, torch_dtype=torch.float16).to("cuda")',
        ]
    elif page.lora:
        load = [
            f'pipe = {pipeline}.from_pretrained("{base}", torch_dtype=torch.float16).to("cuda")',
            f'pipe.load_lora_weights("{page.repo}", weight_name="{LORA_NAME}")',
        ]
    else:
        return ""
    kinds = ["DiffusionPipeline" if not page.file else pipeline]
    if unet and page.file and not card.guidance_only:  # a folder has the student's own
        reading = ', prediction_type="sample"' if card.prediction == "x0" else ""
        scheduler = "EulerDiscreteScheduler"
        load.append(
            f'pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config, timestep_spacing="trailing"{reading})'
        )
        kinds.append(scheduler)
    early = unet and page.file and card.timesteps[0] != LAST_TIMESTEP
    steps = len(card.timesteps) if card.guidance_only else 1
    start = f"timesteps=[{card.timesteps[0]}]" if early else f"num_inference_steps={steps}"
    lines = [
        "import torch",
        f"from diffusers import {', '.join(sorted(kinds))}",
        *(["from huggingface_hub import hf_hub_download"] if page.file and page.whole else []),
        "",
        *load,
        f'picture = pipe("a red fox", {start}, guidance_scale=0).images[0]',
    ]
    return "### diffusers\n\n```python\n" + "\n".join(lines) + "\n```"


def _table(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items()]
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(rows)


def _cell(value: Any) -> str:
    """A value as a table's cell, on one line."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())[:200]


def check_license(text: str) -> str:
    """The licence's name as the hub has it; raises ExportError for what cannot be one."""
    if not 1 <= len(text) <= 60 or not all(c.isascii() and (c.isalnum() or c in ".+-_") for c in text):
        raise ExportError(
            f"license is {text!r:.80}: give the hub's short name of one that the base model allows, such as "
            "creativeml-openrail-m, openrail++, apache-2.0 or other"
        )
    return text.lower()
