"""A single file in an original layout, read into diffusers' and transformers' classes.

The conversion of a transformer's names is diffusers' own. Modules are made without memory and take the file's mapped
weights, so that nothing is read twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...core.architecture import SD2
from ...core.header import Header, Shapes
from ...core.naming import is_diffusers, layers_of, to_diffusers, to_single_file
from ...core.schedule import PREDICTION_TYPES
from . import shapes as config_from
from .errors import ModelError
from .header import read_header
from .identify import SD2_BIAS, TEXTS, VAES, Content, identify
from .layout import MADE, Piece, text_encoder_to_diffusers, vae_to_diffusers
from .weights import loaded

CONFIGS = Path(__file__).parent / "configs"
DENOISERS = {
    "UNet2DConditionModel": config_from.unet,
    "SD3Transformer2DModel": config_from.sd3,
    "FluxTransformer2DModel": config_from.flux,
    "ChromaTransformer2DModel": config_from.chroma,
    "Lumina2Transformer2DModel": config_from.lumina2,
    "ZImageTransformer2DModel": config_from.z_image,
    "QwenImageTransformer2DModel": config_from.qwen_image,
    "SanaTransformer2DModel": config_from.sana,
}
# Left by training or by other programs: none of it makes a picture.
HARMLESS = re.compile(r"model_ema\.|[^.]*$|denoiser\.|edm_|bundle_emb\.|embedding_manager\.|\S*\.logit_scale$")
MARKS = ("v_pred", "ztsnr", "edm_vpred.sigma_max")


@dataclass
class Parts:
    """What was read of a file: modules by diffusers' names of components, remarks, and its pipeline's configuration."""

    content: Content
    config: dict[str, Any]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    prediction: str = ""
    remarks: list[str] = field(default_factory=list)


@lru_cache
def _config_text(architecture: str) -> str:
    return (CONFIGS / f"{architecture}.json").read_text(encoding="utf-8")


def pipeline_config(architecture: str) -> dict[str, Any]:
    """The classes and settings of an architecture's pipeline, as far as the shapes of its weights do not tell them."""
    return json.loads(_config_text(architecture))


def scheduler_config(config: Mapping[str, Any], prediction: str, zero: bool) -> dict[str, Any]:
    """The scheduler of such a pipeline, as diffusers writes it; `zero` is of levels that end without signal."""
    kind, settings = config["scheduler"]
    changed = {} if prediction == "flow" else {"prediction_type": PREDICTION_TYPES[prediction]}
    if zero:
        changed |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {"_class_name": kind} | settings | changed


def load_parts(path: Path, dtype: torch.dtype | None = None) -> Parts:
    """The modules in a single file, on the CPU, as they are stored or in `dtype`.

    Raises ModelError for what is no base model, or not whole.
    """
    header = read_header(path)
    content = identify(header)
    parts = Parts(content, pipeline_config(content.architecture))
    used: set[str] = set()

    def add(name: str, prefix: str, load: Callable[[dict[str, Tensor]], tuple[nn.Module, str]]) -> None:
        weights = _tensors(file, header, prefix)
        used.update(prefix + n for n in weights)
        parts.modules[name], remark = load(weights)
        parts.remarks += [remark] if remark else []

    with safe_open(path, "pt") as file:
        name, kind, config = parts.config["denoiser"]
        add(name, content.prefix, lambda weights: _denoiser(parts, path, kind, config, weights, dtype))
        if content.vae is not None and parts.config["vae"] is not None:
            add("vae", content.vae, lambda weights: _vae(path, parts.config["vae"], weights, dtype))
        for at, text in content.texts.items():
            for name, (wanted, *more) in parts.config["text_encoders"].items():
                if wanted == text:
                    add(name, at, partial(_text_encoder, path, text, *more, dtype))
    if rest := sorted(n for n in header.shapes if n not in used and not HARMLESS.match(n)):
        parts.remarks.append(f"{len(rest)} weights in {path.name} are not used, such as {rest[0]:.100}.")
    return parts


