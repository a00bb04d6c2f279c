"""A checkpoint as people have it, loaded as a pipeline of diffusers: one door for files, folders and the hub."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...core import architecture as names
from ...core.architecture import architecture_of
from ...core.card import StudentCard
from ...core.schedule import PREDICTION_TYPES
from ..run.memory import is_out_of_memory
from . import hub, merged
from .errors import ModelError
from .folder import components_of, load_components, load_module, read_json, text_to_image_index
from .header import read_header
from .single_file import Parts, load_parts, load_vae, scheduler_config
from .tokenizer import TOKENS, clip_tokenizer, t5_tokenizer

TRANSFORMERS = {
    "ChromaTransformer2DModel": names.CHROMA,
    "Lumina2Transformer2DModel": names.LUMINA2,
    "ZImageTransformer2DModel": names.Z_IMAGE,
    "QwenImageTransformer2DModel": names.QWEN_IMAGE,
    "SanaTransformer2DModel": names.SANA,
}
INSTALL = "pip install 'turbodistill[demo]'"


@dataclass(frozen=True)
class Loaded:
    """A loaded pipeline, on the CPU, and what it is called; `remarks` are sentences to show.

    `student` is the card of one that is merged into it.
    """

    pipe: Any
    name: str
    remarks: tuple[str, ...] = ()
    student: StudentCard | None = None


@dataclass(frozen=True)
class _Options:
    """The options of `load_pipeline`."""

    dtype: torch.dtype | None
    token: str | bool | None
    variant: str | None
    tokenizer: str | Path | None
    vae: str | Path | None
    components: str | Path | None
    prediction: str | None


def load_pipeline(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    components: str | Path | None = None,
    prediction: str | None = None,
    with_student: bool = False,
) -> Loaded:
    """A checkpoint as a diffusers pipeline, on the CPU, in the types that it is stored in (or `dtype`).

    `source` is a .safetensors file, a diffusers folder, or on the hub `owner/name` or `owner/name/file.safetensors`;
    `revision`, `token` and `variant` are diffusers' own. What a single file lacks comes from `components`, a folder or
    model of the hub of the same architecture; its autoencoder from `vae`, a file or folder; CLIP's vocabulary from
    `tokenizer`. `prediction` (eps or v) overrides what the checkpoint says. A model that a student is merged into is no
    teacher, and loaded only `with_student`. Raises ModelError, in words, for everything that cannot be loaded.
    """
    if prediction not in (None, "eps", "v"):
        raise ModelError(f"prediction is {prediction!r:.80}: give eps or v")
    options = _Options(dtype, token, variant, tokenizer, vae, components, prediction)
    try:
        path = _resolve(source, options, revision)
        card = merged.of_folder(path) if path.is_dir() else merged.of_file(read_header(path))
        if not with_student:
            merged.check_teacher(source, card)
        loaded = _load_folder(path, str(source), options) if path.is_dir() else _load_file(path, options)
        return replace(loaded, student=card)
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(f"loading a model here needs {error.name or error}: {INSTALL}") from None
    except Exception as error:  # there is no end to what the libraries raise for odd files
        if is_out_of_memory(error) or isinstance(error, MemoryError):
            raise
        raise ModelError(
            f"{source!s:.300} cannot be loaded as a model ({type(error).__name__}: {error!s:.300}): get it again"
        ) from None


def _resolve(source: str | Path, options: _Options, revision: str | None = None, only: list[str] | None = None) -> Path:
    """The file or folder that a source names, on this machine or from the hub."""
    if os.path.exists(source):  # unlike Path's, false for what no file can be called
        return Path(source)
    named = hub.named(source.as_posix() if isinstance(source, Path) else source)
    if named is None:
        raise ModelError(f"model {source!s:.300} does not exist: check the name")
    return hub.fetch(*named, revision=revision, token=options.token, variant=options.variant, only=only)


def _load_folder(path: Path, name: str, options: _Options) -> Loaded:
    index = text_to_image_index(path)
    stored = components_of(index)
    part = next((n for n in ("unet", "transformer") if n in stored), "denoiser")
    if absent := [n for n in (part, "vae", "scheduler") if n not in stored]:
        raise ModelError(f"{path} has no {_listed(absent)}: get it again")
    parts, remarks = load_components(path, dtype=options.dtype, variant=options.variant)
    if part == "unet" and (channels := parts[part].config.in_channels) != 4:
        raise ModelError(f"{path} holds a UNet with {channels} channels in, where 4 are usual: give a base model")
    if options.prediction and part == "unet":
        scheduler, prediction_type = parts["scheduler"], PREDICTION_TYPES[options.prediction]
        parts["scheduler"] = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    own = {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, list)}
    pipe = _pipeline(str(index["_class_name"]), parts, own)
    return Loaded(pipe, Path(name).resolve().name if os.path.exists(name) else name, tuple(remarks))


def _load_file(path: Path, options: _Options) -> Loaded:
    parts = load_parts(path, options.dtype)
    config, modules = parts.config, dict[str, Any](parts.modules)
    if options.vae is not None:
        modules["vae"] = _vae_of(Path(options.vae), config, options.dtype)
    flows = parts.content.prediction == "flow"
    prediction = "flow" if flows else options.prediction or parts.prediction
    _complete(path, parts, modules, options)
    modules["scheduler"] = _scheduler(config, prediction, prediction == "v" and parts.content.zero_terminal)
    if sample := config.get(prediction, {}).get("sample_size"):
        modules["unet"].register_to_config(sample_size=sample)
    return Loaded(_pipeline(config["pipeline"], modules, config["options"]), path.stem, tuple(parts.remarks))


def _complete(path: Path, parts: Parts, modules: dict[str, Any], options: _Options) -> None:
    """Add what a file lacks: text encoders and autoencoder from `components`, tokenizers from there or this machine."""
    config, components = parts.config, options.components
    encoders: dict[str, Any] = config["text_encoders"]
    if config["pipeline"] == "StableDiffusion3Pipeline" and components is None and "text_encoder" in modules:
        modules.setdefault("text_encoder_3", None)  # T5, without which it works, too
    rest = [n for n in ("vae", *encoders) if n not in modules]
    if rest and components is None:
        raise ModelError(
            f"{path} holds no {_listed(rest)}: give as components a diffusers folder or model of the hub that has "
            f"them, such as {config['like']}" + (", or a file as vae" if rest == ["vae"] else "")
        )
    for encoder, (kind, *_) in encoders.items():
        name = encoder.replace("text_encoder", "tokenizer")
        if modules.get(encoder, parts) is None:
            modules[name] = None
        elif name in config["padding"] and (components is None or options.tokenizer is not None):
            rows = modules[encoder].config.vocab_size if encoder in modules else TOKENS
            modules[name] = clip_tokenizer(config["padding"][name], options.tokenizer, rows)
        elif components is None and kind == "t5xxl" and (found := t5_tokenizer()):
            modules[name] = found
        else:
            rest.append(name)
    if rest:
        _take(path, rest, parts, modules, options)


def _take(path: Path, rest: list[str], parts: Parts, modules: dict[str, Any], options: _Options) -> None:
    """Add these components from the folder or model of the hub that `components` names."""
    components, like = options.components, parts.config["like"]
    if components is None:
        raise ModelError(
            f"{path} needs the {_listed(rest)}: give as components a diffusers folder or model of the hub that has it, "
            f"such as {like}"
        )
    folder = _resolve(components, options, only=rest)
    if not folder.is_dir():
        raise ModelError(f"components {components!s:.300} is a file: give a diffusers folder or a model of the hub")
    stored = components_of(text_to_image_index(folder))
    if absent := [n for n in rest if n not in stored]:
        raise ModelError(f"components {components!s:.300} has no {_listed(absent)}: give another, such as {like}")
    _check_same(components, parts.config, stored)
    more, remarks = load_components(folder, dtype=options.dtype, variant=options.variant, only=rest)
    modules |= more
    parts.remarks += remarks


def _check_same(components: str | Path, config: Mapping[str, Any], stored: Mapping[str, tuple[str, str]]) -> None:
    """Raise ModelError for components of another architecture."""
    name, kind, _ = config["denoiser"]
    texts = sum(n.startswith("text_encoder") for n in stored)
    if stored.get(name, ("", ""))[1] != kind or texts != len(config["text_encoders"]):
        raise ModelError(f"components {components!s:.300} is of another architecture: give one like {config['like']}")


def _listed(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]


def _vae_of(path: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    """An autoencoder by itself: a file in LDM's names, or a diffusers folder of one."""
    import diffusers

    if not path.is_dir():
        return load_vae(path, config["vae"], dtype)
    folder = path if (path / "config.json").is_file() else path / "vae"
    kind = str(read_json(folder / "config.json").get("_class_name"))
    made = getattr(diffusers, kind, None) if kind.startswith("Autoencoder") else None
    if made is None:
        raise ModelError(f"vae {path} is a folder of {kind:.80}, no autoencoder: give another")
    return load_module(folder.parent, folder.name, made, dtype, None)[0]


