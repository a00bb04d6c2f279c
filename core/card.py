"""The student card: what a student file says of itself, in the header of its safetensors file.

So that no user has to know that one family wants trailing timesteps, another x0-prediction and a
third timestep 399: whoever loads the file reads the card and samples accordingly.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .clip_skip import OWN
from .header import opened, read_header
from .naming import is_diffusers, to_single_file
from .schedule import PREDICTION_TYPES

# A file stays mapped as long as its tensors live; on Windows the next training could not replace it.
COPIES = os.name == "nt"
KEY = "turbodistill.card"
VERSION = 1
KINDS = ("lora", "full")
FIELDS = {"str": ((str,), "text"), "int": ((int,), "a whole number"), "float": ((int, float), "a number")}
FIELDS |= {"bool": ((bool,), "true or false")}
FIELDS |= dict.fromkeys(("tuple[int, ...]", "tuple[int, int]"), ((list, tuple), "a list"))
TITLES = ("modelspec.title", "ss_output_name", "title")  # metadata that names a weight file
# What AUTOMATIC1111 tells the models by that a LoRA is for, besides those of Stable Diffusion 1.
KOHYA = {
    "stable-diffusion-v2": {"ss_v2": "True"},
    "stable-diffusion-xl-v1-base": {"ss_base_model_version": "sdxl_base_v1-0"},
}


class CardError(ValueError):
    """A file that is no student of ours, or cannot be read: the message says what to do."""


@dataclass(frozen=True)
class StudentCard:
    """How a student is sampled and where it comes from.

    `prediction` is how its backbone's output is read; `timesteps` the start of each step of the
    longest schedule that it was trained for (the first is where pure noise enters); `guidance` the
    teacher's scale that is baked in, away from the `negative_prompt`: sample with cfg 1. The prompts that it learnt
    had the prefix and suffix, which are typed when it is sampled, unless they are baked in. One of `guidance_only` is
    sampled as its base is, with any sampler and number of steps; its `timesteps` are those of the teacher's pictures.
    `clip_skip` is in AUTOMATIC1111's counting (`core.clip_skip`), 0 where it is not told.
    """

    kind: str
    base_model: str
    base_hash: str
    architecture: str
    prediction: str
    base_prediction: str
    timesteps: tuple[int, ...]
    guidance: float
    resolution: tuple[int, int]
    method: str = "ADD/LADD"
    rank: int = 0
    alpha: float = 0.0
    targets: str = "all"
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    sizes: str = ""
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    negative_prompt: str = ""
    prompt_prefix: str = ""
    prompt_suffix: str = ""
    bake_affixes: bool = False
    guidance_only: bool = False
    clip_skip: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        for f in fields(self):
            value, (wanted, words) = getattr(self, f.name), FIELDS.get(str(f.type), ((dict,), "an object"))
            if not isinstance(value, wanted) or (isinstance(value, bool) and wanted != (bool,)):
                raise CardError(f"card: {f.name} is {value!r:.80}, it must be {words}")
        if len(self.resolution) != 2 or not all(type(n) is int and n > 0 for n in self.resolution):
            raise CardError(f"card: resolution is {self.resolution!r:.80}, it must be width and height in pixels")
        if not all(type(t) is int for t in self.timesteps):
            raise CardError(f"card: timesteps are {self.timesteps!r:.80}, they must be whole numbers")
        if not (abs(self.guidance) < 1e6 and abs(self.alpha) < 1e6 and 0 <= self.rank <= 4096):
            raise CardError(
                f"card: guidance {self.guidance!s:.20}, rank {self.rank!s:.20} or alpha {self.alpha!s:.20} cannot be"
            )
        self._check_guidance()
        if not 0 <= self.clip_skip <= 99:
            raise CardError(f"card: clip_skip is {self.clip_skip!s:.20}, it must lie between 0 and 99")
        if self.kind not in KINDS:
            raise CardError(f"card: kind is {self.kind!r:.80}, known are {', '.join(KINDS)}")
        try:  # others read cards, too, and JSON has no NaN
            json.dumps([self.training, self.metrics], allow_nan=False)
        except ValueError as error:
            raise CardError(f"card: training or metrics hold what is no number ({error})") from None
        for value in (self.prediction, self.base_prediction):
            if value not in PREDICTION_TYPES:
                raise CardError(f"card: prediction is {value!r:.80}, known are {', '.join(PREDICTION_TYPES)}")
        if not self.timesteps or any(not 0 <= t < 1000 for t in self.timesteps):
            raise CardError(f"card: timesteps are {self.timesteps!r:.80}, they must lie between 0 and 999")

    def _check_guidance(self) -> None:
        """Raise CardError for an interval or a rescale that no guidance has."""
        if not (0 <= self.guidance_rescale <= 1 and 0 <= self.guidance_start < self.guidance_end <= 1):
            raise CardError(
                f"card: guidance_rescale {self.guidance_rescale!s:.20}, guidance_start {self.guidance_start!s:.20} or "
                f"guidance_end {self.guidance_end!s:.20} cannot be: they lie between 0 and 1, the start before the end"
            )

    def to_metadata(self) -> dict[str, str]:
        """The card as strings for a safetensors header, beside fields of ModelSpec and kohya that other tools read."""
        width, height = self.resolution
        return {
            KEY: json.dumps(asdict(self)),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": self.architecture + ("/lora" if self.kind == "lora" else ""),
            "modelspec.title": f"{self.base_model} {'guidance-only' if self.guidance_only else 'one-step'} student",
            "modelspec.implementation": "turbodistill",
            "modelspec.resolution": f"{width}x{height}",
            "modelspec.prediction_type": {"eps": "epsilon"}.get(self.prediction, self.prediction),
            "modelspec.usage_hint": f"{self.steps_in_words()}, cfg 1, first timestep {self.timesteps[0]}",
        } | KOHYA.get(self.architecture, {})

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, path: str | Path = "this file") -> StudentCard:
        """Raises CardError if there is no card, it is from a later version, or a field is missing or wrong."""
        if not metadata or KEY not in metadata:
            raise CardError(f"{path} holds no student card: it was not made by TurboDistill")
        try:
            values = dict(json.loads(metadata[KEY]))
        except (ValueError, TypeError, RecursionError) as error:
            raise CardError(
                f"{path}: the student card cannot be read ({error!s:.200}): make or download the file again"
            ) from None
        version = values.get("version")
        if type(version) is not int or version < 1:
            raise CardError(f"{path}: the student card has no version, so it is none: make or download the file again")
        if version > VERSION:
            raise CardError(f"{path}: card version {version!s:.20}, this TurboDistill knows up to {VERSION}: update it")
        known = {f.name for f in fields(cls)}
        try:
            values["timesteps"] = tuple(values["timesteps"])
            values["resolution"] = tuple(values["resolution"])
            return cls(**{k: v for k, v in values.items() if k in known})
        except CardError as error:
            raise CardError(f"{path}: {error}") from None
        except (KeyError, TypeError) as error:
            raise CardError(f"{path}: the student card lacks a field ({error!s:.100}): make the file again") from None

    def steps_in_words(self) -> str:
        """In how many steps it makes a picture."""
        count = f"{len(self.timesteps)} step{'s' * (len(self.timesteps) > 1)}"
        if self.guidance_only:
            return f"any sampler, {count} or as many as you like"
        return count if len(self.timesteps) == 1 else f"1 to {count}"

    def guidance_in_words(self) -> str:
        """What the student has of the teacher's guidance."""
        rescaled = f", rescaled by {self.guidance_rescale:g}" if self.guidance_rescale else ""
        if (self.guidance_start, self.guidance_end) != (0, 1):
            rescaled += f", from {self.guidance_start:.0%} to {self.guidance_end:.0%} of the sampling"
        away = f" away from {self.negative_prompt!r}" if self.negative_prompt else ""
        return f"The teacher's guidance of {self.guidance:g}{rescaled}{away} is baked in"

    def affixes_in_words(self) -> str:
        """What is typed before and behind every prompt, or is baked in; "" where there is nothing."""
        given = [(self.prompt_prefix, "before"), (self.prompt_suffix, "behind")]
        parts = " and ".join(f"{text!r} {where} them" for text, where in given if text)
        if not parts:
            return ""
        return f"Prompts: {parts} is baked in, leave it out." if self.bake_affixes else f"Prompts: write {parts}."

    def clip_skip_in_words(self) -> str:
        """The clip skip, where it is another than the base model's own."""
        return f"Clip skip: {self.clip_skip}." if self.clip_skip > OWN.get(self.architecture, 1) else ""

    def in_words(self) -> str:
        """The card as a person reads it."""
        form = f"LoRA of rank {self.rank} ({self.targets})" if self.kind == "lora" else "full model"
        width, height = self.resolution
        single = len(self.timesteps) == 1
        kind = "Guidance-only" if self.guidance_only else "One-step" if single else "Few-step"
        sampling = f"{'as its base, with ' * self.guidance_only}{self.steps_in_words()}"
        begin = f"  The noise enters at timestep {self.timesteps[0]}"
        begin += "." if single else f"; the longest schedule is {', '.join(map(str, self.timesteps))}."
        own = self.prediction == self.base_prediction
        lines = [
            f"{kind} student of {self.base_model}, a {form}, made by {self.method}.",
            f"Base model: {self.architecture}, hash {self.base_hash}.",
            f"Sampling: {sampling} at CFG 1. {self.guidance_in_words()}, so negative prompts do nothing.",
            *filter(None, [self.affixes_in_words(), self.clip_skip_in_words(), "" if self.guidance_only else begin]),
            f"  The network predicts {self.prediction}, "
            + ("as the base model does." if own else f"where the base model predicts {self.base_prediction}."),
            f"Resolution: {self.sizes or f'{width} x {height}'}.",
        ]
        for title, table in (("Training", self.training), ("Metrics", self.metrics)):
            if table:
                lines.append(f"{title}: " + ", ".join(f"{k} {v}" for k, v in table.items()) + ".")
        return "\n".join(lines)


