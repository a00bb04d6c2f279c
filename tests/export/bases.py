"""A small model of every kind of base that is read, as a single file and as a diffusers folder, and students of it.

Two widths are narrowed for them, or the files would take gigabytes: diffusers' conversions take Flux's, Chroma's and
Lumina 2's for granted, and Lumina 2 and Z-Image are told by theirs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from turbodistill.core import architecture
from turbodistill.core.card import StudentCard, fingerprint
from turbodistill.core.lora import LoRA
from turbodistill.core.student import FULL_PREFIX, Student, student_bytes
from turbodistill.trainer.pipeline.load import load_model

TRAINER = Path(__file__).parents[1] / "trainer"
NARROW = {3072: 128, 2304: 288, 768: 96}  # widths in diffusers' conversions -> those here
NARROWED = ("FluxTransformer2DModel", "ChromaTransformer2DModel", "Lumina2Transformer2DModel")
CAPTIONS = {256: architecture.Z_IMAGE, 288: architecture.LUMINA2}


def module_at(path: Path):
    """A module by its path: tests are no package."""
    name = f"turbodistill_{path.parent.name}_{path.stem}"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


files, layouts = module_at(TRAINER / "checkpoint/conftest.py"), module_at(TRAINER / "checkpoint/layouts.py")
tiny = module_at(TRAINER / "pipeline/tiny.py")


def _narrow(code: CodeType) -> CodeType:
    def changed(value: Any) -> Any:
        return _narrow(value) if isinstance(value, CodeType) else NARROW.get(value, value)

    return code.replace(co_consts=tuple(changed(c) if type(c) in (int, CodeType) else c for c in code.co_consts))


@contextmanager
def narrowed(monkeypatch) -> Iterator[None]:
    """The widths that are taken for granted are small within."""
    from diffusers.loaders import single_file_model

    with monkeypatch.context() as patch:
        for kind in NARROWED:
            known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[kind]
            made = known["checkpoint_mapping_fn"]
            function = FunctionType(_narrow(made.__code__), made.__globals__, made.__name__, made.__defaults__)
            patch.setitem(known, "checkpoint_mapping_fn", function)
        for width, name in CAPTIONS.items():
            patch.setitem(architecture.CAPTIONS, width, name)
        yield


@dataclass(frozen=True)
class UNet:
    """A Stable Diffusion of a kind of `conftest.UNETS`."""

    kind: str
    prediction: str = "eps"
    zero_terminal: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    def write(self, kit, place: Path) -> tuple[Path, Path, dict[str, Any]]:
        """The single file, the folder, and what `load_model` needs for the file."""
        folder = place / "base"
        pipe = kit.make_pipeline(self.kind, folder, self.prediction, kit.UNETS[self.kind] | self.more)
        if self.zero_terminal:
            config = pipe.scheduler.config
            zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            type(pipe.scheduler).from_config(config, **zero).save_pretrained(folder / "scheduler")
        at = {"sd1": "cond_stage_model.transformer.", "sd2": "cond_stage_model.model."}
        texts = {"text_encoder": at.get(self.kind, "conditioner.embedders.0.transformer.")}
        texts |= {"text_encoder_2": "conditioner.embedders.1.model."} if self.kind == "sdxl" else {}
        weights = files.unet_weights(pipe.unet) | files.vae_weights(pipe.vae)
        for name, prefix in texts.items():
            write = files.open_clip_weights if prefix.endswith(".model.") else files.clip_weights
            weights |= write(getattr(pipe, name), prefix)
        says = {"modelspec.prediction_type": "v"} if self.prediction == "v" else None
        marks = ("v_pred", "ztsnr") if self.zero_terminal else ()
        single = files.Made(weights).write(place / "base.safetensors", says, **{m: torch.zeros(0) for m in marks})
        return single, folder, {"tokenizer": folder / "tokenizer"}


@dataclass(frozen=True)
class Transformer:
    """A transformer: names and shapes of its single file, and what `tiny` makes of it as a folder."""

    shapes: Callable[[], dict[str, tuple[int, ...]]]
    name: str
    more: dict[str, Any] = field(default_factory=dict)
    channels: int = 16

    def write(self, _kit, place: Path) -> tuple[Path, Path, dict[str, Any]]:
        """The same. The file holds the transformer alone; the rest is the folder's, but for an autoencoder."""
        pipe = tiny.make(self.name, **self.more)
        pipe.save_pretrained(place / "base")
        weights = {n: (0.02 * torch.randn(s)).bfloat16() for n, s in self.shapes().items()}
        single = files.Made({files.WHOLE + n: v for n, v in weights.items()}).write(place / "base.safetensors")
        config, count = dict(pipe.vae.config), self.channels
        if "z_dim" in config:
            config |= {"z_dim": count, "latents_mean": [0.0] * count, "latents_std": [1.0] * count}
        else:
            config["latent_channels"] = count
        type(pipe.vae).from_config(config).save_pretrained(place / "parts/vae")
        return single, place / "base", {"components": place / "base", "vae": place / "parts/vae"}


