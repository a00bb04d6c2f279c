"""How one-step models made elsewhere are sampled: one table, and how a model is recognised.

A student of ours says it in its card; these do not. A model is told by its architecture and prediction type first,
then by whole words of its name, then by the number of steps in it. A name with a word that is nobody's is a merge or a
style: how that is sampled only its maker says, so nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .architecture import (
    FLUX2,
    FLUX_DEV,
    FLUX_SCHNELL,
    KNOWN,
    QWEN_IMAGE,
    SD1,
    SD2,
    SD3,
    SD35_LARGE,
    SDXL,
    UNETS,
    WAN,
    Z_IMAGE,
    architecture_of_file,
)
from .card import CardError, StudentCard, header, read_card, titles
from .sampling import sample_euler, sample_few_step, sigmas_at, sigmas_of
from .schedule import TIMESTEPS, FlowSchedule, expand, trailing_timesteps

MOST = 8  # steps
FEWEST_ORDINARY = 8  # steps in which an ordinary model makes a picture
MOST_LETTERS = 300  # of a name or a title


@dataclass(frozen=True)
class SamplingRecipe:
    """How a model is sampled in one or a few steps.

    `prediction` is how its output is read: as the base model's (`inherit`), eps, v, x0, flow, or
    `lcm`, which is eps with LCM's boundary scalings. `start` is the timestep of pure noise, `steps`
    the number of steps it was made for; `span` the fewest and the most that it works with, if it does with others.
    `renoise` adds fresh noise between steps; else Euler's step is taken. `shift` is NitroFusion's: the network is
    given the timestep t shift / 1000. `exact` says that pure noise is scaled by sigma itself, as our students learnt
    it, not by ComfyUI's sqrt(1 + sigma^2). `flow_shift` is that of a flow model's noise levels, where it is not the
    host's own; `cfg` the guidance scale, and `strength` the weight of its LoRA. `ordinary` says that it is sampled as
    models are that nobody has distilled, by any sampler. `clip_skip` is that of its prompts, 0 where nothing tells it.
    """

    name: str
    prediction: str = "inherit"
    start: int = 999
    steps: int = 1
    renoise: bool = True
    shift: int = 1000
    exact: bool = False
    span: tuple[int, int] | None = None
    flow_shift: float | None = None
    cfg: float = 1.0
    strength: float = 1.0
    ordinary: bool = False
    clip_skip: int = 0

    @property
    def range(self) -> tuple[int, int]:
        """The fewest and the most steps that it works with."""
        return self.span or (self.steps, self.steps)

    def steps_taken(self, steps: int) -> int:
        """The steps that are made where `steps` are asked for of whatever model: an ordinary one needs its own."""
        return self.steps if self.ordinary and steps < self.range[0] else steps

    def timesteps(self, steps: int, denoise: float = 1.0) -> list[int]:
        """The start of each of `steps` steps, falling.

        `denoise` 1 begins at `start`, less begins that much nearer to the picture (img2img). Raises
        ValueError for steps or a denoise that cannot be.
        """
        most = max(MOST, self.range[1])
        if not 1 <= steps <= most:
            raise ValueError(f"steps is {steps}: give 1 to {most}")
        if not 0 < denoise <= 1:
            raise ValueError(f"denoise is {denoise:g}: give more than 0, and at most 1")
        return trailing_timesteps(steps, max(round((self.start + 1) * denoise), steps) - 1)

    def sigmas(self, table: Tensor, timesteps: Sequence[int]) -> Tensor:
        """Sigmas (n + 1,) at timesteps, with the final 0: of a host's own rising table, but for the flow's shift."""
        flows = float(table[-1]) <= 1
        if flows and self.flow_shift:
            return sigmas_of(FlowSchedule(self.flow_shift), timesteps)
        return sigmas_at(table, timesteps)

    def sample(self, model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, **how: Any) -> Tensor:
        """Noisy x (B, ...) at sigmas[0], sigmas (n + 1,) -> latents (B, ...), by Euler's steps or with fresh noise.

        `how` is for the latter: `sample_few_step`'s schedule, which adds the noise, and where that comes from.
        """
        if not self.renoise:
            return sample_euler(model, x, sigmas, extra_args, callback)
        return sample_few_step(model, x, sigmas, extra_args, callback, **how)

    def remarks(self, steps: int, cfg: float = 1.0) -> list[str]:
        """What of these settings it was not made for, in words."""
        said = []
        low, high = self.range
        if not low <= steps <= high:
            said.append(f"steps is {steps}: {self.name} was made for {_count(low, high)}.")
        if cfg > max(self.cfg, 1):
            said.append(f"cfg is {cfg:g}: {self.name} was made for {self.cfg:g}, more burns the picture.")
        return said

    def network_timestep(self, timestep: Tensor) -> Tensor:
        """What the network is given for a timestep (B,): NitroFusion's is shifted, and whole (arXiv 2412.02030)."""
        return timestep if self.shift == 1000 else (timestep * self.shift / 1000).long()

    def in_words(self) -> str:
        """The sampling as a person reads it."""
        if self.ordinary:
            return (
                f"{self.name}: sampled as its base, with any sampler, made for {_count(self.steps, self.steps)}; cfg "
                f"{self.cfg:g}, negative prompts do nothing."
            )
        reading = {"inherit": "as the base model's", "lcm": "as LCM's"}.get(self.prediction, f"as {self.prediction}")
        between = "fresh noise" if self.renoise else "Euler's step"
        weight = "" if self.strength == 1 else f", its LoRA's weight {self.strength:g}"
        negatives = ", negative prompts do nothing" if self.cfg == 1 else ""
        return (
            f"{self.name}: made for {_count(self.steps, self.steps)}, noise enters at timestep {self.start}, "
            f"the output is read {reading}, between steps comes {between}; cfg {self.cfg:g}{weight}{negatives}."
        )


