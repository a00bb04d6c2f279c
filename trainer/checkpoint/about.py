"""What a file, a folder, or a cached model of the hub is, and what can be done with it here, in words."""

from __future__ import annotations

import os
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ...core.architecture import KNOWN, SD2, UNETS
from ...core.card import KEY, CardError, StudentCard
from ...core.families import by_files, recognise, suspect
from ...core.foreign_lora import ForeignLoRA, is_lora
from ...core.header import Header
from ...demo.files import HEADER
from ..run import state_file
from ..run.training import BEST, STATE
from . import hub, merged
from .errors import ModelError
from .folder import INDEX, component_config, components_of, text_to_image_index
from .header import read_header
from .identify import SD2_BIAS, Content, identify
from .load import architecture_of_config
from .single_file import pipeline_config, unsaid_prediction

USE_BASE = "Use: --model of `turbodistill distill`, and of `sample` with a student or a few-step LoRA (--student)"
USE_LORA = "Use: --student of `turbodistill sample`, and --init-student of `distill` with a model of its architecture."
MERGED = "The student is merged into this checkpoint: sample it as it is (--model, without a student)."
PREDICTIONS = {"eps": "eps (noise)", "v": "v", "flow": "a flow", "x0": "the picture"}
ENCODERS = {
    "clip_l": "CLIP L",
    "clip_g": "CLIP G",
    "open_clip_h": "OpenCLIP H",
    "open_clip_g": "OpenCLIP G",
    "t5xxl": "T5",
}


def in_words(source: str | Path) -> str:
    """What it is; raises ModelError, or CardError, for what does not exist, or cannot be read at all."""
    if os.path.isdir(source):
        folder = Path(source)
        return _run(folder) if (folder / STATE).is_file() else _folder(folder, folder.name)
    if os.path.exists(source) or (named := hub.named(str(source))) is None:
        return _file(Path(source))
    return _cached(*named)


def _cached(repository: str, file: str | None) -> str:
    """A model of the hub that is on this machine; nothing is downloaded to tell what it is."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ModelError(f"a model of the hub needs {error.name}: pip install 'turbodistill[demo]'") from None
    try:
        found = try_to_load_from_cache(repository, file or INDEX)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise ModelError(
            f"{repository}{'/' + file if file else ''} is neither a file or folder here nor in the hub's cache: check "
            "the name, or load it once (nothing is downloaded to tell what it is)"
        )
    return _file(Path(found)) if file else _folder(Path(found).parent, repository)


def _file(path: Path) -> str:
    header = read_header(path)
    if KEY in header.metadata:
        return _student(header)
    if state_file.KEY in header.metadata:
        return f"The state of a training, from which `turbodistill distill` goes on: --out {path.parent}"
    if is_lora(header.shapes) and not any(n.startswith("model.diffusion_model.") for n in header.shapes):
        return _lora(path)
    if HEADER in header.metadata:
        return (
            f"A model of TurboDistill's own kind, with its architecture in the header: {_stored(header)}.\n{USE_BASE}."
        )
    try:
        content = identify(header)
    except ModelError as error:
        return str(error)
    return _base(header, content)


def _run(folder: Path) -> str:
    """A run's folder, by its student."""
    if not (folder / BEST).is_file():
        return f"The folder of a training that has no student yet. {STATE}: {_file(folder / STATE)}"
    return f"The folder of a training; its student is {folder / BEST}:\n{_file(folder / BEST)}"


def _student(header: Header) -> str:
    """The card, and for a merged checkpoint that it is one."""
    words = StudentCard.from_metadata(header.metadata, header.path).in_words()
    return words + (f"\n{MERGED}" if merged.of_file(header) else "")


def _lora(path: Path) -> str:
    try:
        lora = ForeignLoRA(path)
    except CardError as error:
        return str(error)
    ranks = lora.ranks
    rank = "no rank" if not ranks else f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    lines = [
        f"A LoRA that others made, in {lora.format}'s names: {len(lora.pairs)} layers of {rank}"
        + (f", and {lora.texts} of text encoders, which are left out here" if lora.texts else "")
        + ".",
        f"For: {lora.architecture or 'an architecture that its names do not tell'}.",
    ]
    found = by_files([(path, path.name, path.absolute().parent.name)])
    if found:
        return "\n".join([*lines, f"Sampling: {found[1].in_words()}", USE_LORA])
    word = suspect(path.name)
    hint = f", though {word!r} is in it" if word else ""
    return "\n".join(
        [*lines, f"Its name is no known few-step family's{hint}: it is a style's, or its file was renamed."]
    )


