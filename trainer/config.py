"""Every setting of a distillation, with its default, bounds and help: the only place that has them.

The command line, the ComfyUI node and the WebUI tab are all made from the fields of `Config`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.lora import TARGETS
from ..core.losses import ADVERSARIAL, WEIGHTS
from ..core.sampling import TEACHER_SAMPLERS
from ..core.student import PREDICTIONS
from .data.files import DataError, check_file, path_of, read_text
from .setting import KINDS, ConfigError, check_value, option, shown, told_names
from .sizes import BUCKETS, LARGEST, sizes_of

MOST_PAIRS = 1_000_000
MOST_UPDATES = 10_000_000
MOST_MINUTES = 100_000  # two months
MOST_SEED = 2**63 - 1  # of a picture's noise
LEAST_LR = 1e-9  # with less, or nothing, a training only takes time
MOST_LETTERS = 4000  # of a prompt
FEWEST_OF_SIZE = 4  # pairs
VAE, TINY = DECODERS = ("vae", "tiny")
# What a pixel backbone may be, beside a folder: all that come with transformers, which loads them.
BACKBONES = ("embedded", "facebook/dinov2-small", "facebook/dinov2-base", "facebook/dinov3-vits16-pretrain-lvd1689m")
AS_LOADED, INT8 = BASE_PRECISIONS = ("as loaded", "int8")
ADAMW, ADAMW8BIT, PRODIGY = OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
LEAST_FACTOR = 0.1  # of what prodigy finds: with a learning rate of other optimizers it would learn next to nothing
# What a student that is sampled as its teacher has no use for.
OF_FEW_STEPS = ("prediction", "start_timestep", "student_steps", "first_step_share", "fresh_noise_share")


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file of settings names, unchecked; raises ConfigError for a file that is none."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        check_file("settings file", Path(path))
        return tomllib.loads(read_text(Path(path)))
    except DataError as error:
        raise ConfigError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"settings file {path} is no TOML: {error}") from None


@dataclass(frozen=True)
class Config:
    """Settings of one distillation; see each field's help."""

    # Student
    rank: int = option(
        64,
        "LoRA rank. Higher learns more detail and takes more memory; 0 trains a full copy of the model.",
        "student",
        low=0,
        high=512,
    )
    alpha: float = option(
        0.0, "LoRA alpha. 0 takes the rank, so that the LoRA is used at strength 1.", "student", low=0, high=4096
    )
    targets: str = option(
        "all",
        "Layers that get a LoRA, separated by commas: attention, transformer, all, blocks such as output_blocks.1, or "
        "regular expressions; 'not middle_block' leaves a block out. Choose fewer to save memory.",
        "student",
        offers=tuple(TARGETS),
    )
    prediction: str = option(
        "inherit",
        "What the student's network predicts: inherit is the model's own eps or v; x0 can remove speckle.",
        "student",
        PREDICTIONS,
    )
    guidance_only: bool = option(
        False,
        "Only bake the CFG into the student, negative prompt included: it is sampled as its teacher is, in as many "
        "steps, at CFG 1 and half the cost. The other losses are not used.",
        "student",
    )
    start_timestep: int = option(
        999,
        "Timestep at which the student receives pure noise. Lower it (DMD2 uses 399) if pictures show speckle.",
        "student",
        low=1,
        high=999,
    )
    student_steps: int = option(
        1,
        "Most steps the student is trained for. 2 to 4 give better pictures at 2 to 4 times the cost.",
        "student",
        low=1,
        high=8,
    )
    first_step_share: float = option(
        0.6,
        "Share of the training spent on the first step, from pure noise. Only used above one step.",
        "student",
        low=0,
        high=1,
    )
    fresh_noise_share: float = option(
        0.5,
        "Share of first steps that start from new noise once the discriminator is used; the others start from the "
        "noise of a teacher pair. Lower it if pictures fall apart.",
        "student",
        low=0,
        high=1,
    )
    init_student: str = option(
        "",
        "Student file to begin from, of this model or of another of its architecture; or a Turbo, LCM, Lightning, "
        "Hyper-SD or DMD2 LoRA of the same architecture. Ranks may differ. In ComfyUI and WebUIs its name among the "
        "LoRAs will do. Empty starts from the teacher.",
        "student",
    )
    # Data
    pairs: int = option(
        1024,
        "Teacher pairs (noise and picture) made from the prompts. 500 to 10000; more is better and takes longer.",
        "data",
        low=4,
        high=MOST_PAIRS,
    )
    pair_steps: int = option(16, "Sampling steps of the teacher for each pair. 8 to 30.", "data", low=1, high=1000)
    pair_sampler: str = option("dpmpp_2m", "Sampler of the teacher for the pairs.", "data", TEACHER_SAMPLERS)
    guidance: float = option(
        4.0,
        "CFG scale of the teacher in the pairs. It is baked into the student, which samples at CFG 1. 2 to 8.",
        "data",
        low=1,
        high=30,
    )
    sizes: str = option(
        "",
        "Sizes of the pairs in pixels, separated by commas, such as 1024x1024, 832x1216, 1216x832: the student learns "
        "them all, a batch is of one. 'buckets' takes those that your own pictures fit; empty is the one size that is "
        "asked for.",
        "data",
        high=200,
    )
    guidance_rescale: float = option(
        0.0,
        "CFG rescale of the teacher in the pairs, against burnt colours: 0 is the plain CFG, 0.7 suits models of "
        "v-prediction and zero-terminal SNR.",
        "data",
        low=0,
        high=1,
    )
    guidance_start: float = option(
        0.0,
        "Share of the teacher's sampling before which there is no CFG. 0 to 0.2; more gives more varied pictures.",
        "data",
        low=0,
        high=0.9,
    )
    guidance_end: float = option(
        1.0,
        "Share of the teacher's sampling from which on there is no CFG. 0.6 to 1; less is faster and more natural.",
        "data",
        low=0.1,
        high=1,
    )
    negative_prompt: str = option(
        "",
        "What the teacher's guidance moves away from. It is baked into the student, which itself takes no negative "
        "prompt. Use the one that you always use; empty is the plain CFG.",
        "data",
        high=MOST_LETTERS,
    )
    prompt_prefix: str = option(
        "",
        "Text before every prompt of the teacher: quality tags, trigger words. A comma is put between.",
        "data",
        high=MOST_LETTERS,
    )
    prompt_suffix: str = option(
        "", "Text behind every prompt of the teacher. A comma is put between.", "data", high=MOST_LETTERS
    )
    bake_affixes: bool = option(
        False,
        "Train the student on the prompts without prefix and suffix, so that it adds them by itself. Off, they are "
        "typed when the student is sampled, too.",
        "data",
    )
    positives: str = option(
        "teacher",
        "Pictures the discriminator takes for real: the teacher's, your own, or both. Your own need an image folder.",
        "data",
        ("teacher", "real", "both"),
    )
    real_share: float = option(0.5, "Share of your own pictures when positives is 'both'.", "data", low=0, high=1)
    broken_pictures: str = option(
        "stop",
        "What happens where a picture of your own cannot be read or has no caption: stop ends and names it; skip goes "
        "on without it and says how many there were.",
        "data",
        ("stop", "skip"),
    )
    # Training
    updates: int = option(
        2000,
        "Student updates. 500 shows whether it works; 2000 to 10000 for a student to keep.",
        "training",
        low=1,
        high=MOST_UPDATES,
    )
    minutes: float = option(
        0.0, "Stop after this many minutes of training. 0 sets no limit.", "training", low=0, high=MOST_MINUTES
    )
    batch_size: int = option(
        16,
        "Samples per batch. Lower it when memory runs out, and raise gradient_accumulation.",
        "training",
        low=1,
        high=1024,
    )
    gradient_accumulation: int = option(
        1,
        "Batches per update. 4 batches of 4 train like one of 16, with the memory of 4.",
        "training",
        low=1,
        high=1024,
    )
    lr: float = option(
        2e-4,
        "Learning rate of the student. 1e-5 to 5e-4; a full copy needs about 1e-5, the optimizer prodigy 1.",
        "training",
        low=LEAST_LR,
        high=1,
    )
    lr_discriminator: float = option(
        5e-4,
        "Learning rate of the discriminator. Lower it when the discriminator's accuracy stays above 0.95.",
        "training",
        low=LEAST_LR,
        high=1,
    )
    regression_updates: int = option(
        200,
        "First updates, which only fit the teacher's pairs (regression). 100 to 2000; pictures are blurred until the "
        "discriminator starts.",
        "training",
        low=0,
        high=MOST_UPDATES,
    )
    discriminator_warmup: int = option(
        100,
        "Train the discriminator for this many of the last regression updates before its loss reaches the student.",
        "training",
        low=0,
        high=MOST_UPDATES,
    )
    adversarial_ramp: int = option(
        200,
        "Updates over which the adversarial and matching losses rise to full weight after the regression. Raise it if "
        "pictures break when the discriminator starts.",
        "training",
        low=0,
        high=MOST_UPDATES,
    )
    lr_decay: float = option(
        0.3,
        "Last share of the run in which the learning rates fall to zero. 0 keeps them constant.",
        "training",
        low=0,
        high=1,
    )
    discriminator_updates: int = option(
        1,
        "Discriminator updates per student update. Raise it when the discriminator's accuracy stays below 0.55.",
        "training",
        low=1,
        high=16,
    )
    max_grad_norm: float = option(
        1.0, "Largest gradient norm; larger gradients are scaled down. 0 never clips.", "training", low=0, high=1e6
    )
    ema_decay: float = option(
        0.995,
        "Decay of the running average of the student's weights, which is what gets saved. 0.99 to 0.9999.",
        "training",
        low=0,
        high=1,
    )
    precision: str = option(
        "auto",
        "Arithmetic of the training passes: auto takes bfloat16 where the device is fast in it, else float32; float16 "
        "takes half the memory on cards without bfloat16 (T4, RTX 20, GTX 16).",
        "training",
        ("auto", "float32", "bfloat16", "float16"),
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations instead of storing them: much less memory, about a third slower.", "training"
    )
    seed: int = option(0, "Seed of everything random.", "training", low=0, high=2**32 - 1)
    # Losses
    adversarial: str = option(
        "hinge", "Adversarial loss. relativistic compares real and generated pictures in pairs.", "losses", ADVERSARIAL
    )
    adversarial_weight: float = option(
        1.0,
        "Weight of the adversarial loss. 0 trains without a discriminator, which blurs.",
        "losses",
        low=0,
        high=1000,
    )
    mismatch_weight: float = option(
        0.0,
        "Weight of teaching the discriminator to reject real pictures with the wrong prompt. Raise it to 1 if the "
        "student ignores prompts.",
        "losses",
        low=0,
        high=1000,
    )
    distillation: str = option(
        "exponential",
        "Distillation loss: exponential and sds are ADD's, with its two weightings of noise levels; nfsd is its "
        "NFSD; matching is distribution matching (DMD), which trains a second LoRA.",
        "losses",
        WEIGHTS,
    )
    distillation_weight: float = option(
        0.0, "Weight of the distillation loss. ADD's paper uses 2.5; 0 leaves it out.", "losses", low=0, high=1000
    )
    distillation_guidance: float = option(
        4.0, "CFG scale of the teacher in the distillation loss.", "losses", low=1, high=30
    )
    fake_score_rank: int = option(
        32, "Rank of the LoRA that learns the fake score (the student's own) for matching.", "losses", low=1, high=512
    )
    lr_fake_score: float = option(5e-4, "Learning rate of the fake score.", "losses", low=LEAST_LR, high=1)
    teacher_steps: int = option(1, "Teacher steps in the distillation loss. 1 to 4.", "losses", low=1, high=8)
    regression_weight: float = option(
        1.0,
        "Weight of the regression to the teacher's pairs. It keeps pictures stable and varied.",
        "losses",
        low=0,
        high=1000,
    )
    feature_weight: float = option(
        0.0,
        "Weight of matching the discriminator's features of the teacher's picture, from the first update on: with a "
        "pixel backbone a perceptual regression. Try 0.1 to 1.",
        "losses",
        low=0,
        high=1000,
    )
    r1: str = option(
        "approximate",
        "Gradient penalty (R1) that keeps the discriminator from winning. exact and approximate measure the same slope "
        "of its heads; exact is slower and needs no r1_noise. data perturbs the real pictures themselves (APT), at one "
        "pass more.",
        "losses",
        ("none", "exact", "approximate", "data"),
    )
    r1_weight: float = option(
        1.0,
        "Weight of the gradient penalty, for every kind and resolution. 0.01 to 10; raise it when the "
        "discriminator's accuracy stays above 0.95.",
        "losses",
        low=0,
        high=1e6,
    )
    r1_noise: float = option(
        0.1,
        "Size of the perturbation in the penalties approximate and data, of what has about size 1. 0.03 to 0.3.",
        "losses",
        low=1e-3,
        high=10,
    )
    # Discriminator
    pixel_backbone: str = option(
        "",
        "Vision transformer that judges decoded pictures, as in ADD: 'embedded', a folder, or a hub name such as "
        "facebook/dinov2-small. Empty judges latents with the teacher's own features, as in LADD.",
        "discriminator",
        offers=BACKBONES,
    )
    pixel_size: int = option(
        0,
        "Longer side in pixels at which the pixel backbone sees pictures. 0 takes the size that the network was made "
        "for, or keeps theirs where it takes any.",
        "discriminator",
        low=0,
        high=LARGEST,
    )
    taps: str = option(
        "",
        "Layers whose features the discriminator sees, separated by commas; of two discriminators the latents'. Empty "
        "chooses them.",
        "discriminator",
    )
    head_channels: int = option(64, "Channels of each discriminator head.", "discriminator", low=8, high=1024)
    renoise_mean: float = option(
        0.0,
        "Mean of the logit-normal noise level at which the discriminator sees latents. Lower looks at finer detail.",
        "discriminator",
        high=10,
        low=-10,
    )
    renoise_std: float = option(1.0, "Spread of that noise level.", "discriminator", low=0, high=10)
    condition_image: bool = option(
        False,
        "Also show the discriminator the clean picture the student started from, as in ADD. Only used above one step.",
        "discriminator",
    )
    # Output
    preview_every: int = option(
        100, "Updates between previews. 0 makes only the first and the last.", "output", low=0, high=MOST_UPDATES
    )
    save_every: int = option(
        100, "Updates between saved states, from which a stopped run resumes.", "output", low=1, high=MOST_UPDATES
    )
    evaluate_every: int = option(
        200,
        "Updates between evaluations, which choose the best student. 0 keeps the last one.",
        "output",
        low=0,
        high=MOST_UPDATES,
    )
    log_every: int = option(
        0,
        "Updates between two looks at the losses, of which the means are told. 0: 1 on a CPU, 10 on a GPU, which "
        "waits at each.",
        "output",
        low=0,
        high=MOST_UPDATES,
    )
    # Memory, of the group of the training
    base_precision: str = option(
        "as loaded",
        "Precision of the frozen model under a LoRA: int8 packs its weights into eight bits while the student trains, "
        "half the memory of float16. The model comes back to the bit.",
        "training",
        BASE_PRECISIONS,
    )
    offload: bool = option(
        False,
        "Keep text encoders and the autoencoder off the device while the student trains; they come back for previews.",
        "training",
    )
    optimizer: str = option(
        "adamw",
        "Optimizer of the student: adamw8bit keeps Adam's moments in eight bits, for a full copy, and needs torchao; "
        "prodigy finds the learning rate itself, with lr at 1, takes twice the memory of adamw and needs "
        "pytorch-optimizer.",
        "training",
        OPTIMIZERS,
    )
    compile: bool = option(
        False,
        "Compile the model's blocks (torch.compile): quicker updates on a GPU, after some minutes at the start.",
        "training",
    )
    vram: float = option(
        0.0,
        "GB of a card, such as 8, 12, 16 or 24: checkpointing, smaller batches and 8-bit moments are chosen so that "
        "the training fits its memory; what you set yourself stays. 0 chooses nothing.",
        "training",
        low=0,
        high=1000,
    )
    # Pictures, of the groups of the discriminator and the losses
    pixel_share: float = option(
        1.0,
        "Share of the discriminator's losses that the pixel backbone has: 1 judges pictures alone (ADD), 0.5 pictures "
        "and latents alike. Only used with a pixel backbone.",
        "discriminator",
        low=0.01,
        high=1,
    )
    pixel_crop: int = option(
        0,
        "Side in pixels of the square of a picture that is decoded and judged, at a random place. 256 to 512 saves "
        "most of the memory at 1024; 0 takes whole pictures.",
        "discriminator",
        low=0,
        high=LARGEST,
    )
    pixel_decoder: str = option(
        "vae",
        "What decodes pictures for the pixel backbone: the model's own autoencoder, or a tiny one (TAESD), several "
        "times as fast and small, with softer textures.",
        "discriminator",
        DECODERS,
    )
    augment: bool = option(
        False,
        "Show the pixel backbone pictures with other colours, moved, and with a part left out. It then does not learn "
        "a few hundred pictures of yours by heart.",
        "discriminator",
    )
    raw_pictures: bool = option(
        False,
        "Show the pixel backbone your own pictures as their files have them, not as the autoencoder gives them back.",
        "discriminator",
    )
    distillation_space: str = option(
        "latent",
        "Where ADD's distillation loss compares the two pictures: latents, or decoded pixels as in the paper, which "
        "takes more time and memory.",
        "losses",
        ("latent", "pixel"),
    )
    # Two time scales, and a split by noise level
    fake_score_updates: int = option(
        1,
        "Updates of the fake score per student update, for matching. DMD2 takes 5 for SDXL and 10 for SD1.5.",
        "losses",
        low=1,
        high=16,
    )
    distillation_min_timestep: int = option(
        0,
        "Lowest timestep of the distillation loss. 400 leaves detail to the discriminator and composition to the "
        "teacher (Flash-DMD).",
        "losses",
        low=0,
        high=950,
    )
    renoise_max_timestep: int = option(
        999,
        "Highest timestep at which the discriminator sees latents. 400 lets it judge detail alone (Flash-DMD).",
        "discriminator",
        low=0,
        high=999,
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            wanted = type(f.default)
            if wanted is float and type(value) is int:
                value = float(value) if abs(value) < 2**1000 else math.inf
                object.__setattr__(self, f.name, value)
            if type(value) is not wanted:
                raise ConfigError(f"{f.name} is {shown(value)}: give {KINDS[wanted]}")
            check_value(f, value)
        for name in ("init_student", "pixel_backbone"):
            object.__setattr__(self, name, path_of(getattr(self, name)))
        count = 0 if self.sizes == BUCKETS else len(sizes_of(self.sizes))
        if count and self.pairs < FEWEST_OF_SIZE * count:
            raise ConfigError(f"pairs is {self.pairs}: {count} sizes need at least {FEWEST_OF_SIZE * count}")
        if self.student_steps > self.start_timestep + 1:
            raise ConfigError(
                f"student_steps is {self.student_steps}: start_timestep {self.start_timestep} allows at most "
                f"{self.start_timestep + 1}"
            )
        if self.guidance_start >= self.guidance_end:
            raise ConfigError(
                f"guidance_start is {self.guidance_start} and guidance_end {self.guidance_end}: the start comes first"
            )
        guides = self.guidance > 1 or (self.distillation_weight > 0 and self.distillation_guidance > 1)
        if self.negative_prompt and not guides:
            raise ConfigError("negative_prompt is given and guidance is 1, which leaves it out: raise guidance")
        self._check_training()
        weights = ("adversarial_weight", "distillation_weight", "regression_weight", "feature_weight")
        if self.guidance_only:
            self._check_guidance_only()
        elif not any(getattr(self, name) for name in weights):
            raise ConfigError("every loss has weight 0: give at least one of " + ", ".join(weights))

    @property
    def decodes(self) -> bool:
        """Whether an update decodes pictures."""
        if self.guidance_only:
            return False
        judges = self.pixel_backbone and (self.adversarial_weight > 0 or self.feature_weight > 0)
        return bool(judges) or self.compares_pixels

    @property
    def compares_pixels(self) -> bool:
        """Whether the distillation loss is of decoded pictures."""
        return self.distillation_space == "pixel" and self.distillation_weight > 0 and not self.guidance_only

    def _check_training(self) -> None:
        """Raise ConfigError for a base, an optimizer or a loss that does not go with other settings."""
        if self.distillation_space == "pixel" and self.distillation in ("matching", "nfsd"):
            raise ConfigError(
                f"distillation_space is 'pixel' and distillation {self.distillation!r}, whose direction is one of "
                "latents: leave it at latent, or use exponential or sds"
            )
        if self.base_precision == INT8 and not self.rank:
            raise ConfigError(
                "base_precision is 'int8' and rank 0, which trains the model itself: give a rank, or leave it"
            )
        if self.optimizer == PRODIGY and self.lr < LEAST_FACTOR:
            raise ConfigError(
                f"lr is {self.lr:g} and optimizer 'prodigy', which finds the learning rate itself and takes lr as a "
                f"factor of it: set lr to 1 ({LEAST_FACTOR} to 1)"
            )

    def _check_guidance_only(self) -> None:
        """Raise ConfigError for settings that a student of guidance alone cannot have."""
        if self.guidance <= 1:
            raise ConfigError(
                f"guidance_only is true and guidance is {self.guidance:g}: there is nothing to bake in, raise guidance"
            )
        for name in OF_FEW_STEPS:
            usual = self.__dataclass_fields__[name].default
            if (value := getattr(self, name)) != usual:
                raise ConfigError(
                    f"guidance_only is true and {name} is {shown(value)}: such a student is sampled as its teacher is. "
                    f"Leave {name} at {shown(usual)}, or guidance_only off"
                )

    @property
    def sees_pictures(self) -> bool:
        """Whether the discriminator takes real pictures for real, so that a folder of them is needed."""
        return self.positives != "teacher"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Raises ConfigError for a name that is no setting, with the nearest one that is."""
        for name, value in sorted(values.items()):
            if isinstance(value, dict) and name not in cls.__dataclass_fields__:
                raise ConfigError(f"[{name:.100}] is a table: write settings as name = value alone, without tables")
        return cls(**values)

    @classmethod
    def from_toml(cls, path: str | Path) -> Config:
        """A flat TOML file of settings; those it leaves out keep their defaults."""
        return cls.from_dict(read_toml(path))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """What `from_toml` reads."""
        # A TOML basic string, number or boolean is written as in JSON.
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in self.to_dict().items())

    def replace(self, **changes: Any) -> Config:
        return dataclasses.replace(self, **changes)


Config.__init__ = told_names(Config.__init__)
# What may change between a run and its resumption: it decides how long, how often and with how much memory.
RESUMABLE = {"updates", "minutes", "preview_every", "save_every", "evaluate_every", "log_every"}
RESUMABLE |= {"batch_size", "gradient_accumulation", "precision", "gradient_checkpointing"}
RESUMABLE |= {"base_precision", "offload", "compile", "vram"}
RESUMABLE |= {"init_student", "broken_pictures"}  # only the start needs them


def check_resumable(saved: dict[str, Any], config: Config) -> None:
    """Raise ConfigError if a run with `saved` settings cannot go on with `config`, naming the differences."""
    now, saved = config.to_dict(), Config().to_dict() | saved  # a state from before a setting was there
    changed = {k: (saved[k], now[k]) for k in now if saved[k] != now[k] and k not in RESUMABLE}
    if changed:
        changes = ", ".join(f"{k} was {shown(a)} and is {shown(b)}" for k, (a, b) in changed.items())
        raise ConfigError(
            f"this run cannot go on with other settings: {changes}. Change them back, or use another folder"
        )
