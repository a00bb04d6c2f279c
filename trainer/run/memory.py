"""How much memory a training will take, measured on a sample before the first step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ...core.denoiser import Cond
from ...core.gradient_checkpointing import blocks
from ...core.sharded import own_part
from ..config import Config
from ..data.samples import Samples
from ..host import decoded_at_once
from ..loop.precision import autocast, cast_frozen
from ..loop.state import State

GB = 1024**3
PREVIEWS = 8  # pictures
# Bytes a pixel that the decoder of Stable Diffusion's autoencoders takes, in float32: a few maps of 256 channels.
DECODING = 3200
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
    decoding: int = 0  # of a preview, between two updates

    @property
    def total(self) -> int:
        return self.weights + self.trained + max(self.activations, self.decoding)

    def in_words(self, free: int | None = None) -> str:
        """One sentence; `free` bytes on the device, the weights' included, make it a comparison."""
        largest = max((self.activations, "activations"), (self.decoding, "a preview"))
        parts = ((self.weights, "weights"), (self.trained, "student"), largest)
        listed = ", ".join(f"{size_in_words(n)} {what}" for n, what in parts)
        words = f"training takes about {size_in_words(self.total)}: {listed}"
        if free is None:
            return words
        if free >= self.total:
            return f"{words}; {size_in_words(free)} are there"
        return f"{words}; only {size_in_words(free)} are there. It may run out of memory: {', or '.join(REMEDIES)}"


def size_in_words(count: int) -> str:
    """Bytes in the unit that fits."""
    if count >= GB / 10:
        return f"{count / GB:.1f} GB"
    return f"{count / 1024**2:.0f} MB" if count >= 1024**2 else "less than 1 MB"


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in map(own_part, tensors))


@dataclass(frozen=True)
class _Kept:
    """Bytes that autograd keeps of a pass."""

    inside: dict[str, int]  # by block; "" is outside of all
    inputs: int  # of the blocks

    def of_batch(self, of_two: _Kept, size: int) -> _Kept:
        """What a batch keeps, by what one sample and two keep.

        Not all grows with the batch: under autocast each pass has its own casts of frozen weights, which stay.
        """

        def line(one: int, two: int) -> int:
            return one + (size - 1) * (two - one)

        inside = {name: line(count, of_two.inside.get(name, count)) for name, count in self.inside.items()}
        return _Kept(inside, line(self.inputs, of_two.inputs))

    def total(self, checkpointing: bool) -> int:
        if not checkpointing or len(self.inside) < 2:
            return sum(self.inside.values())
        return self.inside.get("", 0) + self.inputs + max(n for name, n in self.inside.items() if name)


class _SavedTensors:
    """Counts what autograd would keep of a pass, by block, and keeps nothing of it."""

    def __init__(self, backbone: nn.Module, parameters: Iterable[Tensor]):
        self.backbone = backbone
        self._inside: dict[str, int] = defaultdict(int)
        self._inputs = 0
        # A weak reference holds no memory, but no other storage takes its address either: each is counted once.
        self._counted = {ref.cdata: ref for ref in (StorageWeakRef(p.untyped_storage()) for p in parameters)}
        self._given: dict[int, StorageWeakRef] = {}
        self._now = ""

    @property
    def kept(self) -> _Kept:
        return _Kept(dict(self._inside), self._inputs)

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
            self._inputs += sum(_new(a, self._given) for a in (*args, *kwargs.values()) if isinstance(a, Tensor))

        return hook

    def _leave(self, *_told) -> None:
        self._now = ""

    def _count(self, tensor: Tensor) -> tuple:
        self._inside[self._now] += _new(tensor, self._counted)
        return ()

    @staticmethod
    def _gone(_packed):
        raise RuntimeError("a pass that was only counted has no backward")


def _new(tensor: Tensor, counted: dict[int, StorageWeakRef]) -> int:
    """Bytes of a tensor's storage; 0 if it is counted already."""
    storage = tensor.untyped_storage()
    ref = StorageWeakRef(storage)
    return 0 if counted.setdefault(ref.cdata, ref) is not ref else storage.nbytes()


def measure_memory(state: State, pairs: Samples, resolution: tuple[int, int]) -> Memory:
    """Count on one sample and on two what a step keeps: a forward of the student, one of the features.

    `resolution` are the pixels (width, height) of a picture. Of several processes it is what each takes.
    """
    config, student = state.config, state.student
    batch_size = config.batch_size // state.world.size
    heads = list(state.critic.discriminator.parameters()) if state.critic else []
    modules: list[nn.Module] = [student.teacher.backbone, student.trained]
    parameters = [*(p for m in modules for p in m.parameters()), *heads]
    sigma = student.schedule.sigma(torch.tensor([500.0])).to(student.device)
    sample: Cond = pairs.cond.rows(slice(1)).to(student.device)
    latents = pairs.latents[:1].to(student.device)

    def passes(count: int) -> list[_Kept]:
        """What the passes of so many samples keep."""
        x, cond = latents.repeat(count, 1, 1, 1), sample.repeat(count)
        with _SavedTensors(student.backbone, parameters) as of_student:
            student(x, sigma.expand(count), cond)
        found = [of_student.kept]
        if state.critic and (config.adversarial_weight > 0 or config.feature_weight > 0):
            with _SavedTensors(student.teacher.backbone, parameters) as of_features:
                state.critic.features(x.clone().requires_grad_(True), sigma.expand(count), cond)
            found.append(of_features.kept)
        return found

    with student.training(), cast_frozen(config, student.teacher), autocast(config, student, student.teacher):
        weights = _bytes(student.teacher.backbone.parameters())
        one = passes(1)
        two = passes(2) if batch_size > 1 else one
    batches = [a.of_batch(b, batch_size) for a, b in zip(one, two, strict=True)]
    trained = [
        *student.trained.parameters(),
        *(state.fake_score.denoiser.trained.parameters() if state.fake_score else ()),
    ]
    return Memory(
        weights,
        # A parameter beside its gradient, Adam's two moments and the running average.
        5 * _bytes(trained) + 4 * _bytes(heads),
        sum(kept.total(config.gradient_checkpointing) for kept in batches),
        decoding=DECODING * math.prod(resolution) * min(PREVIEWS, decoded_at_once(resolution)),
    )
