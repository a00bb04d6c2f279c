"""Whatever makes pictures in a few steps on a loaded model: a student, a LoRA of others, or the model by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..core.card import KEY, StudentCard, header, read_card
from ..core.families import SamplingRecipe, by_files, of_card, recognise, suspect
from ..core.fit import Base, check_fit
from ..core.foreign_lora import ForeignLoRA, is_lora
from ..core.precision import PRECISIONS
from ..core.student import load_student
from ..trainer.checkpoint.errors import ModelError
from ..trainer.pipeline.host import PipelineHost
from .recipe import FewStepModel

EXAMPLES = "such as lcm-lora-sdv1-5, sdxl_lightning_4step_lora, Hyper-SDXL-1step-lora, dmd2_sdxl_4step_lora"


@dataclass(frozen=True)
class FewStepFile:
    """A file to put on a model, by its header: a student with its card, or a LoRA of others; and how it is sampled."""

    path: Path
    recipe: SamplingRecipe
    card: StudentCard | None = None
    lora: ForeignLoRA | None = None

    @property
    def hints(self) -> list[str]:
        """What it is called: its name, then its folder's, since many files on the hub have the same name."""
        return _hints(self.path)


def _hints(path: Path) -> list[str]:
    return [path.name, path.absolute().parent.name]


def open_file(path: Path) -> FewStepFile:
    """A student, or a few-step LoRA that is told by its name; raises CardError for any other file, with what to do."""
    metadata, shapes = header(path)
    if KEY in metadata or not is_lora(shapes):
        card = read_card(path)
        return FewStepFile(path, replace(of_card(card), name=path.name), card)
    lora = ForeignLoRA(path)
    found = by_files([(path, *_hints(path))])
    if found is None:
        raise ModelError(f"{path} is a LoRA, but {_unknown(path.name)}")
    return FewStepFile(path, found[1], lora=lora)


def _unknown(name: str) -> str:
    """What is said of a name that is no known family's."""
    word = suspect(name)
    merge = f": {word!r} is in its name, beside words that are no known family's" if word else ""
    return (
        f"of no few-step family that is known by its name{merge}. Call the file as its maker does, {EXAMPLES}; how a "
        "merge or a style is sampled only its maker says"
    )


def check_steps(recipe: SamplingRecipe, steps: int | None) -> tuple[int, list[str]]:
    """How many steps are made (None: what it was made for), and remarks; raises ModelError for more than that."""
    if steps is None:
        return recipe.steps, []
    most = recipe.range[1]
    if steps > most:
        raise ModelError(
            f"steps is {steps}: {recipe.name} was made for {'1 step' if most == 1 else f'at most {most} steps'}, and "
            f"more make its pictures worse. Give {most}, or leave it out ({recipe.steps})"
        )
    return steps, recipe.remarks(steps)


def few_step_model(
    host: PipelineHost, file: FewStepFile | None, source: str | Path | None = None
) -> tuple[FewStepModel, list[str]]:
    """A model that is sampled in a few steps, and remarks: `host` with the file on it, or by itself.

    By itself it is told by the name of its file, which is `source`. Raises ModelError for a model that is of no known
    family, CardError for a file that does not fit.
    """
    if file is None:
        return _by_itself(host, source)
    if host.student:
        raise ModelError(
            f"{host.name} has a student of {host.student.base_model} merged into it: leave {file.path.name} out"
        )
    if file.card:
        student, card, warning = load_student(file.path, host.denoiser)
        recipe = replace(file.recipe, prediction="inherit")  # the student reads its output itself
        remarks = [*([warning] if warning else []), *check_fit(card, Base(clip_skip=host.clip_skip), file.path.name)]
        return FewStepModel(student, recipe, merging=student.merged, release=student.release), remarks
    assert file.lora is not None
    changes = file.lora.changes(host.denoiser.backbone)
    found = by_files([(file.path, *file.hints)], host.architecture, host.denoiser.prediction)
    if found is None:
        raise ModelError(
            f"{file.path} is of {file.recipe.name}, which is made for another kind of model: this is {host.name}, "
            f"{host.architecture}, and predicts {host.denoiser.prediction}"
        )
    recipe = found[1]
    merging = lambda: changes.merged(host.denoiser.backbone, recipe.strength)  # noqa: E731
    made = FewStepModel(host.denoiser, recipe, _uncond(host, recipe), merging)
    return made, file.lora.remarks(changes.unknown)


def _by_itself(host: PipelineHost, source: str | Path | None) -> tuple[FewStepModel, list[str]]:
    """The model alone, as a student that was merged into it says, or as its name does."""
    path = Path(source) if source else None
    names = [host.name, *([path.name, str(path)] if path else [])]
    recipe = None
    if host.student:
        recipe = replace(of_card(host.student), prediction=host.student.prediction)  # whatever the file says of itself
    elif path and path.is_file():
        found = by_files([(path, *names)], host.architecture, host.denoiser.prediction)
        recipe = found[1] if found else None
    else:
        recipe = recognise(*names, architectures=[host.architecture], prediction=host.denoiser.prediction)
    if recipe is None:
        raise ModelError(
            f"{host.name} by itself is {_unknown(host.name)}. If it is an ordinary model, give a student of it, or a "
            "few-step LoRA (--student FILE)"
        )
    return FewStepModel(host.denoiser, recipe, _uncond(host, recipe)), []


def _uncond(host: PipelineHost, recipe: SamplingRecipe):
    return host.encode_text([""]) if recipe.cfg != 1 else None


def cast(host: PipelineHost, model: FewStepModel, name: str) -> torch.dtype:
    """Bring a host's networks, and the model's, to float32, float16 or bfloat16, which is returned.

    `auto` leaves a CPU's and what is in half precision as it is; the rest becomes float16 where it predicts noise,
    and bfloat16 where it is a flow, which float16 has no room for.
    """
    backbone = host.denoiser.backbone
    stored = next(p.dtype for p in backbone.parameters() if p.is_floating_point())
    if name == "auto":
        if host.denoiser.device.type == "cpu" or stored != torch.float32:
            return stored
        name = "bfloat16" if host.denoiser.prediction == "flow" else "float16"
    parts = [backbone, model.denoiser.backbone, host.vae, *(host.pipe.components.values() if host.pipe else ())]
    for part in parts:
        if isinstance(part, nn.Module):
            part.to(PRECISIONS[name])
    return PRECISIONS[name]