def _count(low: int, high: int) -> str:
    """A range of steps in words."""
    if high == TIMESTEPS:
        return f"{low} steps or more"
    return f"{low if low == high else f'{low} to {high}'} step{'s' * (high > 1)}"


def lcm_boundary(x: Tensor, x0: Tensor, timestep: Tensor) -> Tensor:
    """LCM's boundary scalings of x0 (B, ...) from x at timestep (B,): arXiv 2310.04378, section 4.2.

    sigma_data is 0.5, and timesteps count ten times.
    """
    t = expand(10 * timestep.to(x), x)
    return x0 * t / (t**2 + 0.25).sqrt() + x * 0.25 / (t**2 + 0.25)


@dataclass(frozen=True)
class Family:
    """A family of models: the words of its files' names, what it is made of, its sampling, and where that is said.

    `words` are patterns, each of which must be found in a name as whole words; `others` are the further words that may
    stand there, beside those of NEUTRAL. `versions` are the numbers of steps that it comes in, one of which the name
    must say; where there are none, one file serves the whole range. `special` is what differs for a number of steps.
    """

    words: tuple[str, ...]
    others: str
    architectures: tuple[str, ...]
    source: str
    sampling: SamplingRecipe
    versions: tuple[int, ...] = ()
    special: Mapping[int, SamplingRecipe] = field(default_factory=dict)

    def for_steps(self, steps: int | None) -> SamplingRecipe:
        """The sampling of its version for `steps`; None, and where there are no versions, is the family's own."""
        if steps is None or not self.versions:
            return self.sampling
        return replace(self.special.get(steps, self.sampling), steps=steps, name=self.sampling.name)

    def fits(self, architecture: str, prediction: str) -> bool:
        """Whether a model of this architecture and prediction type may be one of it; what is not known decides nothing.

        Each was distilled of a base that predicts eps, or a flow: nobody says how it is sampled on one that predicts v.
        """
        base = "eps" if self.architectures[0] in UNETS.values() else "flow"
        return (architecture not in KNOWN or architecture in self.architectures) and prediction in ("", base)

    def named(self, words: str) -> SamplingRecipe | None:
        """The sampling of a file whose name is these words; None if it is another's, or does not say which version."""
        rest = words
        for pattern in self.words:
            rest, found = re.subn(rf"\b(?:{pattern})\b", " ", rest, count=1)
            if not found:
                return None
        if not all(re.fullmatch(f"{NEUTRAL}|{self.others}", word) for word in rest.split()):
            return None
        match = STEPS.search(words)
        steps = int(match[1]) if match else None
        if self.versions:
            return self.for_steps(steps) if steps in self.versions else None
        low, high = self.sampling.range
        return self.sampling if steps is None or low <= steps <= high else None


