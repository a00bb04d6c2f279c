"""A diffusers folder, read as it is stored: safetensors only, and no code that lies in it."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from ...core.header import DTYPES, Header
from ..run.memory import is_out_of_memory
from .errors import ModelError
from .header import read_header
from .weights import EIGHT_BITS, check_finite

INDEX = "model_index.json"
# The pipelines that make pictures of text, and nothing else.
PIPELINES = {
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline",
    "ChromaPipeline", "Lumina2Pipeline", "Lumina2Text2ImgPipeline", "ZImagePipeline", "QwenImagePipeline",
    "SanaPipeline",
}  # fmt: skip
OTHERS = (
    (r"Inpaint|Fill", "an inpainting model"),
    (r"Pix2Pix|Edit|Kontext", "a model that edits pictures"),
    (r"XLImg2Img", "the refiner of Stable Diffusion XL"),
    (r"ControlNet|Control", "a model with a ControlNet"),
    (r"Upscale", "an upscaler"),
    (r"Depth2Img", "a depth-to-image model"),
    (r"Video|Animate|Wan|LTX|Mochi|CogVideo|Cosmos", "a video model"),
)
BESIDE = ("safety_checker", "feature_extractor", "image_encoder", "image_processor")  # of a pipeline, and not needed
LIBRARIES = ("diffusers", "transformers")
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[^.]+))?\.safetensors")
SHARDS = re.compile(r"(?:diffusion_pytorch_model|model)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
PICKLED = re.compile(r".*\.(bin|ckpt|pt|pth|msgpack)")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises ModelError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error!s:.200}): get the folder again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no description of a model: get the folder again")
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline's `model_index.json`; raises ModelError for a folder that has none."""
    if not (folder / INDEX).is_file():
        single = sorted(p.name for p in folder.glob("*.safetensors"))
        hint = f"; it holds {', '.join(single[:3])}: give one of these files" if single else ""
        if (folder / "config.json").is_file():
            hint = ": it is a part of one; give the folder above it"
        raise ModelError(f"{folder} is no diffusers folder, it has no {INDEX}{hint or ': check the name'}")
    return read_json(folder / INDEX)


def text_to_image_index(folder: Path) -> dict[str, Any]:
    """The same, which also raises ModelError for a pipeline that makes no pictures of text, or not of text alone."""
    index = read_index(folder)
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        kind = next((what for pattern, what in OTHERS if re.search(pattern, name)), "another kind of model")
        raise ModelError(
            f"{folder} is a folder of {name:.80}, {kind}: give one that makes pictures of text alone, of "
            "Stable Diffusion 1.x, 2.x, XL or 3.x, Flux, Chroma, Lumina 2, Z-Image, Qwen-Image or Sana"
        )
    return index


