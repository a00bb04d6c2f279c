"""Tiny pipelines of each real class, and what is asked of all of them."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from turbodistill.core.sampling import seeded_noise
from turbodistill.trainer.config import Config
from turbodistill.trainer.pipeline.denoisers import pack, unpack
from turbodistill.trainer.pipeline.load import load_model
from turbodistill.trainer.run import run as runs

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PROMPTS = ("a red fox", "an owl")
SIZES = {"lumina2": (64, 64), "sana": (128, 128)}  # others 16 x 16
PACKS = ("flux-dev", "flux-schnell", "chroma", "qwen-image")
OPTIONS = {"sana": {"use_resolution_binning": False}, "qwen-image": {"guidance_scale": None, "true_cfg_scale": 1.0}}

_spec = importlib.util.spec_from_file_location("turbodistill_tiny_pipelines", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)
NAMES = list(tiny.MAKERS)


def pytest_generate_tests(metafunc):
    """A test that asks for `name` runs for a pipeline of each class."""
    if "name" in metafunc.fixturenames and not any("name" in str(m.args[0]) for m in _marks(metafunc)):
        metafunc.parametrize("name", NAMES)


def _marks(metafunc):
    return metafunc.definition.iter_markers("parametrize")


def size(name: str) -> tuple[int, int]:
    return SIZES.get(name, (16, 16))


def host(name: str, pipe: Any = None):
    return load_model(pipe or tiny.make(name), size=size(name))


def noise(model) -> Tensor:
    """Two rows for the model's network."""
    return seeded_noise([1, 2], model.latent_shape)


def latents_for(name: str, noise: Tensor) -> Tensor:
    """Noise as the pipeline itself takes it."""
    return pack(noise) if name in PACKS else noise.clone()


def unpacked(latents: Tensor) -> Tensor:
    """A pipeline's latents of 8 x 8 as its network's adapter takes them."""
    return unpack(latents, 8, 8) if latents.ndim == 3 else latents


def pictures(pipe: Any, name: str, noise: Tensor, steps: int = 1, output: str = "pt", **more) -> Tensor:
    """What the pipeline makes of PROMPTS and this noise, without guidance: pictures (2, 3, H, W), or its latents."""
    width, height = size(name)
    options = {"guidance_scale": 0.0, "width": width, "height": height, "output_type": output} | OPTIONS.get(name, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        latents = latents_for(name, noise)
        return pipe(list(PROMPTS), num_inference_steps=steps, latents=latents, **(options | more)).images


def settings(**changes) -> Config:
    """Two quick updates with every part of the default loss, and the default's feature taps."""
    small = {
        "rank": 2, "alpha": 4.0, "pairs": 6, "pair_steps": 2, "pair_sampler": "euler", "guidance": 2.0, "batch_size": 2,
        "updates": 2, "regression_updates": 0, "discriminator_warmup": 0, "adversarial_ramp": 0, "lr": 1e-2,
        "lr_decay": 0.0, "head_channels": 8, "precision": "float32", "preview_every": 0, "evaluate_every": 0,
        "student_steps": 4,
    }  # fmt: skip
    return Config(**(small | changes))


def distil(model, folder: Path, **changes) -> Path:
    """The file of a student of two updates."""
    *_, finished = runs.run(model, settings(**changes), folder, [*PROMPTS, "a green fish", "an elk"])
    return finished.path


def everything(pipe: Any) -> dict[str, Any]:
    """Whatever of a pipeline a host might change: weights with their place in memory, flags, hooks, scheduler."""
    found: dict[str, Any] = {"scheduler": pipe.scheduler, "config": dict(pipe.config), "own": set(pipe.__dict__)}
    for key, part in pipe.components.items():
        for name, module in part.named_modules() if isinstance(part, nn.Module) else ():
            own = module.__dict__
            hooks = [len(v) for k, v in own.items() if k.endswith(("_hooks", "_pre_hooks")) and isinstance(v, dict)]
            found[f"{key}.{name}"] = (module.training, hooks, "forward" in own, sorted(own), str(own.get("processor")))
        for name, value in part.named_parameters() if isinstance(part, nn.Module) else ():
            about = (value.dtype, value.device, value.requires_grad, value.grad is None, value.data_ptr())
            version = 0 if value.is_inference() else value._version
            found[f"{key}.{name}:"] = (*about, value.detach().float().sum().item(), version)
    return found


@pytest.fixture(scope="session")
def tiny_kit():
    """The functions above."""
    return SimpleNamespace(**globals())


@pytest.fixture(scope="session")
def students(tmp_path_factory):
    """`students(name, **settings)`: a student's file, its model, and the pipeline that both are of; made once."""
    made: dict[Any, Any] = {}

    def of(name: str, **changes):
        key = (name, *sorted(changes.items()))
        if key not in made:
            torch.manual_seed(0)
            model = host(name)
            made[key] = SimpleNamespace(path=distil(model, tmp_path_factory.mktemp(name), **changes), model=model)
            made[key].pipe = model.pipe
        return made[key]

    return of