def _sd3(**more) -> Callable[[], Any]:
    return lambda: layouts.sd3(text=32, pooled=32, **more)


def _qwen_image() -> dict[str, tuple[int, ...]]:
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        network = QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=2, attention_head_dim=128, num_attention_heads=1,
            joint_attention_dim=3584,
        )  # fmt: skip
    return {n: tuple(v.shape) for n, v in network.state_dict().items()}


SMALL = {"block_out_channels": (64,) * 3, "transformer_layers_per_block": (1,) * 3, "attention_head_dim": (1,) * 3}
BASES: dict[str, UNet | Transformer] = {
    "Stable Diffusion 1.x": UNet("sd1"),
    "Stable Diffusion 2.x (eps)": UNet("sd2"),
    "Stable Diffusion 2.x (v)": UNet("sd2", "v"),
    "Stable Diffusion XL": UNet("sdxl", more=SMALL),
    "Stable Diffusion XL (v, zero terminal SNR)": UNet("sdxl", "v", True, SMALL),
    "Stable Diffusion 3 medium": Transformer(_sd3(), "sd3"),
    "Stable Diffusion 3.5 medium": Transformer(
        _sd3(dual=1), "sd3", {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    ),
    "Stable Diffusion 3.5 large": Transformer(_sd3(depth=38, width=64), "sd3", {"layers": 38}),
    "FLUX.1 dev": Transformer(lambda: layouts.flux(width=128), "flux-dev"),
    "FLUX.1 schnell": Transformer(lambda: layouts.flux(width=128, guidance=False), "flux-schnell"),
    "Chroma": Transformer(lambda: layouts.chroma(width=128), "chroma"),
    "Lumina 2": Transformer(lambda: layouts.next_dit(288, 96, 32), "lumina2"),
    "Z-Image": Transformer(lambda: layouts.next_dit(256, 256, 32, head=128), "z-image"),
    "Qwen-Image": Transformer(_qwen_image, "qwen-image"),
    "Sana": Transformer(layouts.sana, "sana", channels=32),
}


# --- Their students ---


def card_of(name: str, host: Any, **about) -> StudentCard:
    backbone, prediction = host.denoiser.backbone, host.denoiser.prediction
    return StudentCard(
        **{
            "kind": "lora", "base_model": name, "base_hash": fingerprint(backbone), "architecture": host.architecture,
            "prediction": prediction, "base_prediction": prediction, "timesteps": (999,), "guidance": 4.0,
            "resolution": (64, 64), "rank": 2, "alpha": 2.0,
        }
        | about
    )  # fmt: skip


FULL = {"kind": "full", "rank": 0, "alpha": 0.0}


def students_in_python(host: Any, source: Path, place: Path) -> tuple[Path, Path]:
    """A LoRA and a full student that have learnt something, as a training writes them."""
    paths = place / "student.safetensors", place / "full.safetensors"
    for path, about in zip(paths, ({}, FULL), strict=True):
        student = Student(host.denoiser, 0 if about else 2, 2.0)
        with torch.no_grad():
            for weight in student.backbone.parameters() if about else [b.up for b in student.lora.each()]:
                weight += 0.05 * torch.randn_like(weight)
        path.write_bytes(student_bytes(student, card_of(source.name, host, **about)))
        student.release()
    return paths


def stand_in(source: Path) -> nn.Module:
    """A network with the names and shapes of a single file's weights, as ComfyUI's own have them."""
    root = nn.Module()
    for name, value in load_file(source).items():
        *above, leaf = name.removeprefix(files.WHOLE).split(".")
        at = root
        for part in above:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
        at.register_parameter(leaf, nn.Parameter(value, False))
        at.stride = at.padding = at.dilation = 1  # of convolutions
        at.groups = 1 if value.ndim < 4 or value.shape[1] > 1 else value.shape[0]
    for module in root.modules():
        if hasattr(module, "weight") and not hasattr(module, "bias"):
            module.bias = None
    return root


def students_in_comfyui(network: nn.Module, host: Any, source: Path, place: Path) -> tuple[Path, Path]:
    """The same of a network in the file's own names."""
    lora = LoRA(network, 2, 2.0)
    with torch.no_grad():
        for branch in lora.each():
            branch.up.normal_(std=0.05)
    paths = place / "student.safetensors", place / "full.safetensors"
    save_file(lora.export(network, "kohya"), paths[0], card_of(source.name, host).to_metadata())
    lora.remove()
    full = {FULL_PREFIX + n: (w + 0.05 * torch.randn_like(w)).half() for n, w in network.named_parameters()}
    save_file(full, paths[1], card_of(source.name, host, **FULL).to_metadata())
    return paths


def load(source: Path, options: dict[str, Any]) -> Any:
    return load_model(source, "cpu", **(options if source.is_file() else {}))
