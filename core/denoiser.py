"""The one contract: `x0 = denoiser(x, sigma, cond)`. A host or an architecture is one adapter of it."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .schedule import FlowSchedule, Schedule
from .transfer import to_device


@dataclass(frozen=True)
class Cond:
    """What a denoiser is conditioned on, with a leading batch dimension everywhere.

    `context` (B, T, D) are the text-token states; `pooled` (B, P) the pooled text where the
    architecture has one; `extra` holds further tensors (B, ...) by the backbone's own names.
    `lengths` (B,), by the name of a tensor (B, ..., T, D), say how many of its T tokens are each row's own, where the
    others are zeros behind them: text that is one sequence with the picture is given to a network without them.
    """

    context: Tensor
    pooled: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.context)

    def map(self, function) -> Cond:
        """Apply `function` to every tensor."""
        pooled = None if self.pooled is None else function(self.pooled)
        extra, lengths = ({k: function(v) for k, v in values.items()} for values in (self.extra, self.lengths))
        return Cond(function(self.context), pooled, extra, lengths)

    def rows(self, index) -> Cond:
        """The given rows, as a batch."""
        return self.map(lambda v: v[index])

    def to(self, *args, **kwargs) -> Cond:
        return self.map(lambda v: v.to(*args, **kwargs))

    def to_device(self, device: torch.device) -> Cond:
        """On a device, without waiting for it."""
        return self.map(lambda v: to_device(v, device))

    def repeat(self, count: int) -> Cond:
        """A batch of one, `count` times."""
        return self.map(lambda v: v.expand(count, *v.shape[1:]))

    def lengthened(self, tokens: int) -> Cond:
        """The token states repeated to `tokens`, a multiple of their number."""
        return replace(self, context=self.context.repeat(1, tokens // self.context.shape[1], 1))

    def text(self, name: str) -> Tensor:
        """A tensor of text tokens (B, ..., T, D): the context, or one of `extra`."""
        return self.context if name == "context" else self.extra[name]

    def with_texts(self, change: Callable[[str, Tensor], Tensor], names: Iterable[str]) -> Cond:
        """With what `change(name, tensor)` makes of these tensors of text tokens."""
        found = {name: change(name, self.text(name)) for name in names}
        context = found.pop("context", self.context)
        return replace(self, context=context, extra=self.extra | found)

    def measured(self, names: Iterable[str]) -> Cond:
        """With the lengths of these tensors, of which all tokens are their rows' own."""
        lengths = {n: torch.full((len(self),), self.text(n).shape[-2], device=self.context.device) for n in names}
        return replace(self, lengths=lengths | self.lengths)

    def filled(self, tokens: Mapping[str, int]) -> Cond:
        """These tensors filled up with zeros to so many tokens."""
        return self.with_texts(lambda n, v: F.pad(v, (0, 0, 0, tokens[n] - v.shape[-2])), tokens)

    def cut(self, tokens: Mapping[str, int]) -> Cond:
        """The first tokens of these tensors alone, as many as given: all of them are the rows' own."""
        return replace(self.with_texts(lambda n, v: v[..., : tokens[n], :], tokens), lengths={})

    @staticmethod
    def cat(parts: Sequence[Cond]) -> Cond:
        """Batches one behind another; all must have the same fields.

        Texts of different lengths are repeated to the same: it changes no cross-attention, and hosts do so too. Where
        lengths are known they are filled up instead.
        """
        if names := {name: None for p in parts for name in p.lengths}:
            most = {name: max(p.text(name).shape[-2] for p in parts) for name in names}
            parts = [p.measured(names).filled(most) for p in parts]
        tokens = math.lcm(*(p.context.shape[1] for p in parts))
        parts = [p if p.context.shape[1] == tokens else p.lengthened(tokens) for p in parts]
        pooled = [p.pooled for p in parts if p.pooled is not None]
        extra = {k: torch.cat([p.extra[k] for p in parts]) for k in parts[0].extra}
        lengths = {k: torch.cat([p.lengths[k] for p in parts]) for k in names}
        return Cond(torch.cat([p.context for p in parts]), torch.cat(pooled) if pooled else None, extra, lengths)

    @property
    def summary(self) -> Tensor:
        """One vector a row (B, P): the pooled text, else the mean of the token states that are not padding."""
        if self.pooled is not None:
            return self.pooled.float()
        used = self.context.abs().amax(-1, keepdim=True) > 0
        return (self.context.float() * used).sum(1) / used.sum(1).clamp(min=1)


