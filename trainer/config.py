"""Every setting of a distillation, with its default, bounds and help: the only place that has them.

The command line, the ComfyUI node and the WebUI tab are all made from the fields of `Config`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.losses import ADVERSARIAL, WEIGHTS
from ..core.sampling import TEACHER_SAMPLERS
from ..core.student import OUTPUTS


class ConfigError(ValueError):
    """A setting that cannot be: the message names it, its value, and what would do."""


def option(default: Any, help: str, group: str, choices=None, low: float | None = None, high: float | None = None):
    """A field of Config with what its front ends show."""
    about = {"help": help, "group": group, "choices": choices and tuple(choices), "low": low, "high": high}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Config:
    """Settings of one distillation; see each field's help."""

    # Student
    rank: int = option(64, "LoRA rank; 0 trains a full copy of the model", "student", low=0, high=512)
    alpha: float = option(0.0, "LoRA alpha; 0 takes the rank", "student", low=0)
    targets: str = option("all", "layers that get a LoRA: attention, transformer, all, or a pattern", "student")
    output: str = option("inherit", "how the student's output is read: as the teacher's, or as x0", "student", OUTPUTS)
    start: int = option(999, "timestep at which the student is given pure noise", "student", low=1, high=999)
    steps: int = option(1, "most steps that the student is trained for", "student", low=1, high=8)
    first_share: float = option(
        0.6, "share of training at the first step, where noise enters", "student", low=0, high=1
    )
    fresh_share: float = option(
        0.5,
        "share of pure noise that is fresh once the discriminator judges; the rest is the pairs' own",
        "student",
        low=0,
        high=1,
    )
    begin: str = option(
        "", "student file to go on from, of this model, rank and targets; empty begins at the teacher", "student"
    )
    # Data
    pairs: int = option(1024, "teacher pairs (noise, picture) to make from the prompts", "data", low=4)
    pair_steps: int = option(16, "sampling steps of the teacher for a pair", "data", low=1, high=1000)
    pair_sampler: str = option("dpmpp_2m", "sampler of the teacher for the pairs", "data", TEACHER_SAMPLERS)
    guidance: float = option(4.0, "the teacher's guidance scale in the pairs: it is baked in", "data", low=1, high=30)
    positives: str = option("teacher", "what the discriminator takes for real", "data", ("teacher", "real", "both"))
    real_share: float = option(0.5, "share of real pictures where positives are 'both'", "data", low=0, high=1)
    # Training
    updates: int = option(2000, "student updates", "training", low=1)
    minutes: float = option(
        0.0, "end after this many minutes of training at the latest; 0 is no limit", "training", low=0
    )
    batch: int = option(16, "samples in a batch", "training", low=1)
    accumulate: int = option(1, "batches whose gradients make one update", "training", low=1)
    lr: float = option(2e-4, "learning rate of the student", "training", low=0)
    lr_discriminator: float = option(5e-4, "learning rate of the discriminator", "training", low=0)
    warmup: int = option(200, "first updates with the regression alone", "training", low=0)
    lead: int = option(
        100,
        "last updates of the warm-up in which the discriminator learns already, before the student is told",
        "training",
        low=0,
    )
    ramp: int = option(
        200,
        "updates after the warm-up in which the weights of the adversarial and the matching loss rise to their full",
        "training",
        low=0,
    )
    decay: float = option(
        0.3, "share of the run, at its end, over which both learning rates fall to zero", "training", low=0, high=1
    )
    discriminator_updates: int = option(1, "discriminator updates per student update", "training", low=1, high=16)
    clip: float = option(1.0, "largest gradient norm; larger ones are scaled down", "training", low=0)
    ema: float = option(
        0.995, "decay of the student's running average, which is what is kept", "training", low=0, high=1
    )
    precision: str = option("auto", "arithmetic of the passes", "training", ("auto", "float32", "bfloat16"))
    checkpointing: bool = option(
        False, "compute activations a second time instead of keeping them: much less memory, a third slower", "training"
    )
    seed: int = option(0, "seed of everything random", "training", low=0)
    # Losses
    adversarial: str = option("hinge", "adversarial loss", "losses", ADVERSARIAL)
    adversarial_weight: float = option(
        1.0, "weight of the adversarial loss; 0 leaves the discriminator out", "losses", low=0
    )
    mismatch_weight: float = option(
        0.0,
        "weight of the discriminator's telling a real picture with its own text from one with another text of the "
        "batch",
        "losses",
        low=0,
    )
    distillation: str = option(
        "exponential",
        "distillation loss: ADD's with a weighting over noise levels; nfsd; or matching, which compares the "
        "teacher's score with the student's own, learnt by a second LoRA",
        "losses",
        WEIGHTS,
    )
    distillation_weight: float = option(
        0.0, "weight of ADD's distillation loss (the paper's lambda is 2.5)", "losses", low=0
    )
    distillation_guidance: float = option(4.0, "the teacher's guidance scale in the distillation loss", "losses", low=1)
    score_rank: int = option(32, "rank of the LoRA that learns the student's own score", "losses", low=1, high=512)
    lr_score: float = option(5e-4, "learning rate of that LoRA", "losses", low=0)
    teacher_steps: int = option(1, "teacher steps in the distillation loss", "losses", low=1, high=8)
    regression_weight: float = option(1.0, "weight of the regression to the pairs", "losses", low=0)
    feature_weight: float = option(0.0, "weight of matching the teacher's features of the pair", "losses", low=0)
    r1: str = option("approximate", "gradient penalty of the discriminator", "losses", ("none", "exact", "approximate"))
    r1_weight: float = option(1.0, "weight of the gradient penalty", "losses", low=0)
    r1_noise: float = option(0.1, "spread of the perturbation of the approximate penalty", "losses", low=0)
    # Discriminator
    vision: str = option(
        "",
        "vision transformer that judges the decoded pictures, as in ADD: 'embedded', a folder, or a hub's name such "
        "as facebook/dinov2-small; empty judges latents by the teacher's own features, as in LADD",
        "discriminator",
    )
    vision_size: int = option(
        0, "pixels of the longer side at which it sees pictures; 0 is the picture's own", "discriminator", low=0
    )
    taps: str = option("", "modules whose features it sees, with commas; empty finds them", "discriminator")
    width: int = option(64, "channels of each head", "discriminator", low=8, high=1024)
    renoise_mean: float = option(0.0, "mean of the logit of the noise level it sees pictures at", "discriminator")
    renoise_std: float = option(1.0, "spread of that logit", "discriminator", low=0)
    condition_image: bool = option(
        False, "condition it on the pair's picture where the student was given part of it", "discriminator"
    )
    # Output
    preview_every: int = option(100, "updates between previews", "output", low=0)
    save_every: int = option(100, "updates between saved states", "output", low=1)
    select_every: int = option(
        200, "updates between measurements that choose the best student; 0 keeps the last", "output", low=0
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            wanted = type(f.default)
            if wanted is float and type(value) is int:
                object.__setattr__(self, f.name, float(value))
                value = float(value)
            if type(value) is not wanted:
                raise ConfigError(f"{f.name} is {value!r}: give a value of type {wanted.__name__}")
            about = f.metadata
            if wanted is float and not math.isfinite(value):
                raise ConfigError(f"{f.name} is {value}: give a finite number")
            if about["choices"] and value not in about["choices"]:
                raise ConfigError(f"{f.name} is {value!r}: use one of {', '.join(about['choices'])}")
            if about["low"] is not None and value < about["low"]:
                raise ConfigError(f"{f.name} is {value}: the least is {about['low']}")
            if about["high"] is not None and value > about["high"]:
                raise ConfigError(f"{f.name} is {value}: the most is {about['high']}")
        if self.steps > self.start + 1:
            raise ConfigError(f"steps is {self.steps}: from start {self.start} there are {self.start + 1} at most")
        weights = ("adversarial_weight", "distillation_weight", "regression_weight", "feature_weight")
        if not any(getattr(self, name) for name in weights):
            raise ConfigError("every loss has weight 0: give at least one of " + ", ".join(weights))

    @property
    def sees_pictures(self) -> bool:
        """Whether the discriminator takes real pictures for real, so that a folder of them is needed."""
        return self.positives != "teacher"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Raises ConfigError for a name that is no setting."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown settings {unknown}: known are {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def from_toml(cls, path: str | Path) -> Config:
        """A flat TOML file of settings; those it leaves out keep their defaults."""
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"settings file {path} does not exist: check the name") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"settings file {path} is no TOML: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """What `from_toml` reads."""
        # A TOML basic string, number or boolean is written as in JSON.
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in self.to_dict().items())

    def replace(self, **changes: Any) -> Config:
        return dataclasses.replace(self, **changes)


# What forms ask for at once: what decides the pairs, and what a training needs said. All else is advanced.
OF_PAIRS = ("pairs", "pair_steps", "pair_sampler", "guidance", "seed")
OF_DISTILL = ("rank", "updates", "batch", "checkpointing")
# What hosts cannot do yet, which have no gradients through their autoencoder: their forms leave it out.
OF_VISION = ("vision", "vision_size")
ADVANCED = tuple(f.name for f in dataclasses.fields(Config) if f.name not in OF_PAIRS + OF_DISTILL + OF_VISION)

# What may change between a run and its resumption: it decides how long, how often and with how much memory.
RESUMABLE = {"updates", "minutes", "preview_every", "save_every", "select_every"}
RESUMABLE |= {"batch", "accumulate", "precision", "checkpointing"}
RESUMABLE |= {"begin"}  # what has begun has done with it


def check_resumable(saved: dict[str, Any], config: Config) -> None:
    """Raise ConfigError if a run with `saved` settings cannot go on with `config`, naming the differences."""
    now = config.to_dict()
    changed = {k: (saved.get(k), now[k]) for k in now if saved.get(k) != now[k] and k not in RESUMABLE}
    if changed:
        told = ", ".join(f"{k} was {a!r} and is {b!r}" for k, (a, b) in changed.items())
        raise ConfigError(f"this run cannot go on with other settings: {told}. Change them back, or use another folder")
