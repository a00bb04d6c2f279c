"""A training in several processes, on one machine or many, as `accelerate launch` or `torchrun` starts them.

Only the joining is accelerate's. Its wrappers are left out: they want one network with one loss, and here a student, a
discriminator and a teacher share their weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.gradient_checkpointing import blocks
from ..trainer.config import PRODIGY, Config, ConfigError
from ..trainer.run.memory import is_out_of_memory
from ..trainer.world import ALONE, Apart, World

T = TypeVar("T")
PATIENCE = timedelta(
    hours=12
)  # the first process may be at something of its own; one that has ended is noticed at once


def launched() -> int:
    """How many processes a launcher has started for this training."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


def join(config: Config, fsdp: bool = False) -> World:
    """The place of this process among those that a launcher has started; ALONE without one.

    `fsdp`, or accelerate's own setting of it, spreads a full student over them. Raises ImportError without accelerate,
    ConfigError where the processes cannot be joined or the settings do not go with them.
    """
    if fsdp and (config.rank or launched() < 2):
        raise ConfigError(
            "--fsdp spreads a full student over several processes: give --rank 0, and start it with accelerate launch "
            "or torchrun; a LoRA is small, and is trained in several processes without it"
        )
    count = launched()
    if count < 2:
        return ALONE
    try:
        from accelerate import PartialState
    except ImportError:
        raise ImportError("a training in several processes needs accelerate: pip install accelerate") from None
    try:
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the {count} processes could not be joined ({error!s:.300}): start all of them") from None
    if state.num_processes != count:  # each would train alone, over the other's files
        raise ConfigError(
            f"{count} processes were started, and only {state.num_processes} joined: start them with accelerate launch "
            "--multi_gpu or torchrun"
        )
    asked = fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    shards = asked and not config.rank
    if shards and config.precision == "float16":
        raise ConfigError("precision is float16, of which FSDP cannot scale the losses: use bfloat16")
    if shards and config.optimizer == PRODIGY:
        raise ConfigError("optimizer is 'prodigy', which estimates from whole weights what FSDP spreads: use adamw")
    return Processes(state.process_index, count, shards)


class Processes(World):
    """Those of a process group. What is not on a GPU goes over the network by gloo, so that no GPU is waited for."""

    def __init__(self, rank: int, size: int, shards: bool = False):
        self.rank, self.size, self.shards = rank, size, shards
        self._slow: Any = dist.new_group(backend="gloo", timeout=PATIENCE)

    def gather(self, rows: Tensor, whole: int) -> Tensor:
        most = -(-whole // self.size)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _together():
            dist.all_gather(parts, padded, self._group(rows))
        starts = [whole * rank // self.size for rank in range(self.size + 1)]
        return torch.cat([p[: b - a] for p, a, b in zip(parts, starts, starts[1:], strict=False)])

    def average(self, tensor: Tensor) -> Tensor:
        with _together():
            dist.all_reduce(tensor, group=self._group(tensor))
        return tensor.div_(self.size)

    def told(self, value: T) -> T:
        box = [value]
        with _together():
            dist.broadcast_object_list(box, 0, self._slow)
        return box[0]

    def shard(self, module: nn.Module) -> None:
        """As FSDP2 does: each block's parameters are put together for its passes alone."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(next(module.parameters()).device.type, (self.size,))
        try:
            inner = blocks(module)
        except ValueError:  # of none that is known: as a whole
            inner = {}
        for part in (*inner.values(), module):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)

    def _group(self, tensor: Tensor) -> Any:
        return self._slow if tensor.device.type == "cpu" else None


@contextmanager
def _together() -> Iterator[None]:
    """Within, what another process's end makes the library raise is Apart."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise Apart(
            "another process of this training has ended, and said why. What was saved last is kept: start all of them "
            "again to go on"
        ) from error


def leave() -> None:
    """Part from the others, at the end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
