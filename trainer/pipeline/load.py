"""A model for plain Python and the command line: the embedded one, a checkpoint, or a loaded pipeline."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...core import clip_skip as skips
from ...core.card import StudentCard, header
from ...core.denoiser import Cond
from ...demo.files import HEADER, MODEL
from ..checkpoint import merged
from ..checkpoint.header import read_header
from ..checkpoint.load import Loaded, architecture_of_module, load_pipeline
from ..run.memory import is_out_of_memory
from .check import check_pipeline, check_trainable
from .denoisers import in_eval_mode
from .embedded import load_single_file
from .host import ModelError, PipelineHost, Size
from .kinds import channels_of, default_size, kind_of, prediction_of, schedule_of

log = logging.getLogger(__name__)


def load_model(
    source: Any = None,
    device: str | None = None,
    size: Size | None = None,
    *,
    clip_skip: int | None = None,
    **options: Any,
) -> PipelineHost:
    """What can be distilled: the embedded model, a checkpoint, or a pipeline of diffusers that is loaded.

    `source` is None for the embedded model, a .safetensors file, a diffusers folder, a model of the hub
    (`owner/name`, `owner/name/file.safetensors`), or a pipeline. A pipeline's weights are shared and left as they are,
    and where they are. `size` (width, height) is that of the pictures, by default the model's own. `clip_skip`, 1 to
    12, is the layer of CLIP that prompts' states are of, in AUTOMATIC1111's counting: 1 is the last, 2 the one before
    (`core.clip_skip`). `options` are those of `checkpoint.load.load_pipeline`: dtype, revision, token, variant,
    tokenizer, vae, components, prediction, with_student. Raises ModelError for anything else, and for a device that is
    not there, with the reason.
    """
    if unknown := sorted(set(options) - set(load_pipeline.__kwdefaults__ or ())):
        known = ", ".join([*(load_pipeline.__kwdefaults__ or ()), "clip_skip"])
        raise TypeError(f"load_model has no option {unknown[0]!r}: its options are {known}")
    _check_number(clip_skip)
    loaded = hasattr(source, "components")
    if options and (loaded or source is None):
        raise ModelError(f"{next(iter(options))} is an option for files, folders and the hub: leave it out")
    if isinstance(source, os.PathLike):
        source = Path(source)
    if not loaded and not isinstance(source, (str, Path, type(None))):
        raise ModelError(
            f"the model is a {type(source).__name__}: give a pipeline of diffusers with all its parts, or the name of "
            "a file, a folder or a model of the hub"
        )
    host = host_of(source, device, clip_skip=clip_skip) if loaded else _from_disk(source, device, clip_skip, options)
    return host if size is None else host.sized(*size)


def host_of(
    pipe: Any,
    device: str | None = None,
    name: str = "",
    student: StudentCard | None = None,
    clip_skip: int | None = None,
) -> PipelineHost:
    """A loaded pipeline as a host, called `name` if that is given; `student` is the card of one merged into it.

    Without a `clip_skip` it is the student's, or the model's own.
    Raises ModelError for one that cannot be distilled, and says why.
    """
    kind = kind_of(pipe)
    network = check_pipeline(pipe, kind)
    check_trainable(pipe, network, kind.network[0])
    if student is None and pipe.name_or_path:
        merged.check_teacher(pipe.name_or_path, merged.of_folder(Path(pipe.name_or_path)))
    there = next(network.parameters()).device
    if device is not None and torch.device(device).type != there.type:
        raise ModelError(f"the pipeline is on {there}, and stays there: call pipe.to({device!r}) and leave device out")
    size = default_size(pipe, kind)
    encoders = [part for key, part in pipe.components.items() if key.startswith("text_encoder") and part is not None]

    name = name or Path(pipe.name_or_path or "").name or type(pipe).__name__
    skip = _clip_skip(kind.clip_skip, clip_skip or (student.clip_skip if student else 0), encoders, name)
    skipped = skip - kind.clip_skip
    encode_prompts = functools.partial(kind.encode, skipped=skipped) if skipped else kind.encode

    def encode(prompts: Sequence[str], size: Size) -> Cond:
        with ExitStack() as stack:
            for encoder in encoders:
                stack.enter_context(in_eval_mode(encoder))
            return encode_prompts(pipe, prompts, size)

    make: Any = kind.denoiser
    denoiser = make(
        network, schedule_of(pipe, kind, size), student.prediction if student else prediction_of(pipe, kind)
    )
    return PipelineHost(
        denoiser,
        pipe.vae,
        encode,
        name,
        architecture_of_module(network),
        size,
        channels=channels_of(network, kind),
        factor=pipe.vae_scale_factor,
        multiple=kind.multiple,
        schedule=(lambda size: schedule_of(pipe, kind, size)) if kind.flows else None,
        pipe=pipe,
        student=student,
        clip_skip=skip,
        text_hash=f"clip skip {skip}" if skipped else "",
        encoders=encoders,
    )


def _clip_skip(own: int, asked: int, encoders: Sequence[Any], name: str) -> int:
    """What a clip skip, 0 for the model's `own`, comes to; raises ModelError for one that cannot be.

    As in Forge, one below the model's own changes nothing.
    """
    if asked and not own:
        raise ModelError(
            f"clip_skip is {asked}: the text encoder of {name} has no layer that could be chosen, as those of Stable "
            "Diffusion 1, 2 and XL have: leave it out"
        )
    skip = max(asked, own)
    layers = min((encoder.config.num_hidden_layers for encoder in encoders if skip > own), default=skip)
    if skip > layers:
        raise ModelError(f"clip_skip is {asked}: the text encoder of {name} has {layers} layers, give at most that")
    return skip


def _check_number(clip_skip: Any) -> None:
    """Raise ModelError for a clip skip that is none."""
    whole = isinstance(clip_skip, int) and not isinstance(clip_skip, bool)
    if clip_skip is not None and not (whole and 1 <= clip_skip <= skips.MOST):
        raise ModelError(
            f"clip_skip is {clip_skip!r:.80}: give 1, the last layer of CLIP, to {skips.MOST}, or leave it out"
        )


def _from_disk(
    source: str | Path | None, device: str | None, clip_skip: int | None, options: dict[str, Any]
) -> PipelineHost:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ModelError(
            f"device {device!r} cannot be used ({reason}): leave it out, or install a torch for it"
        ) from None
    source = MODEL if source is None else source
    try:
        if HEADER in header(source)[0]:
            if clip_skip is not None:
                raise ModelError(
                    f"clip_skip is {clip_skip}: the embedded model's text encoder has no layers of CLIP, leave it out"
                )
            return _embedded(Path(source), device, options.get("with_student", False))
        return _on_device(load_pipeline(source, **options), device, options.get("dtype"), clip_skip)
    except ModelError:
        raise
    except Exception as error:  # there is no end to what the libraries below raise for odd files
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{source!s:.300} cannot be loaded as a model ({type(error).__name__}: {error!s:.300}): get it again"
        ) from None


def _embedded(path: Path, device: str, with_student: bool) -> PipelineHost:
    """A single file with its architecture in the header."""
    card = merged.of_file(read_header(path))
    if not with_student:
        merged.check_teacher(path, card)
    host = load_single_file(path, device)
    host.student = card
    return host


def _on_device(loaded: Loaded, device: str, dtype: torch.dtype | None, clip_skip: int | None) -> PipelineHost:
    """A loaded checkpoint on its device, as a host; a CPU computes in float32 unless another type is asked for."""
    for part in loaded.pipe.components.values():
        if isinstance(part, nn.Module):
            part = part.float() if torch.device(device).type == "cpu" and dtype is None else part
            part.to(device).eval().requires_grad_(False)
    for remark in loaded.remarks:
        log.warning(remark)
    try:
        return host_of(loaded.pipe, name=loaded.name, student=loaded.student, clip_skip=clip_skip)
    except ModelError as error:
        raise ModelError(f"{loaded.name}: {error}") from None
