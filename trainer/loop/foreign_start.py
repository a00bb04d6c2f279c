"""A training that begins from a LoRA of another kind: a few-step one that others made, or a student of another base."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from ...core.architecture import KNOWN
from ...core.card import KEY, StudentCard, header, read_card
from ...core.families import SamplingRecipe, by_files
from ...core.foreign_lora import Changes, ForeignLoRA, is_lora, weight_of
from ...core.student import Student
from ..config import Config, ConfigError
from ..host import Host

log = logging.getLogger(__name__)
LOSSY = 0.1  # a relative error above it is a warning


@dataclass(frozen=True)
class Start:
    """A LoRA to begin from, and how it is sampled, where that is known; checked against the model and the settings."""

    lora: ForeignLoRA
    recipe: SamplingRecipe | None

    @property
    def strength(self) -> float:
        """The weight of the LoRA that it was made for."""
        return self.recipe.strength if self.recipe else 1.0


def foreign_start(host: Host, config: Config) -> Start | None:
    """The LoRA that `init_student` names; None where that is a student whose weights are taken as they are.

    A student of ours is a LoRA like others where it is of another base model (a fine-tune of the same kind), or of
    another rank. Raises ValueError for one that cannot be used, ConfigError for one that does not fit the settings.
    """
    metadata, shapes = header(config.init_student)
    if not is_lora(shapes) or (KEY in metadata and fits_as_it_is(read_card(config.init_student), host, config)):
        return None
    lora, denoiser = ForeignLoRA(config.init_student, of_ours=True), host.denoiser
    if lora.architecture != host.architecture and {lora.architecture, host.architecture} <= KNOWN:
        raise ConfigError(
            f"init_student: {config.init_student} is for {lora.architecture}, this model is {host.architecture}: give "
            "a LoRA of the same architecture"
        )
    lora.match(denoiser.backbone)
    found = by_files([(lora.path, lora.path.name)], host.architecture, denoiser.prediction)
    recipe = found[1] if found else None
    if recipe:
        _check_recipe(recipe, host, config)
    return Start(lora, recipe)


def fits_as_it_is(card: StudentCard, host: Host, config: Config) -> bool:
    """Whether a student of ours is of this model and of the settings' form, so that its weights fit as they are."""
    return (card.base_hash, card.rank) == (host.base_hash, config.rank)


def _check_recipe(recipe: SamplingRecipe, host: Host, config: Config) -> None:
    """Raise ConfigError for a LoRA whose output is read in another way than the student's will be."""
    if recipe.shift != 1000:
        raise ConfigError(
            f"init_student: {config.init_student} is of {recipe.name}, whose network is told other timesteps: use "
            "another, or start from the teacher"
        )
    wanted = "x0" if recipe.prediction == "x0" and host.denoiser.prediction != "x0" else "inherit"
    if config.prediction != wanted:
        raise ConfigError(
            f"init_student: {config.init_student} is of {recipe.name}, whose output is read "
            f"{'as x0' if wanted == 'x0' else 'as the model itself predicts'}: set prediction to {wanted}"
        )


@torch.no_grad()
def begin_from(start: Start, student: Student) -> dict[str, float]:
    """Bring the LoRA's changes into a fresh student; what its card says of it, the relative error of the changes.

    A full student takes them as they are. A LoRA takes the best approximation of its rank in each of its layers
    (singular values), where the rest of a larger rank stays as it began; what is in other layers is lost.
    """
    changes = start.lora.changes(student.backbone)
    error = (
        _merge(changes, student.backbone, start.strength) if student.lora is None else _fill(start, changes, student)
    )
    name = f"{start.recipe.name} ({start.lora.path.name})" if start.recipe else start.lora.path.name
    ranks = start.lora.ranks
    words = f"{len(changes.layers)} layers of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    form = "a full student" if student.lora is None else f"rank {student.lora.rank}"
    level = logging.WARNING if error > LOSSY else logging.INFO
    log.log(level, "the student begins from %s: %s in %s, relative error %.3g.", name, words, form, error)
    if error > LOSSY:
        log.warning("raise rank, or widen targets, to begin nearer to it.")
    if start.recipe and start.recipe.start != student.start_timestep:
        log.warning(
            "%s was made for start timestep %d: start_timestep is %d, so that the student begins further away.",
            *(name, start.recipe.start, student.start_timestep),
        )
    if not start.recipe and KEY not in start.lora.metadata:
        log.warning(
            "%s is of no few-step kind that is known: the student begins as the model with it, read as the model is. A "
            "LoRA of a style is better merged into the teacher.",
            start.lora.path.name,
        )
    for remark in start.lora.remarks(changes.unknown):
        log.warning(remark)
    return {"init_error": float(f"{error:.3g}")}


def _merge(changes: Changes, backbone: nn.Module, strength: float) -> float:
    weights = dict(backbone.named_parameters())
    for layer, change in changes.layers.items():
        weight = weights[weight_of(layer, weights)]
        weight.copy_(weight.float() + strength * change.delta().to(weight.device))
    return 0.0


def _fill(start: Start, changes: Changes, student: Student) -> float:
    """Set the branches of the student's LoRA; what is lost of all changes, relative, in the norm of their numbers."""
    assert student.lora is not None
    branches = dict(zip(student.lora.names, student.lora.each(), strict=True))
    lost = whole = 0.0
    for layer, change in changes.layers.items():
        branch = branches.get(layer)
        up, down, values = change.truncated(0 if branch is None else len(branch.down))
        squares = values.square()
        whole += float(squares.sum())
        lost += float(squares[up.shape[1] :].sum())
        if branch is None:
            continue
        factor = abs(start.strength / branch.scale) ** 0.5
        count = up.shape[1]
        branch.up.zero_()
        branch.up[:, :count] = (factor * up).reshape(-1, count, *branch.up.shape[2:]).to(branch.up)
        branch.down[:count] = (factor * down).reshape(count, *branch.down.shape[1:]).to(branch.down)
    return (lost / whole) ** 0.5 if whole else 0.0