STEPS = re.compile(r"\b(\d{1,3}) ?steps?\b")
# Words of a name that say nothing of the model: numbers, versions, formats, precisions.
NEUTRAL = (
    r"\d+|\d*steps?|v\d+\w?|\d+k|rank\d*|(?:fp|bf|int|nvfp|mxfp)\d+|e\dm\d\w*|scaled|mixed|q\d\w*|[kms]|\d?xs|gguf|"
    r"loras?|unet|transformer|diffusion|models?|pytorch|weights|adapter|comfy|ui|comfyui|converted|pruned|ema|official|x0"
)
ENDING = re.compile(r"\.(safetensors|sft|ckpt|pt|pth|bin|gguf)$", re.IGNORECASE)
# Between a small letter and a large one, and before the capital of a word: DreamShaperXLTurbo.
HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])")
# Letters of which some are in the name of every family.
MARKS = re.compile(r"turbo|nitro|nf2|lightning|hyper|lcm|tcd|pcm|flash|sdxs|schnell|klein|dmd2|lightx2v", re.IGNORECASE)
# Words that few-step models and their merges bear.
SUSPECT = re.compile(
    r"\b(turbo(?! distill)|lightning|hyper|lcm|dmd2?|tcd|pcm|schnell|sdxs|flash|lightx2v|nitro\w*|klein(?!.* base))\b"
)

HF, ARXIV = "https://huggingface.co/", "https://arxiv.org/abs/"
HYPER_SD = r"hyper ?sd ?(?:xl|15|1 5|v1 5)?"
EULER: dict[str, Any] = {"renoise": False}


def _family(
    name: str,
    words: str | tuple[str, ...],
    others: str,
    architectures: tuple[str, ...],
    source: str,
    versions: tuple[int, ...] = (),
    special: Mapping[int, SamplingRecipe] | None = None,
    **sampling: Any,
) -> Family:
    words = (words,) if isinstance(words, str) else words
    return Family(words, others, architectures, source, SamplingRecipe(name, **sampling), versions, special or {})


