"""A student as a diffusers folder: its denoiser, and everything else of the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...core.card import KEY
from ...core.naming import is_single_file, layers_of, to_diffusers
from ...trainer.checkpoint import shapes as config_from
from ...trainer.checkpoint.layout import Piece, same, text_encoder_to_diffusers, vae_to_diffusers
from ...trainer.checkpoint.merged import CARD, as_full
from ...trainer.checkpoint.single_file import config_of, pipeline_config, scheduler_config
from ...trainer.checkpoint.tokenizer import BEGIN, END, LENGTH, clip_vocabulary
from ...trainer.data.tensor_file import Entry
from . import configs
from .checkpoint import Checkpoint
from .merge import TEXT_ENCODERS, Merge, entry, from_pieces
from .tensors import ExportError, Weights

CHANNELS = 4  # of latents that a model takes which makes pictures from text
FACTOR = 8  # pixels for each of a latent's, in Stable Diffusion
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data")


@dataclass
class Folder:
    """What is written: files of weights, of JSON or text, and copies, by their paths in the folder."""

    weights: dict[str, list[Entry]] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Its size, but for the JSON."""
        written = sum(e.nbytes for entries in self.weights.values() for e in entries)
        return written + sum(path.stat().st_size for path in self.copies.values())


def plan(merge: Merge, dtype: torch.dtype, tokenizer: Path | None) -> Folder:
    """Everything of the folder; raises ExportError for a base that has not all that a pipeline needs."""
    made = _from_folder(merge, dtype) if merge.base.folder else _from_file(merge, dtype, tokenizer)
    made.texts[CARD] = json.loads(as_full(merge.student.card).to_metadata()[KEY])
    return made


def _from_folder(merge: Merge, dtype: torch.dtype) -> Folder:
    base, made = merge.base, Folder()
    names = {key: name for name, key in ((n, base.key(n)) for n in base.network)}
    for part, weights in base.parts.items():
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        if part == base.component:
            entries = [
                entry(key, base.denoiser.shapes[key], dtype, lambda n=n: merge.weight(n)) for key, n in names.items()
            ]
        else:
            entries = from_pieces([same(n, n, s) for n, s in weights.shapes.items()], weights, "", dtype)
        made.weights[f"{part}/{stem}.safetensors"] = entries
    listed = [n for n, value in base.index.items() if isinstance(value, list) and any(value)]
    for file in sorted(p for n in listed for p in (base.path / n).rglob("*") if p.is_file()):
        path = file.relative_to(base.path)
        if path.parts[0] in base.parts and (file.suffix == ".safetensors" or ".index." in file.name):
            continue
        if file.suffix not in PICKLED or not any(file.parent.glob("*.safetensors")):
            made.copies[path.as_posix()] = file
    made.texts["model_index.json"] = dict(base.index)
    _schedule(merge, made)
    return made


def _schedule(merge: Merge, made: Folder) -> None:
    """The student's scheduler in place of the base's: its default spacing of timesteps would begin at the wrong end."""
    path, own = "scheduler/scheduler_config.json", merge.base.config("scheduler")
    if merge.student.card.guidance_only:  # which is sampled as the base is
        return
    made.copies.pop(path, None)
    if merge.base.component == "unet":
        made.texts[path] = scheduler = configs.scheduler(merge.student.card, own)
        made.texts["model_index.json"]["scheduler"] = ["diffusers", scheduler["_class_name"]]
    else:
        # Qwen-Image's would divide nought by nought at a single step.
        made.texts[path] = own | ({"shift_terminal": None} if own.get("shift_terminal") else {})