def _base(header: Header, content: Content) -> str:
    prediction = content.prediction or _unsaid(header, content)
    zero = ", over levels that end without signal (zero-terminal SNR)" if content.zero_terminal else ""
    texts = [ENCODERS.get(kind, kind) for kind in content.texts.values()]
    held = ["the denoiser", *(["the autoencoder"] if content.vae else []), *texts]
    needed = pipeline_config(content.architecture)["text_encoders"]
    lacks = [] if content.vae else ["an autoencoder"]
    lacks += ["text encoders"] if len(texts) < len(needed) else []
    lines = [
        f"A checkpoint of {content.architecture}, which predicts {PREDICTIONS[prediction]}{zero}.",
        f"It holds {', '.join(held)}: {_stored(header)}.",
    ]
    if lacks:
        lines.append(
            f"It lacks {' and '.join(lacks)}: give them with --components, a diffusers folder such as "
            f"{pipeline_config(content.architecture)['like']}."
        )
    return "\n".join([*lines, *_use(header.path, header.path.name, content.architecture, prediction)])


def _unsaid(header: Header, content: Content) -> str:
    """The prediction that a file does not say: of Stable Diffusion 2 one of its weights tells."""
    name = content.prefix + SD2_BIAS
    if content.architecture != SD2 or name not in header.shapes:
        return unsaid_prediction(content, {})
    with safe_open(header.path, "pt") as file:
        return unsaid_prediction(content, {SD2_BIAS: file.get_tensor(name)})


def _use(path: Path, name: str, architecture: str, prediction: str) -> list[str]:
    """What a model can be used for: a few-step one is sampled by itself."""
    if path.is_file():
        found = by_files([(path, name)], architecture, prediction)
        recipe = found[1] if found else None
    else:
        recipe = recognise(name, architectures=[architecture], prediction=prediction)
    if recipe:
        return [f"Sampling: {recipe.in_words()}", "Use: --model of `turbodistill sample`, without a student."]
    word = suspect(name)
    return [USE_BASE + (f". {word!r} is in its name: it may be distilled already." if word else ".")]


def _stored(header: Header) -> str:
    """Precision and size of a file's weights."""
    counts: Counter[str] = Counter()
    for name, shape in header.shapes.items():
        counts[header.dtypes[name]] += prod(shape)
    words = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    kinds = " and ".join(words.get(kind, kind) for kind, count in counts.most_common() if count)
    return f"{sum(counts.values()) / 1e6:,.1f} million numbers in {kinds or 'no precision'}"


def _folder(folder: Path, name: str) -> str:
    """A diffusers pipeline's folder, by its descriptions alone."""
    index = text_to_image_index(folder)
    stored = components_of(index)
    part = "unet" if "unet" in stored else "transformer"
    scheduler = component_config(folder, "scheduler")
    architecture = _architecture(stored.get(part, ("", ""))[1], component_config(folder, part))
    v = scheduler.get("prediction_type") == "v_prediction"
    card = merged.of_folder(folder)
    prediction = card.prediction if card else "flow" if part == "transformer" else "v" if v else "eps"
    zero = (
        ", over levels that end without signal (zero-terminal SNR)" if scheduler.get("rescale_betas_zero_snr") else ""
    )
    lines = [
        f"A diffusers folder, {index['_class_name']}: {architecture or 'an architecture that is not known'}, which "
        f"predicts {PREDICTIONS[prediction]}{zero}.",
        f"It holds {', '.join(stored)}.",
    ]
    use = [card.in_words(), MERGED] if card else _use(folder, name, architecture, prediction)
    return "\n".join([*lines, *use])


def _architecture(kind: str, config: dict[str, Any]) -> str:
    """The architecture of a denoiser by its class and description; "" where they do not tell."""
    if kind == "UNet2DConditionModel":
        width = config.get("cross_attention_dim")
        return UNETS.get(width, "") if isinstance(width, int) else ""
    found = architecture_of_config(kind, config)
    return found if found in KNOWN else ""
