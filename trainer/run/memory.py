"""How much memory a training will take, measured on one sample before the first step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.denoiser import Cond
from ...core.gradient_checkpointing import blocks
from ..config import Config
from ..data.samples import Samples
from ..loop.precision import autocast
from ..loop.state import State

GB = 1024**3
# What to change when memory does not suffice, in the order in which it costs least.
REMEDIES = (
    "set gradient_checkpointing to true",
    "lower batch_size and raise gradient_accumulation by as much",
    "make smaller pictures",
    "lower rank",
)


class OutOfMemory(RuntimeError):
    """The device's memory did not suffice; the message says what to change."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an accelerator's or a CPU's refusal to allocate."""
    said = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate" in said or "out of memory" in said


def advice(what: str, config: Config | None = None, latent_shape: Sequence[int] = ()) -> str:
    """What to say when memory ran out during `what`: in a training with its settings and latents (C, H, W)."""
    if config is None:
        return f"out of memory while {what}: make fewer at once, or smaller pictures"
    height, width = latent_shape[1:]
    remedies = [r for r in REMEDIES if not (config.gradient_checkpointing and "gradient_checkpointing" in r)]
    if config.batch_size == 1:
        remedies = [r for r in remedies if not r.startswith("lower batch_size")]
    now = f"batch_size {config.batch_size}, latents of {width} x {height}, rank {config.rank}"
    return f"out of memory while {what} ({now}): {', or '.join(remedies)}"


@dataclass(frozen=True)
class Memory:
    """Bytes that a training takes."""

    weights: int  # the model, once
    trained: int  # LoRA or copy, with gradients, Adam's moments and the average
    activations: int  # kept for backward, of the whole batch
    on_disk: int = 0  # teacher pairs with their conditioning, which are read from there

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.activations

    def in_words(self, free: int | None = None) -> str:
        """One sentence; `free` bytes on the device, the weights' included, make it a comparison."""
        parts = ((self.weights, "weights"), (self.trained, "student"), (self.activations, "activations"))
        words = f"training takes about {_size(self.total)}: " + ", ".join(f"{_size(n)} {what}" for n, what in parts)
        pairs = f"; the teacher pairs take {_size(self.on_disk)} on disk" if self.on_disk else ""
        if free is None:
            return words + pairs
        if free >= self.total:
            return f"{words}; {_size(free)} are there{pairs}"
        return f"{words}; only {_size(free)} are there{pairs}. It may run out of memory: {', or '.join(REMEDIES)}"


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1024**2:.0f} MB"


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class _SavedTensors:
    """Counts what autograd would keep of a pass, by block, and keeps nothing of it."""

    def __init__(self, backbone: nn.Module, parameters: set[int]):
        self.backbone, self.parameters = backbone, parameters
        self.inside: dict[str, int] = defaultdict(int)  # bytes by block; "" is outside of all
        self.inputs = 0
        self._now = ""

    def __enter__(self) -> _SavedTensors:
        try:
            found = blocks(self.backbone)
        except ValueError:
            found = {}
        self._handles = [m.register_forward_pre_hook(self._enter(n), with_kwargs=True) for n, m in found.items()]
        self._handles += [m.register_forward_hook(self._leave, always_call=True) for m in found.values()]
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, self._gone)
        self._hooks.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._hooks.__exit__(*_)
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str):
        def hook(_module, args, kwargs):
            self._now = name
            self.inputs += _bytes(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))

        return hook

    def _leave(self, *_told) -> None:
        self._now = ""

    def _count(self, tensor: Tensor) -> tuple:
        # What two operations keep is counted twice: nothing is kept, so addresses do not tell tensors apart.
        if tensor.untyped_storage().data_ptr() not in self.parameters:
            self.inside[self._now] += tensor.numel() * tensor.element_size()
        return ()

    @staticmethod
    def _gone(_packed):
        raise RuntimeError("a pass that was only counted has no backward")

    def total(self, checkpointing: bool) -> int:
        if not checkpointing or len(self.inside) < 2:
            return sum(self.inside.values())
        return self.inside[""] + self.inputs + max(n for name, n in self.inside.items() if name)


def measure_memory(state: State, pairs: Samples) -> Memory:
    """Count on one sample what a step of the batch keeps: a forward of the student, one of the features."""
    config, student = state.config, state.student
    device = student.device
    x = pairs.latents[:1].to(device)
    cond: Cond = pairs.cond.rows(slice(1)).to(device)
    modules: list[nn.Module] = [student.teacher.backbone, student.trained, state.discriminator]
    known = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
    sigma = student.schedule.sigma(torch.tensor([500.0])).to(device)
    saved = 0
    with student.training(), autocast(config, student, student.teacher):
        with _SavedTensors(student.backbone, known) as passes:
            student(x, sigma, cond)
        saved += passes.total(config.gradient_checkpointing)
        if config.adversarial_weight > 0 or config.feature_weight > 0:
            with _SavedTensors(student.teacher.backbone, known) as passes:
                state.features(x.clone().requires_grad_(True), sigma, cond)
            saved += passes.total(config.gradient_checkpointing)
    trained = [
        *student.trained.parameters(),
        *(state.fake_score.denoiser.trained.parameters() if state.fake_score else ()),
    ]
    weights = _bytes(student.teacher.backbone.parameters())
    # A parameter beside its gradient, Adam's two moments and the running average.
    return Memory(
        weights, 5 * _bytes(trained) + 4 * _bytes(state.discriminator.parameters()), saved * config.batch_size
    )