def components_of(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """A pipeline's components that are stored, with library and class."""
    pairs = ((name, value) for name, value in index.items() if isinstance(value, list) and len(value) == 2)
    return {name: (str(v[0]), str(v[1])) for name, v in pairs if v[1] and name not in BESIDE}


def choose_variant(names: Iterable[str], variant: str | None) -> tuple[str | None, list[str]]:
    """Of the files of one component: which variant is read, and its files, without the shards of an index.

    The one that is asked for; else the plain files, else float16, else the only one. No files where there is none.
    """
    found: dict[str | None, list[str]] = {}
    for name in sorted(names):
        match = SHARDS.fullmatch(name) or WEIGHTS.fullmatch(name)
        if match and not SHARD.search(name):
            found.setdefault(match["variant"], []).append(name)
    wanted = [variant] if variant else [None, "fp16", *found]
    return next(((v, found[v]) for v in wanted if v in found), (variant, []))


def load_components(
    folder: Path, *, dtype: torch.dtype | None = None, variant: str | None = None, only: Collection[str] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The components of a diffusers folder by name, on the CPU, as stored or in `dtype`; and remarks.

    All of them, or `only` those. Raises ModelError for what is missing, broken, or needs code of its own.
    """
    index = text_to_image_index(folder)
    parts, remarks = {}, []
    for name, (library, kind) in components_of(index).items():
        if only is not None and name not in only:
            continue
        if library not in LIBRARIES:
            raise ModelError(f"{folder}: its {name} needs code of its own ({library:.80}), which is not run")
        made: Any = getattr(importlib.import_module(library), kind, None)
        if made is None:
            raise ModelError(
                f"{folder}: its {name} is a {kind:.80}, which the installed {library} does not know: update it"
            )
        if isinstance(made, type) and issubclass(made, torch.nn.Module):
            parts[name], remark = load_module(folder, name, made, dtype, variant)
            remarks += [remark] if remark else []
        else:
            parts[name] = _from_pretrained(folder, name, made)
    return parts, remarks


def _from_pretrained(folder: Path, name: str, made: Any, **options: Any) -> Any:
    """A component by its library's own loader, without the network; raises ModelError with the library's reason."""
    component = folder / name
    if not component.is_dir():
        raise ModelError(f"{folder} lacks its folder {name}: get it again")
    try:
        return made.from_pretrained(component, local_files_only=True, **options)
    except Exception as error:  # there is no end to what the libraries raise for odd files
        if isinstance(error, ImportError):
            raise
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise ModelError(
                f"{folder}: its {name} takes more memory than there is, or its config.json is damaged: close other "
                "programs, or get it again"
            ) from None
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder}: its {name} cannot be loaded ({reason:.300}): get it again") from None


def component_config(folder: Path, name: str) -> dict[str, Any]:
    """The configuration of one component; {} where there is none. Raises ModelError for one that cannot be read."""
    files = (folder / name / file for file in ("config.json", "scheduler_config.json"))
    return next((read_json(file) for file in files if file.is_file()), {})


def weight_files(folder: Path, name: str, variant: str | None = None) -> tuple[str | None, list[Path]]:
    """The variant and the files of one component's weights, of `choose_variant`'s choice; none where there are none.

    Raises ModelError for pickles alone, and for files that an index names and that are missing.
    """
    component = folder / name
    names = [p.name for p in component.iterdir()] if component.is_dir() else []
    chosen, files = choose_variant(names, variant)
    if files:
        return chosen, _whole(component, files[0])
    if pickled := next((n for n in names if PICKLED.fullmatch(n)), ""):
        raise ModelError(
            f"{folder}: its weights of {name} are pickles alone ({pickled:.80}), which can run code and are not read: "
            "load it in diffusers and save it with save_pretrained(..., safe_serialization=True)"
        )
    return chosen, []


def load_module(
    folder: Path, name: str, made: Any, dtype: torch.dtype | None, variant: str | None
) -> tuple[torch.nn.Module, str]:
    """A network, and a remark on the type of its weights where they have several."""
    chosen, files = weight_files(folder, name, variant)
    if not files:
        variants = f" in the variant {variant:.60}" if variant else ""
        raise ModelError(f"{folder}: its weights of {name} are missing{variants}: get it again")
    headers = [read_header(path) for path in files]
    types = _types(headers)
    most = DTYPES.get(types.most_common(1)[0][0]) if types else torch.float32
    stored = torch.bfloat16 if most is None or most in EIGHT_BITS else most
    import transformers

    word = "dtype" if _is(made, "transformers") and int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    options = {word: dtype or stored, "use_safetensors": True, "output_loading_info": True}
    module, info = _from_pretrained(folder, name, made, **options | ({"variant": chosen} if chosen else {}))
    for key, fault in (("missing_keys", "are missing"), ("unexpected_keys", "are of no layer that is known")):
        odd = sorted(n for n in map(str, info.get(key) or ()) if not n.endswith(("position_ids", "logit_scale")))
        if odd:
            raise ModelError(f"{folder}: {len(odd)} weights of {name} {fault}, such as {odd[0]:.200}: get it again")
    check_finite(folder, name, module)
    mixed = " and ".join(sorted(types)) if len(types) > 1 or most != stored else ""
    return module.eval(), f"{name} is stored in {mixed}: it is loaded in {stored}." if mixed and dtype is None else ""


def _is(made: Any, library: str) -> bool:
    return str(getattr(made, "__module__", "")).startswith(library)


def _types(headers: Iterable[Header]) -> Counter[str]:
    """How many numbers there are of each floating-point type."""
    found: Counter[str] = Counter()
    for header in headers:
        for name, kind in header.dtypes.items():
            if kind.startswith(("F", "BF")):
                found[kind] += max(1, torch.Size(header.shapes[name]).numel())
    return found


def _whole(component: Path, name: str) -> list[Path]:
    """The weight files of one component, all of which are there; raises ModelError for one that is not."""
    if not name.endswith(".json"):
        return [component / name]
    table = read_json(component / name).get("weight_map")
    files = sorted({str(f) for f in table.values()}) if isinstance(table, dict) else []
    if not files or any(Path(f).name != f for f in files):
        raise ModelError(f"{component / name} names no weight files: get it again")
    if absent := [f for f in files if not (component / f).is_file()]:
        raise ModelError(
            f"{component}: {len(absent)} of its {len(files)} weight files are missing, such as {absent[0]:.200}: get "
            "them"
        )
    return [component / f for f in files]
