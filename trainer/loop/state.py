"""Everything that an update changes, and what of it is saved."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor, amp, nn

from ...core import decoder as decoders
from ...core.compiled import compiled
from ...core.decoder import Decoder
from ...core.discriminator import Discriminator
from ...core.features import TeacherFeatures
from ...core.gradient_checkpointing import checkpointed
from ...core.sharded import sharded_like
from ...core.student import Student
from ...core.vision import Features, VisionFeatures
from ..config import Config, check_resumable
from ..data.samples import Samples
from ..world import ALONE, World
from .fake_score import FakeScore
from .feature_cache import FeatureCache
from .optimizer import adam, load_state, of_student, saved_state
from .precision import grad_scaler

# The names of discriminators and their optimizers in a saved state.
SAVED_CRITICS = (
    ("discriminator", "discriminator_optimizer"),
    ("second_discriminator", "second_discriminator_optimizer"),
)


@dataclass
class Critic:
    """The discriminator, the features that it sees, and its optimizer."""

    features: Features
    discriminator: Discriminator
    optimizer: torch.optim.Optimizer
    share: float = 1.0  # of the losses that it gives the student

    @classmethod
    def create(cls, student: Student, config: Config, sample: Samples, features: Features, share: float) -> Critic:
        """A fresh one for features and text of the shapes that one `sample` row has."""
        device = student.device
        x, cond = sample.latents[:1].to(device), sample.cond.rows(slice(1)).to(device)
        with torch.no_grad():
            maps = features(x, student.schedule.sigma(torch.tensor([500])).to(device), cond)
        image = maps[-1].shape[1] if config.condition_image else 0
        with torch.random.fork_rng():  # a host's own randomness stays as it was
            torch.manual_seed(config.seed)
            discriminator = Discriminator(
                [m.shape[1] for m in maps], cond.summary.shape[1], image, config.head_channels
            )
        discriminator.to(device)
        return cls(features, discriminator, adam(discriminator, config.lr_discriminator, (0.0, 0.99)), share)


@dataclass
class State:
    """Everything that an update changes."""

    config: Config
    student: Student
    critics: list[Critic]  # none where guidance alone is distilled, two that see latents and pictures
    optimizer: torch.optim.Optimizer
    average: nn.Module  # the running average of student.trained
    scaler: amp.GradScaler  # of the losses; it does something in float16 alone
    fake_score: FakeScore | None = None  # where distribution matching needs it
    update: int = 0
    spent: float = 0.0  # seconds of training
    extra: dict[str, Any] = field(default_factory=dict)
    feature_cache: FeatureCache = field(default_factory=FeatureCache)  # of the positives; not saved
    whole: bool = True  # False while an update is being applied: not a state to go on from
    world: World = ALONE  # the processes that train together
    decoder: Decoder | None = None  # where a loss is of pictures

    @classmethod
    def create(
        cls,
        student: Student,
        config: Config,
        sample: Samples,
        features: Sequence[Features] = (),
        world: World = ALONE,
        decoder: Decoder | None = None,
    ) -> State:
        """A fresh state; one `sample` row tells the shapes of features (by default the teacher's) and text."""
        alone, trained = config.guidance_only, student.trained
        matches = config.distillation_weight > 0 and config.distillation == "matching" and not alone
        average = _average(trained, world)
        seen = [] if alone else [*features] or [TeacherFeatures(student.teacher, tap_names(config))]
        shares = [1.0] if len(seen) < 2 else [1 - config.pixel_share, config.pixel_share]
        critics = [Critic.create(student, config, sample, *each) for each in zip(seen, shares, strict=False)]
        return cls(
            config,
            student,
            critics,
            of_student(trained, config),
            average,
            grad_scaler(config, student.device, student.backbone),
            FakeScore(student, config) if matches else None,
            world=world,
            decoder=decoder,
        )

    @property
    def finished(self) -> bool:
        """Whether the updates, or the minutes, of the settings are all done."""
        minutes = self.config.minutes
        return self.update >= self.config.updates or bool(minutes and self.spent >= minutes * 60)

    def release(self) -> None:
        """Take every LoRA's hooks out of the shared backbone."""
        self.student.release()
        if self.fake_score:
            self.fake_score.denoiser.release()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The student acts with the running average of its weights within."""
        live = list(self.student.trained.parameters())
        sharded = self.world.shards and self.student.lora is None  # torch keeps such tensors' places
        kept = [p.detach().clone() if sharded else p.data for p in live]
        try:
            self._become([p.data for p in self.average.parameters()], sharded)
            yield
        finally:
            self._become(kept, sharded)

    @torch.no_grad()
    def _become(self, values: Sequence[Tensor], sharded: bool) -> None:
        """Let the student's parameters have these values."""
        for parameter, value in zip(self.student.trained.parameters(), values, strict=True):
            if sharded:
                parameter.copy_(value)
            else:
                parameter.data = value

    def _backbones(self) -> list[nn.Module]:
        """The teacher's and the student's, which with a LoRA are one."""
        teacher, student = self.student.teacher.backbone, self.student.backbone
        return [teacher] if teacher is student else [teacher, student]

    def _decoders(self) -> list[nn.Module]:
        """The decoder's network, where it is used, once; none where its blocks are not known."""
        found = [critic.features.decoder for critic in self.critics if isinstance(critic.features, VisionFeatures)]
        found += [self.decoder] if self.decoder else []
        return list({id(d.network): d.network for d in found if decoders.has_blocks(d.network)}.values())

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Within, the blocks are compiled, if the settings ask for it."""
        with ExitStack() as stack:
            if self.config.compile:
                for backbone in self._backbones():
                    stack.enter_context(compiled(backbone))
            yield

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Within, no pass keeps more activations than the settings allow."""
        loras = [s.lora for s in (self.student, self.fake_score and self.fake_score.denoiser) if s and s.lora]
        with ExitStack() as stack:
            if self.config.gradient_checkpointing:
                for backbone in self._backbones():
                    stack.enter_context(checkpointed(backbone, loras))
                for network in self._decoders():
                    stack.enter_context(checkpointed(network, known=decoders.BLOCKS))
            yield

    def state_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "student": self.student.trained.state_dict(),
            "average": self.average.state_dict(),
            **self._critics_dict(),
            "optimizer": saved_state(self.optimizer),
            "update": self.update,
            "spent": self.spent,
            "extra": self.extra,
            "scaler": self.scaler.state_dict(),
            "fake_score": self.fake_score and self.fake_score.state_dict(),
        }

    def _critics_dict(self) -> dict[str, Any]:
        """Each discriminator and its optimizer; None in place of the first where there is none."""
        found: dict[str, Any] = dict.fromkeys(SAVED_CRITICS[0])
        for critic, names in zip(self.critics, SAVED_CRITICS, strict=False):
            found |= zip(names, (critic.discriminator.state_dict(), critic.optimizer.state_dict()), strict=True)
        return found

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Raises ConfigError if the saved run had other settings, ValueError or RuntimeError for other shapes."""
        check_resumable(saved["config"], self.config)
        for module, weights in ((self.student.trained, saved["student"]), (self.average, saved["average"])):
            own = module.state_dict()
            fitting = own.keys() == weights.keys()  # else the module itself says what does not
            module.load_state_dict({k: sharded_like(v, own[k]) for k, v in weights.items()} if fitting else weights)
        load_state(self.optimizer, saved["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            moments |= {k: sharded_like(v, parameter) for k, v in moments.items() if v.shape == parameter.shape}
        optimizers = [self.optimizer]
        for critic, (name, of_optimizer) in zip(self.critics, SAVED_CRITICS, strict=False):
            critic.discriminator.load_state_dict(saved[name])
            critic.optimizer.load_state_dict(saved[of_optimizer])
            optimizers.append(critic.optimizer)
        if saved.get("scaler"):  # empty in another precision
            self.scaler.load_state_dict(saved["scaler"])
        if self.fake_score:
            self.fake_score.load_state_dict(saved["fake_score"])
        self.update, self.spent, self.extra = saved["update"], saved["spent"], saved["extra"]
        for optimizer in optimizers:  # which do not look at them themselves
            for parameter, moments in optimizer.state.items():
                if any(m.ndim and m.shape != parameter.shape for m in moments.values()):
                    raise ValueError("an optimizer's moments are of other shapes than what it trains")


def check_state(saved: Any) -> None:
    """Raise ValueError for what is no `state_dict` of a State, whatever its tensors."""
    kinds = {"config": dict, "extra": dict, "update": int, "spent": float}
    if not isinstance(saved, dict) or any(not isinstance(saved.get(name), kind) for name, kind in kinds.items()):
        raise ValueError("it is no training's state")
    extra = saved["extra"]
    good = isinstance(extra.get("best", 0.0), float) and saved["update"] >= 0 and 0 <= saved["spent"] < inf
    if not good or not all(isinstance(extra.get(name, {}), dict) for name in ("pairs", "images")):
        raise ValueError("its numbers cannot be a training's")


def _average(trained: nn.Module, world: World) -> nn.Module:
    """A copy of what is trained, and both sharded where that is asked for: at no time is there a second whole one."""
    if not world.shards:
        return copy.deepcopy(trained).requires_grad_(False)
    average = copy.deepcopy(trained, {id(p): p for p in trained.parameters()})
    for module in (average, trained):
        world.shard(module)
    return average.requires_grad_(False)


def tap_names(config: Config) -> list[str]:
    """The names of the blocks that the discriminator sees."""
    return [name.strip() for name in config.taps.split(",") if name.strip()]
