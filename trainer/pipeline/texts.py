"""Prompts -> conditions, by each pipeline's own `encode_prompt`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.denoiser import Cond

Encode = Callable[..., Cond]  # (pipe, prompts, size), and layers of CLIP to leave out where it has any
FILL = 512  # text tokens to which a pipeline's texts of different lengths are filled up: its default's most


def stable_diffusion(pipe: Any, prompts: Sequence[str], size: tuple[int, int], skipped: int = 0) -> Cond:
    """Stable Diffusion 1 and 2: the text's states, `skipped` layers before those that the model was trained with."""
    with _without_last(skipped, pipe.text_encoder):
        return Cond(pipe.encode_prompt(list(prompts), pipe._execution_device, 1, False)[0])


@contextmanager
def _without_last(count: int, encoder: Any) -> Iterator[None]:
    """CLIP ends so many layers earlier within.

    The pipeline's own `clip_skip` fails with a transformers whose CLIPTextModel has no `text_model`.
    """
    if not count:
        yield
        return
    stack = getattr(encoder, "text_model", encoder).encoder
    whole = stack.layers
    try:
        stack.layers = whole[:-count]
        yield
    finally:
        stack.layers = whole


def stable_diffusion_xl(pipe: Any, prompts: Sequence[str], size: tuple[int, int], skipped: int = 0) -> Cond:
    """Stable Diffusion XL: states and pooled text of two encoders, and the picture's size (width, height).

    The states are those `skipped` layers before the ones that the model was trained with. The empty prompt is zeros
    where the pipeline says so (`force_zeros_for_empty_prompt`).
    """
    states, _, pooled, _ = pipe.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, clip_skip=skipped or None
    )
    width, height = size
    times = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=states.device)
    cond = Cond(states, pooled, {"time_ids": times.expand(len(states), -1).contiguous()})
    if not pipe.config.force_zeros_for_empty_prompt:
        return cond
    some = torch.tensor([bool(prompt) for prompt in prompts], device=states.device)
    return replace(cond, context=states * some[:, None, None], pooled=pooled * some[:, None])


def stable_diffusion_3(pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> Cond:
    """Stable Diffusion 3: states of three encoders one behind another, and pooled text of two."""
    states, _, pooled, _ = pipe.encode_prompt(list(prompts), None, None, do_classifier_free_guidance=False)
    return Cond(states, pooled)


def flux(pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> Cond:
    """FLUX.1: T5's states and CLIP's pooled text."""
    states, pooled, _ = pipe.encode_prompt(list(prompts), None)
    return Cond(states, pooled)


def chroma(pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> Cond:
    """Chroma: T5's states and their mask, which weighs attention and hides nothing."""
    states, _, mask, *_ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return Cond(states, extra={"mask": mask.bool()})


def lumina2(pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> Cond:
    """Lumina 2: Gemma's states and their mask; the empty prompt comes without the system prompt."""
    return _with_negatives(pipe, prompts, {})


def sana(pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> Cond:
    """Sana: Gemma's states and their mask; the empty prompt comes without the instruction before the others."""
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    return _with_negatives(pipe, prompts, {"complex_human_instruction": instruction})


def _with_negatives(pipe: Any, prompts: Sequence[str], options: dict[str, Any]) -> Cond:
    """Of a pipeline that returns states, mask, and both of the negative prompt, which is taken for the empty one."""
    texts = [prompt or "-" for prompt in prompts]
    states, mask, empty, empty_mask = pipe.encode_prompt(texts, not all(prompts), **options)
    some = torch.tensor([bool(prompt) for prompt in prompts], device=states.device)
    if empty is not None:
        states = torch.where(some[:, None, None], states, empty)
        mask = torch.where(some[:, None], mask, empty_mask)
    return masked(states, mask.bool())


def z_image(pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> Cond:
    """Z-Image: the states of its language model, filled up to one length, and their mask."""
    rows = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)[0]
    return _filled(rows)


def qwen_image(pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> Cond:
    """Qwen-Image: the states of its language model, filled up to one length, and their mask."""
    states, mask = pipe.encode_prompt(list(prompts), max_sequence_length=FILL)
    counts = [states.shape[1]] * len(states) if mask is None else mask.sum(1).tolist()
    return _filled([row[:count] for row, count in zip(states, counts, strict=True)])


def _filled(rows: Sequence[Tensor]) -> Cond:
    """States (T_k, D) of different lengths as one batch: they stand side by side on disk and in a training."""
    states = torch.stack([F.pad(row, (0, 0, 0, FILL - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=states.device)
    return Cond(states, extra={"mask": torch.arange(FILL, device=states.device) < lengths[:, None]})


def masked(states: Tensor, mask: Tensor) -> Cond:
    """States (B, T, D) with those that the network does not see at 0, by which `Cond.summary` leaves them out."""
    return Cond(states * mask[..., None], extra={"mask": mask})
