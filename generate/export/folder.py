"""A student as a diffusers folder: its denoiser, and everything else of the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.naming import is_single_file, layers_of, to_diffusers
from ...trainer.checkpoint.tokenizer import clip_vocabulary
from . import configs, layout
from .merge import TEXT_ENCODERS, Merge, entry, from_pieces
from .tensors import Entry, ExportError, Weights

CHANNELS = 4  # of latents that a model takes which makes pictures from text
FACTOR = 8  # pixels for each of a latent's, in Stable Diffusion
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data")
CARD = "turbodistill.json"


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


def plan(merge: Merge, dtype, tokenizer: Path | None) -> Folder:
    """Everything of the folder; raises ExportError for a base that has not all that a pipeline needs."""
    made = _from_folder(merge, dtype) if merge.base.folder else _from_file(merge, dtype, tokenizer)
    made.texts[CARD] = json.loads(merge.student.card.to_metadata()["turbodistill.card"])
    return made


def _from_folder(merge: Merge, dtype) -> Folder:
    base, made = merge.base, Folder()
    names = {key: name for name, key in ((n, base.key(n)) for n in base.network)}
    for part, weights in base.parts.items():
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        if part == base.component:
            entries = [
                entry(key, base.denoiser.shapes[key], dtype, lambda n=n: merge.weight(n)) for key, n in names.items()
            ]
        else:
            entries = from_pieces([layout.same(n, n, s) for n, s in weights.shapes.items()], weights, "", dtype)
        made.weights[f"{part}/{stem}.safetensors"] = entries
    listed = [n for n, value in base.index.items() if isinstance(value, list) and any(value)]
    for file in sorted(p for n in listed for p in (base.path / n).rglob("*") if p.is_file()):
        place = file.relative_to(base.path)
        if place.parts[0] in base.parts and (file.suffix == ".safetensors" or ".index." in file.name):
            continue
        if file.suffix not in PICKLED or not any(file.parent.glob("*.safetensors")):
            made.copies[place.as_posix()] = file
    made.texts["model_index.json"] = dict(base.index)
    _schedule(merge, made)
    return made


def _schedule(merge: Merge, made: Folder) -> None:
    """The student's scheduler in place of the base's: its default spacing of timesteps would begin at the wrong end."""
    place, own = "scheduler/scheduler_config.json", merge.base.config("scheduler", "scheduler_config.json")
    made.copies.pop(place, None)
    if merge.base.component == "unet":
        made.texts[place] = told = configs.scheduler(merge.student.card, own)
        made.texts["model_index.json"]["scheduler"] = ["diffusers", told["_class_name"]]
    else:
        # Qwen-Image's would divide nought by nought at a single step.
        made.texts[place] = own | ({"shift_terminal": None} if own.get("shift_terminal") else {})


def _from_file(merge: Merge, dtype, tokenizer: Path | None) -> Folder:
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
    side = max(card.resolution)
    names = to_diffusers(base.network, layers_of(base.network))
    made.weights["unet/diffusion_pytorch_model.safetensors"] = [
        entry(names[n], shape, dtype, lambda n=n: merge.weight(n)) for n, shape in base.network.items()
    ]
    made.texts["unet/config.json"] = configs.unet(base.network, base.architecture, side // FACTOR)
    weights, prefix = base.denoiser, "first_stage_model."
    shapes = _inside(weights, prefix)
    made.texts["vae/config.json"] = configs.vae(shapes, base.architecture, side)
    pieces = layout.vae_to_diffusers(shapes)
    made.weights["vae/diffusion_pytorch_model.safetensors"] = from_pieces(pieces, weights, "", dtype, prefix)
    for part, (prefix, kind) in encoders.items():
        projected = part == "text_encoder_2"
        shapes = _inside(weights, prefix)
        if kind == "clip":
            pieces = layout.clip_to_diffusers(shapes)
        else:
            pieces = layout.open_clip_to_diffusers(shapes, projected)
        if not pieces:
            raise ExportError(
                f"{base.path} holds no text encoder ({prefix}*): give a base that does, or use --to merged"
            )
        activation = "quick_gelu" if kind == "clip" else "gelu"
        found = {p.name: p.shape for p in pieces}
        made.texts[f"{part}/config.json"] = configs.text_encoder(found, activation, projected)
        made.weights[f"{part}/model.safetensors"] = from_pieces(pieces, weights, "", dtype, prefix)
    _tokenizers(made, encoders, tokenizer)
    told = configs.scheduler(card, {"rescale_betas_zero_snr": "ztsnr" in weights})
    made.texts["scheduler/scheduler_config.json"] = told
    projected = {part: part == "text_encoder_2" for part in encoders}
    made.texts["model_index.json"] = configs.index(base.architecture, projected, told["_class_name"])
    return made


def _inside(weights: Weights, prefix: str) -> dict[str, tuple[int, ...]]:
    return {n: weights.shapes[key] for n, key in weights.starting(prefix).items()}


def _tokenizers(made: Folder, encoders: Mapping[str, tuple[str, str]], tokenizer: Path | None) -> None:
    """CLIP's tokenizer for each text encoder, from a folder of files; OpenCLIP's pads with "!" (number 0)."""
    vocabulary, merges = _vocabulary(tokenizer)
    end = "<|endoftext|>"
    for part, (_, kind) in encoders.items():
        place = part.replace("text_encoder", "tokenizer")
        made.texts[f"{place}/vocab.json"] = vocabulary
        made.texts[f"{place}/merges.txt"] = merges
        made.texts[f"{place}/tokenizer_config.json"] = {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": "<|startoftext|>",
            "eos_token": end,
            "unk_token": end,
            "pad_token": end if kind == "clip" else "!",
            "model_max_length": 77,
            "do_lower_case": True,
        }


def _vocabulary(source: Path | None) -> tuple[dict[str, int], str]:
    """The numbers of CLIP's tokens and its merges, from `source`, or from where they are on this machine or the hub."""
    vocab, merges = clip_vocabulary(source)
    return vocab, "\n".join(["#version: 0.2", *merges, ""])
