"""The memory that a training takes, simulated without a GPU, beside what is estimated before it starts.

    python benchmarks/simulated_memory.py                                     # a table
    python benchmarks/simulated_memory.py --model sdxl --size 1024 --rank 0 --checkpointing

The real update runs twice on tensors without numbers, and every storage that it makes counts as long as it lives. What
a GPU takes for itself comes on top: its context, about half a GB, and what its allocator cannot use.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import shapes
import torch
import turbodistill as td
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from turbodistill.core import student as student_of
from turbodistill.core.student import Student
from turbodistill.trainer.loop import batch, distill
from turbodistill.trainer.loop.state import State
from turbodistill.trainer.run.memory import Memory, measure_memory

GB = 1024**3
CPU = torch.device("cpu")
# Kind, pixels of a side, batch, rank (0: in full), checkpointing.
TABLE = [
    ("sd15", 512, 1, 64, False), ("sd15", 512, 4, 64, False), ("sd15", 512, 4, 64, True), ("sd15", 512, 1, 0, True),
    ("sd15", 1024, 1, 64, True), ("sdxl", 512, 1, 64, True), ("sdxl", 1024, 1, 64, False), ("sdxl", 1024, 1, 64, True),
    ("sdxl", 1024, 4, 64, True), ("sdxl", 1024, 1, 0, True), ("flux", 512, 1, 16, True), ("flux", 1024, 1, 16, True),
    ("flux", 1024, 1, 16, False),
]  # fmt: skip


class Live(TorchDispatchMode):
    """The bytes of the storages that live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


def without_numbers(mode: FakeTensorMode, value: Any) -> Any:
    """A tensor or condition of the same shape."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, batch.Some):
        return dataclasses.replace(value, rows=mode.from_tensor(value.rows))
    return value.map(mode.from_tensor) if isinstance(value, td.core.denoiser.Cond) else value


def in_float32(module: nn.Module) -> nn.Module:
    """`module.float()`, which tensors without numbers do not let torch do."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
    return module


@contextmanager
def simulated(mode: FakeTensorMode) -> Iterator[None]:
    """Within, batches are drawn with numbers and given without, and nothing asks a tensor for its number."""
    own = batch.draw_batch

    def draw(config: Any, student: Any, *data: Any, **more: Any) -> batch.Batch:
        with unset_fake_temporarily():
            stand_in = SimpleNamespace(schedule=student.schedule, device=CPU, start_timestep=student.start_timestep)
            pairs, reals, _draws, *fresh = data
            made = own(config, stand_in, pairs, reals, torch.Generator().manual_seed(0), *fresh, **more)
        fields = {f.name: without_numbers(mode, getattr(made, f.name)) for f in dataclasses.fields(made)}
        return dataclasses.replace(made, **fields)

    with ExitStack() as stack:
        for target, name, value in (
            (batch, "draw_batch", draw),
            (distill, "generator", lambda *_: None),
            (student_of, "check_copyable", lambda _: None),  # it takes tensors of any class for quantised ones
            (nn.Module, "to", lambda module, *_, **__: module),
            (nn.Module, "float", in_float32),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def peak(kind: str, size: int, config: td.Config) -> tuple[int, Memory]:
    """Bytes at the most in two updates, and what was estimated."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    pairs, uncond = shapes.pairs(kind, size), shapes.condition(kind, 1, size)
    with mode:
        network = shapes.network(kind, CPU, torch.bfloat16)
    denoiser = shapes.around(kind, network)  # its schedule has numbers
    with mode, simulated(mode):
        sample = dataclasses.replace(
            pairs, latents=without_numbers(mode, pairs.latents), cond=without_numbers(mode, pairs.cond)
        )
        with mock.patch.object(torch, "randint", lambda *_: 0):  # the seed of its beginning
            student = Student(denoiser, config.rank)
        state = State.create(student, config, sample)
        state.discriminator._calibrated = True
        live = Live()
        for module in (network, student.trained, state.average, state.discriminator):
            for tensor in (*module.parameters(), *module.buffers()):
                live.add(tensor)
        updates = distill.distill_groups(state, [batch.Group(pairs, uncond)])
        with live:
            for _ in range(2):
                next(updates)
        updates.close()
        found = measure_memory(state, sample, (size, size))
        state.release()
    return live.most, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(shapes.SHAPES), help="one training in place of the table")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA; 0 trains in full")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    one = (args.model, args.size, args.batch_size, args.rank, args.checkpointing)
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    print(f"{'':<48}{'simulated':>10}{'estimated':>10}{'off':>7}    a preview besides")
    for kind, size, count, rank, checkpointing in [one] if args.model else TABLE:
        config = td.Config(
            rank=rank, batch_size=count, gradient_checkpointing=checkpointing, precision="bfloat16", updates=100,
            regression_updates=0, discriminator_warmup=0, adversarial_ramp=0, log_every=100,
        )  # fmt: skip
        most, estimate = peak(kind, size, config)
        told = estimate.weights + estimate.trained + estimate.activations
        form = f"LoRA {rank}" if rank else "full"
        name = f"{kind} {size} px, batch {count}, {form}{', checkpointing' if checkpointing else ''}"
        rest = f"{estimate.decoding / GB:.2f} GB"
        print(f"{name:<48}{most / GB:>7.2f} GB{told / GB:>7.2f} GB{told / most - 1:>+7.0%}    {rest}", flush=True)


if __name__ == "__main__":
    main()