def _scheduler(config: Mapping[str, Any], prediction: str, zero: bool) -> Any:
    import diffusers

    settings = scheduler_config(config, prediction, zero)
    return getattr(diffusers, settings.pop("_class_name"))(**settings)


def _pipeline(kind: str, parts: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The pipeline of these components; what it takes besides, and is not given, it does without."""
    import diffusers

    made = getattr(diffusers, kind, None)
    if made is None:
        raise ModelError(f"the installed diffusers {diffusers.__version__} has no {kind:.80}: update it")
    wanted = list(inspect.signature(made.__init__).parameters.values())[1:]
    absent = {p.name: None for p in wanted if p.default is p.empty}
    known = {p.name for p in wanted}
    return made(**absent | {k: v for k, v in (*options.items(), *parts.items()) if k in known})


def architecture_of_module(denoiser: Any) -> str:
    """A diffusers denoiser's architecture in ModelSpec's words; "unknown" where it is none of those that are known."""
    if found := architecture_of_config(type(denoiser).__name__, denoiser.config):
        return found
    return architecture_of({name: parameter.shape for name, parameter in denoiser.named_parameters()}) or "unknown"


def architecture_of_config(kind: str, config: Mapping[str, Any]) -> str:
    """The architecture of a transformer of diffusers by its class and description; "" of any other network."""
    if kind == "SD3Transformer2DModel":
        if config.get("dual_attention_layers"):
            return names.SD35_MEDIUM
        return names.SD35_LARGE if config.get("num_layers") == 38 else names.SD3
    if kind == "FluxTransformer2DModel":
        return names.FLUX_DEV if config.get("guidance_embeds") else names.FLUX_SCHNELL
    return TRANSFORMERS.get(kind, "")
