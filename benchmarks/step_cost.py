"""What an update of a training costs, in time and memory, beside the passes that it is made of."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from turbodistill.core.denoiser import Cond, Denoiser
from turbodistill.core.student import Student
from turbodistill.trainer.config import Config
from turbodistill.trainer.data.samples import Samples
from turbodistill.trainer.loop.distill import distill
from turbodistill.trainer.loop.precision import autocast, cast_frozen
from turbodistill.trainer.loop.state import State
from turbodistill.trainer.run.memory import Memory, measure_memory

GB = 1024**3


@dataclass(frozen=True)
class Cost:
    """Seconds of each pass and of a whole update, by turn; bytes at the most, and as they were estimated."""

    seconds: dict[str, list[float]]
    update: list[float]
    peak: int
    estimate: Memory

    @property
    def ratios(self) -> list[float]:
        """An update over the sum of its passes in the same turn, rising."""
        sums = [sum(row) for row in zip(*self.seconds.values(), strict=True)]
        return sorted(whole / floor for whole, floor in zip(self.update, sums, strict=True))

    def lines(self) -> list[str]:
        """The cost in words."""
        told = [f"{name:<58} {_spread(values)}" for name, values in (self.seconds | {"an update": self.update}).items()]
        low, *_, high = self.ratios
        told.append(f"update / sum of its passes: {statistics.median(self.ratios):.3f} ({low:.3f} to {high:.3f})")
        told.append(f"peak {self.peak / GB:.2f} GB; estimate beforehand: {self.estimate.in_words()}")
        return told

    def row(self) -> dict[str, float]:
        """The cost in a few numbers, for a table."""
        return {
            "s/update": statistics.median(self.update),
            "over its passes": statistics.median(self.ratios),
            "peak GB": self.peak / GB,
            "estimated GB": self.estimate.total / GB,
        }


def _spread(values: list[float]) -> str:
    return f"median {statistics.median(values):7.3f} s, least {min(values):.3f}, most {max(values):.3f}"


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def restart_peak() -> None:
    """Begin to measure the most memory anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept is no need of what comes
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes at the most since `restart_peak`: on the accelerator, else of this process (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def seconds(work: Callable[[], object]) -> float:
    """The time that something takes on its device."""
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def heads(state: State, config: Config, x: Tensor, sigma: Tensor, cond: Cond) -> Callable[[], None]:
    """The passes of the heads that the losses need: one for the student, three of their own, with R1."""
    (critic,) = state.critics
    assert critic
    with torch.no_grad(), autocast(config, state.student.teacher):
        maps = critic.discriminator.standardise(state.critics[0].features(x, sigma, cond))

    def scores(given: list[Tensor]) -> Tensor:
        return torch.stack([out.float().mean() for out in critic.discriminator(given, sigma, cond.summary, None)]).sum()

    def work() -> None:
        given = [m.clone().requires_grad_(True) for m in maps]
        with autocast(config, state.student.teacher):
            critic.discriminator.requires_grad_(False)
            loss = scores(given)
            critic.discriminator.requires_grad_(True)
        loss.backward()
        with autocast(config, state.student.teacher):
            moved = [m + config.r1_noise * torch.randn_like(m) for m in maps]
            loss = torch.stack([scores(given) for given in (maps, maps, moved)]).sum()
        loss.backward()
        critic.discriminator.zero_grad(set_to_none=True)

    return work


def steps(state: State) -> Callable[[], None]:
    """Clipping, torch's own AdamW and a running average, on copies of what is trained."""
    assert state.critics
    groups = []
    for module in (state.student.trained, state.critics[0].discriminator):
        copies = [p.detach().clone().requires_grad_(True) for p in module.parameters()]
        for copied in copies:
            copied.grad = torch.randn_like(copied)
        groups.append((copies, torch.optim.AdamW(copies, lr=1e-6, fused=True)))
    average = [p.detach().clone() for p in groups[0][0]]

    def work() -> None:
        for copies, optimizer in groups:
            torch.nn.utils.clip_grad_norm_(copies, 1.0)
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in groups[0][0]], 0.01)

    return work


def measure(
    denoiser: Denoiser, config: Config, pairs: Samples, uncond: Cond, resolution: tuple[int, int], repeats: int = 5
) -> Cost:
    """The cost of an update of adversarial distillation with these settings, in `repeats` turns.

    In each turn every pass is timed once, so that whatever else the machine does falls on all alike.
    """
    size, device = config.batch_size, denoiser.device
    rows = torch.arange(size) % len(pairs)
    x, cond = pairs.latents[rows].to(device), pairs.cond.rows(rows).to(device)
    sigma = denoiser.schedule.sigma(torch.full((size,), 500.0)).to(device)
    student = Student(denoiser, config.rank, None, config.targets, config.prediction)
    state = State.create(student, config, pairs)
    estimate = measure_memory(state, pairs, resolution)
    restart_peak()
    updates = distill(state, pairs, uncond)
    for _ in range(2):
        next(updates)
    wait()
    most = peak()

    def learn() -> None:
        with state.checkpointed(), autocast(config, denoiser):
            loss = student(x, sigma, cond).float().square().mean()
        loss.backward()
        student.trained.zero_grad(set_to_none=True)

    def judge() -> None:
        given = x.clone().requires_grad_(True)
        with state.checkpointed(), autocast(config, denoiser):
            loss = torch.stack([f.square().mean() for f in state.critics[0].features(given, sigma, cond)]).sum()
        loss.backward()

    @torch.no_grad()
    def look() -> None:
        with autocast(config, denoiser):
            state.critics[0].features(x, sigma, cond)

    works = {
        "student, forward and backward": learn,
        "features of the student's picture, forward and backward": judge,
        "features of the positive, forward": look,
        "heads: the student's pass, their own three, R1's noise": heads(state, config, x, sigma, cond),
        "optimizers' steps, clipping and average": steps(state),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    whole: list[float] = []
    with student.training(), cast_frozen(config, denoiser):
        for turn in range(repeats + 1):
            for name, work in works.items():
                taken = seconds(work)
                if turn:  # the first is to warm up
                    times[name].append(taken)
            taken = seconds(lambda: next(updates))
            if turn:
                whole.append(taken)
    updates.close()
    state.release()
    return Cost(times, whole, most, estimate)
