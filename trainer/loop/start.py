"""How a training begins: a fresh student, or another's, and everything that learns beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...core.card import StudentCard, read_card, read_student
from ...core.decoder import Decoder
from ...core.eight_bits import can_pack
from ...core.features import TeacherFeatures
from ...core.gradient_checkpointing import blocks
from ...core.lora import matching_layers
from ...core.student import Student, check_copyable, load_weights
from ...core.vision import Features, VisionFeatures
from ..config import INT8, TINY, Config, ConfigError
from ..data.samples import Samples
from ..host import Host
from ..world import ALONE, World
from .foreign_start import Start, begin_from, fits_as_it_is, foreign_start
from .optimizer import check_optimizer
from .pixel_backbone import load_vision
from .state import State, tap_names

LEAST_CROP = 16  # pixels


def check(host: Host, config: Config) -> None:
    """Raise ConfigError for targets, blocks or an `init_student` that do not fit this model; nothing is made for it."""
    try:
        if config.gradient_checkpointing or config.compile:
            blocks(host.denoiser.backbone)
        if config.rank:
            matching_layers(host.denoiser.backbone, config.targets)
        else:
            check_copyable(host.denoiser.backbone)
        if config.base_precision == INT8 and not can_pack(host.denoiser.backbone):
            raise ValueError(
                "base_precision is 'int8', and none of the model's weights can be packed: they are small, or the "
                "program that has loaded the model packs it itself. Leave base_precision as loaded"
            )
        check_optimizer(config.optimizer)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not config.init_student:
        return
    if start := _foreign(host, config):
        if config.guidance_only and start.recipe and not start.recipe.ordinary:
            raise ConfigError(_makes_few_steps(config))
        return
    denoiser = host.denoiser
    prediction = denoiser.prediction if config.prediction == "inherit" else config.prediction
    wanted = (prediction, config.start_timestep)
    try:
        card = read_card(config.init_student)
    except ValueError as error:
        raise ConfigError(f"init_student: {error}") from None
    if not fits_as_it_is(card, host, config):
        raise ConfigError(
            f"init_student: {config.init_student} is a full copy of {card.base_model}, which would take its place: "
            "extract its LoRA (turbodistill export --to lora), or start from the teacher"
        )
    found = (card.prediction, card.timesteps[0])
    if found != wanted:
        raise ConfigError(
            f"init_student: {config.init_student} has prediction and start timestep {found}, this training {wanted}: "
            "use the same settings, or start from the teacher"
        )
    if config.guidance_only and not card.guidance_only:
        raise ConfigError(_makes_few_steps(config))


def _makes_few_steps(config: Config) -> str:
    """What is said of an `init_student` from which no student of guidance alone can begin."""
    return (
        f"init_student: {config.init_student} makes pictures in few steps, and one of guidance_only is sampled as its "
        "teacher is: start from the teacher, or from another of guidance_only"
    )


def _foreign(host: Host, config: Config) -> Start | None:
    """The LoRA of others to begin from, if `init_student` is one; raises ConfigError for one that cannot be used."""
    try:
        return foreign_start(host, config) if config.init_student else None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"init_student: {error}") from None


def create(host: Host, config: Config) -> Student:
    """A student that is the teacher yet, the same for the same seed; raises ConfigError as `check`."""
    check(host, config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        form = config.rank, config.alpha or None, config.targets, config.prediction, config.start_timestep
        steps = len(host.sampling.sigmas) - 1 if host.sampling else config.pair_steps
        return Student(host.denoiser, *form, steps if config.guidance_only else 0)


def init(student: Student, host: Host, config: Config) -> dict[str, float]:
    """Make a fresh student what `init_student` names; what of that its own card will say.

    Raises ConfigError for weights that do not fit.
    """
    try:
        if start := _foreign(host, config):
            return begin_from(start, student)
        load_weights(student, student.trained, read_student(config.init_student)[0])
        return trained_before(read_card(config.init_student))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"init_student: {error}") from None


def features(host: Host, config: Config) -> list[Features]:
    """What the discriminators see, none of guidance alone.

    Raises ConfigError for taps, a network or a decoder that cannot be had.
    """
    if config.guidance_only:
        return []
    taps = tap_names(config)
    try:
        if config.compares_pixels:
            decoder(host, config)
        if not config.pixel_backbone:
            return [TeacherFeatures(host.denoiser, taps)]
        if 0 < config.pixel_crop < LEAST_CROP:
            raise ValueError(
                f"pixel_crop is {config.pixel_crop}, in which nothing is seen: the least is {LEAST_CROP}, and 0 takes "
                "whole pictures"
            )
        own = decoder(host, config)
        eye = host.eye or load_vision(config.pixel_backbone)
        eye.network.to(host.denoiser.device)
        pixels = VisionFeatures(
            eye,
            own,
            config.pixel_size,
            taps if config.pixel_share == 1 else None,
            crop=config.pixel_crop,
            augment=config.augment,
            again=config.gradient_checkpointing,
        )
        return [pixels] if config.pixel_share == 1 else [TeacherFeatures(host.denoiser, taps), pixels]
    except ValueError as error:
        raise ConfigError(str(error)) from None


def decoder(host: Host, config: Config) -> Decoder:
    """What makes pictures in an update; raises ValueError, in words, where this host has none with gradients."""
    found = host.tiny_decoder if config.pixel_decoder == TINY else host.decoder
    found.check(host.latent_shape[0])
    return found


def begin(
    host: Host, config: Config, sample: Samples, seen: Sequence[Features] | None = None, world: World = ALONE
) -> State:
    """A fresh state of a student as it begins, judged by `seen` (by the settings' own features, if None).

    Whoever asks for it releases it.
    """
    seen = features(host, config) if seen is None else seen
    for each in seen:
        if isinstance(each, VisionFeatures):
            each.again = config.gradient_checkpointing  # a plan may have chosen it since
    student = create(host, config)
    try:
        earlier = init(student, host, config) if config.init_student else {}
        own = decoder(host, config) if config.compares_pixels else None
        state = State.create(student, config, sample, seen, world, own)
        if config.init_student:
            state.extra["earlier"] = earlier
        return state
    except BaseException as error:
        student.release()
        if isinstance(error, ValueError) and not isinstance(error, ConfigError):
            raise ConfigError(str(error)) from error
        raise


def trained_before(card: StudentCard) -> dict[str, float]:
    """The updates and minutes of a student that is gone on from, which its own earlier ones are in."""
    earlier = {name: card.training.get(name) for name in ("updates", "minutes")}
    return {name: value for name, value in earlier.items() if isinstance(value, (int, float)) and 0 <= value < 1e12}