# fmt: off
FAMILIES: dict[str, Family] = {
    family.sampling.name: family
    for family in (
        # Adversarial distillation.
        _family("SD-Turbo, SDXL-Turbo", r"(?:sd|sdxl|sd xl|sd ?2 ?1) turbo", "", (SD2, SDXL),
                ARXIV + "2311.17042", span=(1, 4)),
        _family("SD3.5 Large Turbo", r"(?:sd|stable diffusion) ?3 5 large turbo", "", (SD35_LARGE,),
                HF + "stabilityai/stable-diffusion-3.5-large-turbo", steps=4, flow_shift=3.0, **EULER),
        _family("NitroFusion Vibrant", (r"nitro ?sd|nitro ?fusion", "vibrant"), "sdxl", (SDXL,),
                HF + "ChenDY/NitroFusion", shift=500, span=(1, 4)),
        _family("NitroFusion Realism", (r"nitro ?sd|nitro ?fusion", "realism"), "sdxl", (SDXL,),
                HF + "ChenDY/NitroFusion", shift=250, span=(1, 4)),
        _family("NitroFusion2", r"nitro ?fusion ?2|nf2", "z|image", (Z_IMAGE,),
                HF + "ChenDY/NitroFusion2", flow_shift=3.0),
        _family("Nitro-1-SD", r"nitro 1 sd|(?:sd|stable diffusion) ?2 1 nitro", "amd", (SD2,),
                "https://github.com/AMD-AIG-AIMA/AMD-Diffusion-Distillation"),
        _family("FLUX.1-Turbo-Alpha", r"flux ?1?(?: dev)? turbo alpha", "alimama|creative", (FLUX_DEV,),
                HF + "alimama-creative/FLUX.1-Turbo-Alpha", steps=8, **EULER),
        _family("FLUX.1 schnell", r"flux ?1? schnell", "", (FLUX_SCHNELL,),
                HF + "black-forest-labs/FLUX.1-schnell", steps=4, span=(1, 4), flow_shift=1.0, **EULER),
        # The shift of a picture of a million pixels: ln of it is 2.29 there, 2.03 at a quarter of that.
        _family("FLUX.2 klein", r"flux ?2 klein", "4b|9b", (FLUX2,),
                HF + "black-forest-labs/FLUX.2-klein-4B", steps=4, flow_shift=9.9, **EULER),
        _family("SDXL-Lightning", r"(?:sdxl|sd xl) lightning", "", (SDXL,),
                HF + "ByteDance/SDXL-Lightning", (1, 2, 4, 8), {1: SamplingRecipe("", "x0", **EULER)},
                steps=4, **EULER),
        # Trajectories and consistency. TCD's and Hyper-SD's unified LoRA may be given some fresh noise as well (eta).
        _family("Hyper-SD unified LoRA", (HYPER_SD, "1 ?steps?", "lora"), "unified", (SD1, SDXL),
                HF + "ByteDance/Hyper-SD", span=(1, 8)),
        _family("Hyper-SD CFG", (HYPER_SD, "cfg"), "", (SD1, SDXL),
                HF + "ByteDance/Hyper-SD", (8,), steps=8, cfg=5.0, **EULER),
        _family("Hyper-SD", HYPER_SD, "", (SD1, SDXL),
                HF + "ByteDance/Hyper-SD", (1, 2, 4, 8), {1: SamplingRecipe("", start=800)}, steps=4, **EULER),
        _family("Hyper-SD3", "hyper sd3", "cfg", (SD3,), HF + "ByteDance/Hyper-SD", (4, 8),
                {8: SamplingRecipe("", cfg=5.0, strength=0.125, flow_shift=3.0, **EULER)},
                steps=4, cfg=3.0, strength=0.125, flow_shift=3.0, **EULER),
        _family("Hyper-FLUX", r"hyper flux ?1?(?: dev)?", "", (FLUX_DEV,),
                HF + "ByteDance/Hyper-SD", (8,), steps=8, strength=0.125, **EULER),
        _family("LCM", r"lcm(?: dream ?shaper)?", "sd|sdxl|sd15|sdv1|ssd|1b", (SD1, SDXL),
                ARXIV + "2310.04378", prediction="lcm", steps=4, span=(2, 8)),
        _family("TCD", "tcd", "sd|sdxl|sd15|sdv1|sd21|base", (SD1, SD2, SDXL),
                HF + "h1t/TCD-SDXL-LoRA", steps=4, span=(2, 8), **EULER),
        _family("PCM", ("pcm", "smallcfg"), "sd15|sdxl", (SD1, SDXL),
                HF + "wangfuyun/PCM_Weights", (2, 4, 8), steps=4, **EULER),
        _family("PCM with CFG", ("pcm", "normalcfg"), "sd15|sdxl", (SD1, SDXL),
                HF + "wangfuyun/PCM_Weights", (4, 8), {8: SamplingRecipe("", cfg=4.5, **EULER)},
                steps=4, cfg=3.0, **EULER),
        _family("PCM like LCM", ("pcm", "lcmlike"), "sd15|sdxl", (SD1, SDXL),
                HF + "wangfuyun/PCM_Weights", prediction="lcm", steps=4, span=(2, 8)),
        _family("PCM for SD3, shift 1", ("pcm", "deterministic", "shift1"), "sd3", (SD3,),
                HF + "wangfuyun/PCM_Weights", (2, 4), steps=4, flow_shift=1.0, **EULER),
        _family("PCM for SD3, shift 3", ("pcm", "deterministic", "shift3"), "sd3", (SD3,),
                HF + "wangfuyun/PCM_Weights", (2, 4), steps=4, flow_shift=3.0, **EULER),
        _family("Qwen-Image-Lightning", r"qwen image(?: edit)?(?: \d{4})? lightning", "", (QWEN_IMAGE,),
                HF + "lightx2v/Qwen-Image-Lightning", (4, 8), steps=4, flow_shift=3.0, **EULER),
        _family("lightx2v", ("lightx2v", r"wan ?2 ?1|14b"), r"wan|wan21|[ti]2v|14b|cfg|step|distill|\d+p", (WAN,),
                HF + "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill", steps=4, flow_shift=5.0, **EULER),
        # Distribution matching.
        _family("DMD2", "dmd2", "sdxl", (SDXL,),
                HF + "tianweiy/DMD2", (1, 4), {1: SamplingRecipe("", start=399)}, steps=4),
        _family("SDXS", "sdxs", "dream|shaper|dreamshaper|anime", (SD1, SD2), ARXIV + "2403.16627"),
        _family("Flash SD, Flash SDXL", r"flash (?:sd|sd15|sdxl)", "", (SD1, SDXL),
                ARXIV + "2406.02347", prediction="lcm", steps=4),
        _family("Flash SD3", "flash sd3", "", (SD3,), HF + "jasperai/flash-sd3", steps=4),
        _family("Z-Image-Turbo", r"z ?image turbo", "turbo", (Z_IMAGE,),
                HF + "Tongyi-MAI/Z-Image-Turbo", steps=8, flow_shift=3.0, **EULER),
    )
}
# fmt: on


