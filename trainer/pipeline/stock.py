"""The schedulers that sample a student in a pipeline, set from its card: ours, or one of diffusers' own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.card import StudentCard
from ...core.schedule import PREDICTION_TYPES
from .host import ModelError
from .kinds import PipelineKind, flow_shift, kind_of, pixels_to_tokens, schedule_of

BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
DYNAMIC = (
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
)


def student_scheduler(card: StudentCard, pipe: Any) -> Any:
    """Our scheduler for a student on a pipeline; raises ModelError where the pipeline cannot sample it.

    For a student of guidance alone, which any scheduler samples, the pipeline's own.
    """
    from .scheduler import StudentScheduler

    kind = kind_of(pipe)
    if card.guidance_only:
        return own_scheduler(pipe)
    check_start(card, pipe, kind)
    config = pipe.scheduler.config
    settings: dict[str, Any] = {
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": PREDICTION_TYPES[card.prediction],
        "start_timestep": card.timesteps[0],
        "trained_steps": len(card.timesteps),
    }
    if kind.packs:
        settings["latent_size"] = tuple(side // pipe.vae_scale_factor for side in card.resolution[::-1])
    if kind.flows:
        shift = schedule_of(pipe, kind, card.resolution).sigma(torch.tensor(499.0))  # s / (1 + s) halfway
        settings |= {"use_flow_sigmas": True, "shift": float(shift / (1 - shift))}
        settings |= {name: config[name] for name in DYNAMIC if config.get(name) is not None}
    else:
        settings |= {name: config[name] for name in BETAS if config.get(name) is not None}
    return StudentScheduler(**settings)


def scheduler_of(card: StudentCard, pipe: Any) -> Any:
    """A scheduler of diffusers' own that samples a student as its card says.

    For a student of guidance alone it is another of the pipeline's own kind, with its settings.
    One step is Euler's, from pure noise to the picture. A student for several steps gets fresh noise between them:
    LCMScheduler without its boundary scalings, whose noise has the scale 1, not 0.998; for a flow FlowMatchEuler's
    `stochastic_sampling`. Where the pipeline leaves the timesteps to the scheduler (Stable Diffusion 3, Sana), give
    it `sigmas=[1.0, 0.5]` for two steps, and so on.

    Raises ModelError, with the reason, where none of them can.
    """
    kind = kind_of(pipe)
    if card.guidance_only:
        return own_scheduler(pipe)
    check_start(card, pipe, kind)
    if not kind.flows:
        return _discrete(card, pipe)
    if card.prediction != "flow":
        raise ModelError(
            f"this student predicts {card.prediction} on a flow, which no scheduler of diffusers reads: use "
            "turbodistill.use_student with its own"
        )
    return _flow(card, pipe)


def own_scheduler(pipe: Any) -> Any:
    """Another scheduler like the pipeline's: `from_config` would set what the pipeline itself has corrected back."""
    return copy.deepcopy(pipe.scheduler)


def _discrete(card: StudentCard, pipe: Any) -> Any:
    import diffusers

    name, settings = discrete_settings(card, pipe.scheduler.config, pipe.scheduler.alphas_cumprod)
    return getattr(diffusers, name)(**settings)


def discrete_settings(card: StudentCard, config: Mapping[str, Any], table: Tensor) -> tuple[str, dict[str, Any]]:
    """The class and the settings of diffusers' scheduler for a student of eps, v or x0.

    `config` is that of the base's scheduler, `table` its alphas_cumprod (T,).
    """
    steps = card.timesteps[0] + 1
    settings: dict[str, Any] = {
        "prediction_type": PREDICTION_TYPES[card.prediction],
        "timestep_spacing": "trailing",
        **{name: config[name] for name in BETAS if config.get(name) is not None},
    }
    if steps < len(table):  # noise enters earlier: the table ends there
        table = table.double().cpu()
        betas = 1 - table / torch.cat([table.new_ones(1), table[:-1]])
        settings |= {"num_train_timesteps": steps, "trained_betas": betas[:steps].tolist()}
        settings["rescale_betas_zero_snr"] = False
    if len(card.timesteps) == 1:
        return "EulerDiscreteScheduler", settings
    # Every timestep may begin a step, and c_skip is 0, c_out 1.
    return "LCMScheduler", settings | {"original_inference_steps": steps, "timestep_scaling": 1e6}


def _flow(card: StudentCard, pipe: Any) -> Any:
    import diffusers

    library: Any = diffusers
    kind, config = kind_of(pipe), pipe.scheduler.config
    settings: dict[str, Any] = {name: config[name] for name in DYNAMIC if config.get(name) is not None}
    if not config.get("use_dynamic_shifting"):
        settings["shift"] = flow_shift(config, pixels_to_tokens(pipe, kind, card.resolution))
    if len(card.timesteps) > 1:
        make = library.FlowMatchEulerDiscreteScheduler
        if "stochastic_sampling" not in inspect.signature(make.__init__).parameters:
            raise ModelError("this diffusers has no stochastic_sampling for flows: update it, or use one step")
        settings["stochastic_sampling"] = True
    # Without shift_terminal, which of one step makes 0 / 0.
    return library.FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, **settings)


def check_start(card: StudentCard, pipe: Any, kind: PipelineKind) -> None:
    """Raise ModelError for a student that begins where the pipeline cannot."""
    last = pipe.scheduler.config.num_train_timesteps - 1
    if kind.flows and card.timesteps[0] != last:
        raise ModelError(
            f"noise enters this student at timestep {card.timesteps[0]}, and a {type(pipe).__name__} gives it noise of "
            f"timestep {last}: sample it with turbodistill.sample"
        )