def fingerprint(backbone: nn.Module | Mapping[str, Tensor]) -> str:
    """Hash of a base model's weights that no layout and no cast to float16 changes (16 hex digits).

    Sixteen weights, spread over the model in the order of their single-file names, as float16: a
    file in either precision, loaded in either, gives the same. A bfloat16 copy gives another.
    """
    weights = dict(backbone) if isinstance(backbone, Mapping) else dict(backbone.named_parameters())
    if is_diffusers(weights):
        table = to_single_file(weights)
        weights = {table[k]: v for k, v in weights.items()}
    names = sorted(n for n in weights if n.endswith("weight"))
    digest = hashlib.sha256()
    for i in range(16):
        name = names[i * len(names) // 16]
        values = weights[name].detach().flatten()[:64].half().cpu()
        digest.update(f"{name}{tuple(weights[name].shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def read_student(path: str | Path) -> tuple[dict[str, Tensor], StudentCard]:
    """A student file's tensors and card.

    Raises CardError for a file that is missing, truncated, no safetensors (a pickle), without a card, or with weights
    that are no numbers.
    """
    with opened(path, CardError) as file:
        card = StudentCard.from_metadata(file.metadata(), path)
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not iterable in safetensors 0.4.2
        broken = [k for k, v in tensors.items() if not (v if v.element_size() > 1 else v.float()).isfinite().all()]
        if broken:
            raise CardError(
                f"{path} is of no use: {len(broken)} of its {len(tensors)} weights are no numbers (NaN or infinity), "
                f"the first is {broken[0]}. Train it again with a lower learning rate, or get the file again"
            )
        return {k: v.clone() for k, v in tensors.items()} if COPIES else tensors, card


def read_card(path: str | Path) -> StudentCard:
    """The card alone, from the file's header; raises as `read` does."""
    with opened(path, CardError) as file:
        return StudentCard.from_metadata(file.metadata(), path)


def header(path: str | Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """A weight file's metadata, and the shapes of its tensors by name; none where it is no safetensors file.

    The tensors are not read.
    """
    try:
        found = read_header(path, CardError)
    except CardError:
        return {}, {}
    return found.metadata, found.shapes


def titles(path: str | Path) -> list[str]:
    """What a weight file's own metadata calls it; nothing where it is no safetensors file, or has none."""
    metadata = header(path)[0]
    return [metadata[key] for key in TITLES if metadata.get(key)]