def words_of(name: str) -> str:
    """A file's name or title as words, in small letters, with one blank between them."""
    name = ENDING.sub("", re.split(r"[\\/]", name[:MOST_LETTERS])[-1])
    return " ".join(re.findall(r"[^\W_]+", HUMP.sub(" ", name.replace("LoRA", "lora")).lower()))


def recognise(*hints: str, architectures: Sequence[str] = (), prediction: str = "") -> SamplingRecipe | None:
    """The sampling of the first hint (a file's name, a title in its metadata) that names a family, or None.

    The family must fit every architecture and the prediction type that are known of the model.
    """
    for hint in hints:
        if not MARKS.search(hint[:MOST_LETTERS]):
            continue  # most LoRAs: of thousands a name is looked at in a moment
        words = words_of(hint)
        for family in FAMILIES.values():
            sampling = family.named(words)
            if sampling and all(family.fits(architecture, prediction) for architecture in architectures or [""]):
                return sampling
    return None


def suspect(name: str) -> str:
    """The word in a name by which it may be a few-step model, or a merge of one, that nobody here knows; "" if none."""
    match = SUSPECT.search(words_of(name))
    return match[1] if match else ""


def of_card(card: StudentCard) -> SamplingRecipe:
    """The sampling of a student of ours."""
    prediction = "inherit" if card.prediction == card.base_prediction else card.prediction
    name, start, steps = f"student of {card.base_model}", card.timesteps[0], len(card.timesteps)
    known: dict[str, Any] = {"exact": True, "clip_skip": card.clip_skip}
    if card.guidance_only:
        span = (min(steps, FEWEST_ORDINARY), TIMESTEPS)
        return SamplingRecipe(name, prediction, start, steps, span=span, ordinary=True, **known, **EULER)
    return SamplingRecipe(name, prediction, start, steps, span=(1, steps), **known)


def by_file(path: str | Path, *hints: str) -> SamplingRecipe | None:
    """How a weight file is sampled: by a student's card in it, else as the family that a hint or its title names."""
    found = by_files([(path, *hints)])
    return found[1] if found else None


def by_files(
    files: Sequence[Sequence[Any]], architecture: str = "", prediction: str = ""
) -> tuple[int, SamplingRecipe] | None:
    """Which of the files, each with hints, says how all of them together are sampled, and how; None where none does.

    A student's card counts before every name: a style's LoRA may be called after lightning. `architecture` and
    `prediction` are the loaded model's, as far as they are known: a family of other models is none.
    """
    for i, (path, *_) in enumerate(files):
        with suppress(CardError, OSError):
            return i, of_card(read_card(path))
    for i, (path, *hints) in enumerate(files):
        known = [architecture, architecture_of_file(header(path)[1])]
        if recipe := recognise(*hints, *titles(path), architectures=known, prediction=prediction):
            return i, recipe
    return None
