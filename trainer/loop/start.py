"""How a training begins: a fresh student, or another's, and everything that learns beside it."""

from __future__ import annotations

import torch

from ...core.card import StudentCard, read_card, read_student
from ...core.features import Features, TeacherFeatures, VisionFeatures
from ...core.gradient_checkpointing import blocks
from ...core.lora import matching_layers
from ...core.student import Student, check_copyable, load_weights
from ..config import Config, ConfigError
from ..data.samples import Samples
from ..host import Host
from .pixel_backbone import load_vision
from .state import State, tap_names


def check(host: Host, config: Config) -> None:
    """Raise ConfigError for targets, blocks or an `init_student` that do not fit this model; nothing is made for it."""
    try:
        if config.gradient_checkpointing:
            blocks(host.denoiser.backbone)
        if config.rank:
            matching_layers(host.denoiser.backbone, config.targets)
        else:
            check_copyable(host.denoiser.backbone)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not config.init_student:
        return
    denoiser = host.denoiser
    prediction = denoiser.prediction if config.prediction == "inherit" else config.prediction
    wanted = (host.base_hash, prediction, config.start_timestep, config.rank)
    try:
        card = read_card(config.init_student)
    except ValueError as error:
        raise ConfigError(f"init_student: {error}") from None
    found = (card.base_hash, card.prediction, card.timesteps[0], card.rank)
    if found != wanted:
        raise ConfigError(
            f"init_student: {config.init_student} has base model, prediction, start timestep and rank {found}, this "
            f"training {wanted}: use the same settings, or start from the teacher"
        )


def create(host: Host, config: Config) -> Student:
    """A fresh student, the same for the same seed; raises ConfigError as `check`, and for weights that do not fit."""
    check(host, config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        student = Student(
            host.denoiser, config.rank, config.alpha or None, config.targets, config.prediction, config.start_timestep
        )
    if config.init_student:
        try:
            load_weights(student, student.trained, read_student(config.init_student)[0])
        except ValueError as error:
            student.release()
            raise ConfigError(f"init_student: {error}") from None
    return student


def features(host: Host, config: Config) -> Features:
    """What the discriminator sees; raises ConfigError for taps or a vision transformer that cannot be had."""
    taps = tap_names(config)
    try:
        if not config.pixel_backbone:
            return TeacherFeatures(host.denoiser, taps)
        if host.decoder is None:
            raise ValueError(
                f"pixel_backbone is {config.pixel_backbone!r}, but in this host the discriminator sees latents only: "
                "leave it empty, or distil on the command line"
            )
        network, patch = load_vision(config.pixel_backbone)
        return VisionFeatures(network.to(host.denoiser.device), patch, host.decoder, config.pixel_size, taps)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def begin(host: Host, config: Config, sample: Samples, seen: Features | None = None) -> State:
    """A fresh state of a fresh student, judged by `seen` (by the settings' own features, if None).

    Whoever asks for it releases it.
    """
    seen = seen or features(host, config)
    student = create(host, config)
    try:
        state = State.create(student, config, sample, seen)
        if config.init_student:
            state.extra["earlier"] = trained_before(read_card(config.init_student))
        return state
    except BaseException as error:
        student.release()
        if isinstance(error, ValueError):
            raise ConfigError(str(error)) from error
        raise


def trained_before(card: StudentCard) -> dict[str, float]:
    """The updates and minutes of a student that is gone on from, which its own earlier ones are in."""
    told = {name: card.training.get(name) for name in ("updates", "minutes")}
    return {name: value for name, value in told.items() if isinstance(value, (int, float)) and 0 <= value < 1e12}