def _tensors(file: Any, header: Header, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without it; they stay in the file until they are looked at.

    Without a prefix all but what lies beside a denoiser.
    """
    beside = () if prefix else (*VAES, *TEXTS, *MARKS, "model_ema.", "text_encoders.")
    found = (n for n in header.shapes if n.startswith(prefix) and not n.startswith(beside))
    return {n.removeprefix(prefix): file.get_tensor(n) for n in found}


def _shapes(weights: dict[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in weights.items()}


def unsaid_prediction(content: Content, network: dict[str, Tensor]) -> str:
    """The prediction type of a UNet that does not say it: of Stable Diffusion 2 its weights tell, others predict eps.

    The biases of one layer lie further apart in the 768-pixel models, which predict v; ComfyUI tells them by this, too.
    """
    bias = network.get(SD2_BIAS)
    if content.architecture != SD2 or bias is None:
        return "eps"
    return "v" if bias.float().std(correction=0) > 0.09 else "eps"


def config_of(
    path: Path, what: str, describe: Callable[[Shapes], dict[str, Any]], shapes: Shapes, config: dict[str, Any]
) -> dict[str, Any]:
    """A network's configuration, with what its shapes tell; raises ModelError where they are of none that is known."""
    try:
        return config | describe(shapes)
    except (KeyError, IndexError, ValueError, StopIteration, ZeroDivisionError) as error:
        raise ModelError(
            f"{path}: the {what} is not whole, or of a kind that is not known (it lacks {error!s:.200}): get it again"
        ) from None


def _converted(pieces: list[Piece], unknown: list[str], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in another layout; those of unknown names keep these, by which they are refused."""
    made = {piece.name: piece.make([weights[n] for n in piece.sources]) for piece in pieces}
    return made | {n: weights[n] for n in unknown}


def _denoiser(
    parts: Parts,
    path: Path,
    kind: str,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    dtype: torch.dtype | None,
) -> tuple[nn.Module, str]:
    """The denoiser in its original layout's names, without a prefix; its prediction type goes into `parts`."""
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    unet = kind == "UNet2DConditionModel"
    what = "UNet" if unet else "transformer"
    if unet and is_diffusers(weights):
        try:
            weights = {to: weights[name] for name, to in to_single_file(weights).items()}
        except (ValueError, KeyError) as error:
            raise ModelError(f"{path}: {error!s:.300}: it is of a kind that is not known") from None
    parts.prediction = parts.content.prediction or unsaid_prediction(parts.content, weights)
    config = config_of(path, what, DENOISERS[kind], _shapes(weights), config)
    made: Any = getattr(diffusers, kind, None)
    if made is None or kind not in SINGLE_FILE_LOADABLE_CLASSES:
        raise ModelError(f"{path}: the installed diffusers {diffusers.__version__} cannot load a {kind}: update it")
    mapping: Any = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]

    def convert(module: Any) -> dict[str, Tensor]:
        given = {n: w for n, w in weights.items() if not MADE.search(n)}
        if unet:
            names = to_diffusers(given, layers_of(given))
            return {names.get(n, n): w for n, w in given.items()}
        try:
            return mapping(checkpoint=given, config=dict(module.config))
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{path}: the {what} is not whole, or of a kind that is not known ({error!s:.200}): get it again"
            ) from None

    return loaded(
        path, what, lambda: made.from_config(config), convert, dtype, torch.float16 if unet else torch.bfloat16
    )


def _vae(
    path: Path, config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype | None
) -> tuple[nn.Module, str]:
    """An autoencoder in LDM's names, without a prefix."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = config_of(path, "autoencoder", config_from.vae, _shapes(weights), config)
    converted = _converted(*vae_to_diffusers(_shapes(weights)), weights)
    return loaded(path, "autoencoder", lambda: AutoencoderKL(**config), lambda _: converted, dtype, torch.float16)


def _text_encoder(
    path: Path, text: str, kind: str, config: dict[str, Any], dtype: torch.dtype | None, weights: dict[str, Tensor]
) -> tuple[nn.Module, str]:
    """A text encoder in transformers' or OpenCLIP's names, without a prefix."""
    import transformers

    library: Any = transformers
    made = getattr(library, kind)
    projected = kind != "CLIPTextModel"
    converted = _converted(*text_encoder_to_diffusers(text, _shapes(weights), projected), weights)
    describe = config_from.t5 if text == "t5xxl" else config_from.clip
    config = config_of(path, f"text encoder {text}", describe, _shapes(converted), config)
    if projected and text == "clip_l":
        # Stable Diffusion 3 takes CLIP-L's summary as it is.
        dtype_of_all = next(iter(converted.values())).dtype
        converted["text_projection.weight"] = torch.eye(config["hidden_size"], dtype=dtype_of_all)

    def convert(module: Any) -> dict[str, Tensor]:
        # Since transformers 5.6 a CLIPTextModel has no inner module of this name.
        inner = "" if projected or hasattr(module, "text_model") else "text_model."
        return {n.removeprefix(inner): w for n, w in converted.items()}

    return loaded(
        path, f"text encoder {text}", lambda: made(made.config_class(**config)), convert, dtype, torch.float16
    )


def load_vae(path: Path, known: dict[str, Any] | None, dtype: torch.dtype | None) -> nn.Module:
    """An autoencoder alone, from a file in LDM's names; raises ModelError for anything else."""
    header = read_header(path)
    prefix = next((p for p in (*VAES, "") if f"{p}decoder.conv_in.weight" in header.shapes), None)
    if prefix is None or known is None or f"{prefix}encoder.conv_in.weight" not in header.shapes:
        raise ModelError(
            f"vae {path} is no autoencoder that is known here for this model: give the one that it was trained with"
        )
    with safe_open(path, "pt") as file:
        return _vae(path, known, _tensors(file, header, prefix), dtype)[0]