def _from_file(merge: Merge, dtype: torch.dtype, tokenizer: Path | None) -> Folder:
    base, card, made = merge.base, merge.student.card, Folder()
    encoders = TEXT_ENCODERS.get(base.architecture)
    if not is_single_file(base.network) or encoders is None:
        raise ExportError(
            f"{base.path} is no Stable Diffusion 1, 2 or XL: its diffusers folder is made from a base that is a "
            "folder. Give that, or use --to peft"
        )
    if (channels := base.network["input_blocks.0.0.weight"][1]) != CHANNELS:
        raise ExportError(
            f"{base.path} takes {channels} channels, as inpainting models do: give the base as a diffusers folder"
        )
    config, side = pipeline_config(base.architecture), max(card.resolution)
    names = to_diffusers(base.network, layers_of(base.network))
    made.weights["unet/diffusion_pytorch_model.safetensors"] = [
        entry(names[n], shape, dtype, lambda n=n: merge.weight(n)) for n, shape in base.network.items()
    ]
    _, kind, known = config["denoiser"]
    own = config_of(base.path, "UNet", config_from.unet, base.network, known)
    made.texts["unet/config.json"] = {"_class_name": kind} | own | {"sample_size": side // FACTOR}
    _add_vae(made, base, config["vae"] | {"sample_size": side}, dtype)
    for part, prefix in encoders.items():
        _add_text_encoder(made, base, part, prefix, dtype)
    _add_tokenizers(made, config["padding"], tokenizer)
    zero = "ztsnr" in base.denoiser
    if card.guidance_only:
        scheduler = scheduler_config(config, card.base_prediction, zero)
    else:
        scheduler = configs.scheduler(card, {"rescale_betas_zero_snr": zero})
    made.texts["scheduler/scheduler_config.json"] = scheduler
    made.texts["model_index.json"] = configs.index(base.architecture, scheduler["_class_name"])
    return made


def _add_vae(made: Folder, base: Checkpoint, known: dict[str, Any], dtype: torch.dtype) -> None:
    weights, prefix = base.denoiser, "first_stage_model."
    shapes = _inside(weights, prefix)
    if not shapes:
        raise ExportError(f"{base.path} holds no autoencoder ({prefix}*): give a base that does")
    config = config_of(base.path, "autoencoder", config_from.vae, shapes, known)
    made.texts["vae/config.json"] = {"_class_name": "AutoencoderKL"} | config
    pieces = _known(base, "autoencoder", *vae_to_diffusers(shapes))
    made.weights["vae/diffusion_pytorch_model.safetensors"] = from_pieces(pieces, weights, "", dtype, prefix)


def _add_text_encoder(made: Folder, base: Checkpoint, part: str, prefix: str, dtype: torch.dtype) -> None:
    weights = base.denoiser
    if not (shapes := _inside(weights, prefix)):
        raise ExportError(f"{base.path} holds no text encoder ({prefix}*): give a base that does, or use --to merged")
    kind, name, known = pipeline_config(base.architecture)["text_encoders"][part]
    pieces = _known(base, "text encoder", *text_encoder_to_diffusers(kind, shapes, name != "CLIPTextModel"))
    config = config_of(base.path, f"text encoder {kind}", config_from.clip, {p.name: p.shape for p in pieces}, known)
    made.texts[f"{part}/config.json"] = {"architectures": [name], "model_type": "clip_text_model"} | config
    made.weights[f"{part}/model.safetensors"] = from_pieces(pieces, weights, "", dtype, prefix)


def _known(base: Checkpoint, what: str, pieces: list[Piece], unknown: list[str]) -> list[Piece]:
    """The pieces; raises ExportError for a base with names that are not known."""
    if unknown:
        raise ExportError(f"{base.path}: {unknown[0]} is no part of an {what} that is known: give another base")
    return pieces


def _inside(weights: Weights, prefix: str) -> dict[str, tuple[int, ...]]:
    return {n: weights.shapes[key] for n, key in weights.starting(prefix).items()}


def _add_tokenizers(made: Folder, padding: Mapping[str, str], source: Path | None) -> None:
    """CLIP's tokenizers, each with the token that it pads with; `source` is a file or folder of the vocabulary."""
    vocabulary, merges = clip_vocabulary(source)
    for name, token in padding.items():
        made.texts[f"{name}/vocab.json"] = vocabulary
        made.texts[f"{name}/merges.txt"] = "\n".join(["#version: 0.2", *merges, ""])
        made.texts[f"{name}/tokenizer_config.json"] = {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": BEGIN,
            "eos_token": END,
            "unk_token": END,
            "pad_token": token,
            "model_max_length": LENGTH,
            "do_lower_case": True,
        }
