"""How a training begins: a fresh student, or another's, and everything that learns beside it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ...core.card import read_student
from ...core.features import Features, TeacherFeatures, VisionFeatures
from ...core.gradient_checkpointing import blocks
from ...core.student import Student, load_weights
from ..config import Config, ConfigError
from ..data.samples import Samples
from ..host import Host
from .pixel_backbone import load_vision
from .state import State, tap_names


def create(host: Host, config: Config) -> Student:
    """A fresh student, the same for the same seed; raises ConfigError for targets or blocks this model lacks."""
    try:
        if config.gradient_checkpointing:
            blocks(host.denoiser.backbone)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            student = Student(
                host.denoiser,
                config.rank,
                config.alpha or None,
                config.targets,
                config.prediction,
                config.start_timestep,
            )
    except (ValueError, re.error) as error:
        raise ConfigError(str(error)) from None
    if config.init_student:
        try:
            _go_on_from(Path(config.init_student), host, student)
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
        return State.create(student, config, sample, seen)
    except BaseException:
        student.release()
        raise


def _go_on_from(path: Path, host: Host, student: Student) -> None:
    """Fill a fresh student from another's file; raises ValueError if that is no student of this kind and model."""
    tensors, card = read_student(path)
    found = (card.base_hash, card.prediction, card.timesteps[0], card.rank)
    wanted = (host.base_hash, student.prediction, student.start_timestep, student.lora.rank if student.lora else 0)
    if found != wanted:
        raise ValueError(
            f"{path} has base model, prediction, start timestep and rank {found}, this training {wanted}: use the "
            "same settings, or start from the teacher"
        )
    load_weights(student, student.trained, tensors)
