"""What a student's file says of the run that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.card import StudentCard
from ...core.schedule import trailing_timesteps
from ...core.student import student_bytes
from ..config import Config
from ..data.files import write_whole
from ..groups import OF_GUIDANCE, OF_PIXELS, OF_PROMPTS, OF_SIZES
from ..host import Host
from ..loop.state import State


def make_card(host: Host, state: State, metrics: dict[str, Any]) -> StudentCard:
    """The card of the student as it is now; its updates and minutes are those of every stage (`init_student`)."""
    config, student = state.config, state.student
    if state.update <= config.regression_updates and config.regression_weight > 0:  # the other losses are yet to come
        config = config.replace(adversarial_weight=0.0, distillation_weight=0.0)
    steps = student.guidance_steps or config.student_steps
    earlier = state.extra.get("earlier", {})
    return StudentCard(
        kind="lora" if student.lora is not None else "full",
        base_model=host.name,
        base_hash=host.base_hash,
        architecture=host.architecture,
        prediction=student.prediction,
        base_prediction=student.teacher.prediction,
        timesteps=tuple(trailing_timesteps(steps, student.start_timestep, student.schedule.timesteps)),
        guidance=config.guidance,
        resolution=host.resolution,
        rank=config.rank,
        alpha=student.lora.alpha if student.lora is not None else 0.0,
        targets=config.targets,
        method=_method(config),
        training={
            "updates": state.update + earlier.get("updates", 0),
            "minutes": round(state.spent / 60 + earlier.get("minutes", 0), 1),
            **_settings(config),
            **{name: earlier[name] for name in ("init_error",) if name in earlier},
        },
        metrics=metrics,
        guidance_only=config.guidance_only,
        clip_skip=host.clip_skip,
        **{name: getattr(config, name) for name in (*OF_SIZES, *OF_GUIDANCE, *OF_PROMPTS)},
    )


def _method(config: Config) -> str:
    """What the student was made by, in the papers' names."""
    if config.guidance_only:
        return "guidance distillation"
    names = []
    if config.adversarial_weight > 0:
        names += ["ADD"] if config.pixel_backbone else []
        names += ["LADD"] if not config.pixel_backbone or config.pixel_share < 1 else []
    if config.feature_weight > 0:
        names.append("feature matching")
    if config.distillation_weight > 0:
        names.append(
            {"matching": "distribution matching", "nfsd": "NFSD"}.get(config.distillation, "ADD's distillation")
        )
    return ", ".join(names) or "regression to the teacher's pictures"


def _settings(config: Config) -> dict[str, Any]:
    """The settings that a reader of the card asks for; of a loss that was not used, its weight 0 alone."""
    adversarial = ("positives", "adversarial") if config.adversarial_weight > 0 else ()
    distillation = ("distillation",) if config.distillation_weight > 0 else ()
    weights = ("adversarial_weight", "distillation_weight", "regression_weight")
    weights += ("feature_weight",) if config.feature_weight > 0 else ()
    few_steps = ("student_steps", *adversarial, *distillation, *weights)
    names = ("pairs", "batch_size", *(() if config.guidance_only else few_steps), "seed")
    settings = {n: getattr(config, n) for n in names}
    if config.pixel_backbone and config.decodes:  # of a folder its name alone: where it lay is nobody's business
        settings["pixel_backbone"] = (
            Path(config.pixel_backbone).name if Path(config.pixel_backbone).is_dir() else config.pixel_backbone
        )
    if config.decodes:
        usual = Config()
        names = [*OF_PIXELS[1:], "distillation_space"]
        settings |= {n: getattr(config, n) for n in names if getattr(config, n) != getattr(usual, n)}
    return settings | ({"init_student": Path(config.init_student).name} if config.init_student else {})


def write_student(host: Host, state: State, path: Path, metrics: dict[str, Any]) -> StudentCard:
    """Save the averaged student with its card; of several processes the first writes it."""
    card = make_card(host, state, metrics)
    if state.world.leads or state.world.shards:
        with state.averaged():
            content = student_bytes(state.student, card)
        if state.world.leads:
            write_whole(path, content)
    return card