Rows = tuple[Tensor, Tensor, Cond]  # noisy x (B, C, H, W), sigma (B,), and cond of B rows


class Denoiser(abc.ABC):
    """Predicts x0 (B, C, H, W) from a noisy x at sigma (B,), in k-diffusion's space (see `schedule`).

    `backbone` is the module in which LoRA and feature taps go; `prediction` is what it puts out. `lora_style` is how
    a LoRA file names its layers (`lora.FORMATS`).
    """

    schedule: Schedule
    backbone: nn.Module
    prediction: str
    lora_style: str = "kohya"

    @abc.abstractmethod
    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """Noisy x (B, C, H, W) at sigma (B,), with cond of B rows -> x0 (B, C, H, W)."""

    def both(self, positive: Rows, negative: Rows) -> tuple[Tensor, Tensor]:
        """x0 of two batches, the condition's and that of what guidance moves away from, in one pass."""
        (x, sigma, cond), (x_again, sigma_again, against) = positive, negative
        made = self(torch.cat([x, x_again]), torch.cat([sigma, sigma_again]), Cond.cat([cond, against]))
        return made[: len(x)], made[len(x) :]

    def output(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """The backbone's own output (B, C, H, W): eps, v or flow, as `prediction` says."""
        return self.schedule.from_x0(self.prediction, x, self(x, sigma, cond), sigma)

    def picture_part(self, tap: str, output: Tensor | tuple, x: Tensor, cond: Cond) -> Tensor:
        """What the module `tap` of the backbone put out for x and cond -> the picture's part, without the text.

        (B, C', H', W'), or tokens (B, N, C') by rows.
        """
        return picture_part(tap, output, cond.context.shape[1])

    def with_backbone(self, backbone: nn.Module) -> Denoiser:
        """The same adapter over another module of the same architecture."""
        other = copy.copy(self)
        other.backbone = backbone
        return other

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device


def with_lengths(conds: Sequence[Cond], usual: Cond, names: Iterable[str] = ("context",)) -> list[Cond]:
    """Conditions whose text is one sequence with the picture, with the lengths of their texts of these names.

    Where all are as long as the `usual` one there is nothing to fill up: they stay as they are.
    """
    names = tuple(names)
    if all(cond.text(name).shape == usual.text(name).shape for cond in conds for name in names):
        return list(conds)
    return [cond.measured(names) for cond in conds]


def by_length(
    run: Callable[[Tensor, Tensor, Cond], list[Tensor]], x: Tensor, sigma: Tensor, cond: Cond
) -> list[Tensor]:
    """What `run(x, sigma, cond)`, tensors (B, ...), gives for the rows of each length of text by themselves, in order.

    Text is cut to its own tokens. Where all of a batch is of one length, or none is known, it is run as a whole.
    """
    if not cond.lengths:
        return run(x, sigma, cond)
    names = list(cond.lengths)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, tokens in enumerate(torch.stack([cond.lengths[n] for n in names], 1).tolist()):
        groups.setdefault(tuple(tokens), []).append(row)
    cuts = [dict(zip(names, tokens, strict=True)) for tokens in groups]
    if len(groups) == 1:
        return run(x, sigma, cond.cut(cuts[0]))
    found = []
    for cut, rows in zip(cuts, groups.values(), strict=True):
        index = to_device(torch.tensor(rows), x.device)
        found.append(run(x[index], sigma[index], cond.rows(index).cut(cut)))
    back = to_device(torch.tensor([row for rows in groups.values() for row in rows]).argsort(), x.device)
    return [torch.cat(each)[back] for each in zip(*found, strict=True)]


# Blocks of text and picture: where the picture stands in what they put out (first, where none is named),
# and those whose tokens may come as one sequence, the text's before the picture's.
PICTURE_AT = {"joint_blocks": -1, "transformer_blocks": -1, "single_transformer_blocks": -1}
ONE_SEQUENCE = ("single_blocks", "single_transformer_blocks")


def picture_part(tap: str, output: Tensor | tuple, text: int) -> Tensor:
    """What a tapped module put out -> its part of the picture, without the `text` tokens that went through beside."""
    kind = tap.split(".")[-2] if "." in tap else ""
    if isinstance(output, tuple):
        return output[PICTURE_AT.get(kind, 0)]
    return output[:, text:] if kind in ONE_SEQUENCE else output


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598) in numbers.

    `rescale` is phi of `rescaled`. It acts in the interval [start, end) of the timesteps alone (arXiv 2404.07724), 0
    being pure noise and 1 the picture; outside of it the condition is enough, in one row a sample.
    """

    scale: float = 1.0
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    @staticmethod
    def of(source: Any) -> Guidance:
        """That of a training's settings, or of a student's card."""
        return Guidance(source.guidance, source.guidance_rescale, source.guidance_start, source.guidance_end)

    def acts(self, schedule: Schedule, sigma: Tensor) -> Tensor:
        """Whether there is guidance at each of these noise levels (B,): (B,), on the CPU."""
        if self.scale == 1 or (self.start <= 0 and self.end >= 1):
            return torch.full(sigma.shape, self.scale != 1)
        done = 1 - schedule.timestep(sigma).cpu().double() / (schedule.timesteps - 1)
        return (self.start <= done) & (done < self.end)


def guided(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    cond: Cond,
    uncond: Cond | None,
    guidance: Guidance,
    acts: Tensor | None = None,
) -> Tensor:
    """Guidance at a noise level of each row's own: uncond + scale (cond - uncond), as x0 (B, C, H, W).

    Two rows a sample in one pass; one where guidance does not act or there is no `uncond`. `acts` (B,), on the CPU, is
    what `guidance.acts` would say: whoever drew the levels there need not wait for them.
    """
    schedule = denoiser.schedule
    acts = guidance.acts(schedule, sigma) if acts is None else acts
    if uncond is None or not acts.any():
        return denoiser(x, sigma, cond)
    whole = bool(acts.all())
    rows: Any = slice(None) if whole else to_device(acts.nonzero().flatten(), x.device)
    x_again, sigma_again = x[rows], sigma[rows]
    against = uncond.repeat(len(x_again)) if len(uncond) == 1 else uncond.rows(rows)
    both, negative = denoiser.both((x, sigma, cond), (x_again, sigma_again, against))
    positive = both[rows]
    result = negative + guidance.scale * (positive - negative)
    if guidance.rescale:
        result = rescaled(schedule, x_again, sigma_again, positive, result, guidance.rescale)
    return result if whole else both.index_copy(0, rows, result)


def rescaled(schedule: Schedule, x: Tensor, sigma: Tensor, positive: Tensor, result: Tensor, phi: float) -> Tensor:
    """Guidance that is no more contrasty than the condition alone (arXiv 2305.08891, eq. 15 and 16), as x0.

    The velocity of `result` gets a share `phi` of the standard deviation that the velocity of `positive` has.
    """
    kind = "flow" if isinstance(schedule, FlowSchedule) else "v"
    wanted, v = (schedule.from_x0(kind, x, x0, sigma) for x0 in (positive, result))
    factor = wanted.std((1, 2, 3), keepdim=True) / v.std((1, 2, 3), keepdim=True).clamp(min=1e-8)
    return schedule.to_x0(kind, x, (phi * factor + 1 - phi) * v, sigma)


@dataclass(frozen=True)
class Guided:
    """A denoiser with guidance and conditioning bound in, as samplers call it: `model(x, sigma)`."""

    denoiser: Denoiser
    cond: Cond
    uncond: Cond | None = None
    guidance: Guidance = Guidance()

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, sigma: Tensor, **_) -> Tensor:
        return guided(self.denoiser, x, sigma, self.cond, self.uncond, self.guidance)

    def rows(self, index) -> Guided:
        return replace(self, cond=self.cond.rows(index))
