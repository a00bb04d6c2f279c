"""The loop shared by the trainings of the recipe: AdamW, warmup-stable-decay, averages, resumable to the bit."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, autocast, nn
from tqdm import tqdm

from ...core.precision import fast_bfloat16
from . import averages, compact

FORMAT = 1  # of a state file
ARCHIVE = b"PK\3\4"  # how the files that torch writes begin since 1.6
RATE_WARMUP = 200  # updates in which the learning rate rises


def arguments(description: str, updates: int | None) -> argparse.ArgumentParser:
    """The options that each training of the recipe takes."""
    from .dataset import BUILD

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUILD, help="where the data lies and the result goes")
    text = "updates in all; a resumed run counts on" + ("" if updates else " (default: until it is stopped)")
    parser.add_argument("--updates", type=int, default=updates, help=text)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--save-every", type=int, default=500, help="updates between saved states (default: 500)")
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with the parser's error for a number that no training can have."""
    for name in ("updates", "batch_size", "save_every", "decay"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}: give at least 1")
    if not 0 < args.lr < 1:
        parser.error(f"--lr is {args.lr}: give a number between 0 and 1")
    try:
        torch.zeros(1, device=args.device)
        if torch.device(args.device).type == "meta":
            raise ValueError("it computes nothing")
    except (RuntimeError, ValueError, AssertionError) as error:
        parser.error(f"--device is {args.device!r:.40}, which is none of this machine's ({str(error).splitlines()[0]})")


def low_precision(device: str) -> autocast:
    """Passes in bfloat16 where the device is fast in it."""
    return autocast(device, torch.bfloat16, enabled=fast_bfloat16(torch.device(device)))


@dataclass
class Training:
    """A model in training: its weights, AdamW's moments, two power-function averages, and how far it is.

    `settings` is what makes two trainings different; a state of other settings is refused.
    """

    model: nn.Module
    settings: dict[str, Any] = field(default_factory=dict)
    step: int = 0  # updates made
    images: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
        self.averages = {std: {n: p.detach().clone() for n, p in self.trainable.items()} for std in averages.TRACKED}

    def update(self, loss: Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainable.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            for std, slow in self.averages.items():
                new = 1 - averages.keep_of(std, self.step)
                torch._foreach_lerp_(list(slow.values()), [p.detach() for p in self.trainable.values()], new)

    def finish(self) -> nn.Module:
        """The model with the narrower of its averages."""
        with torch.no_grad():
            for name, value in self.averages[averages.TRACKED[0]].items():
                self.trainable[name].copy_(value)
        return self.model.eval().requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """What `load` takes: tensors of six bytes a parameter in all, and plain numbers."""
        weights = {n: p.detach().half() for n, p in self.trainable.items()}
        moments = [self.optimizer.state[p] for p in self.trainable.values()]
        return {
            "format": FORMAT,
            "settings": self.settings,
            "progress": {"step": self.step, "images": self.images, "seconds": self.seconds},
            "weights": weights,
            "first": {n: tuple(compact.rows(m["exp_avg"])) for n, m in zip(weights, moments, strict=True)},
            "second": {n: compact.logarithm(m["exp_avg_sq"]) for n, m in zip(weights, moments, strict=True)},
            # An average differs from the weights by little: the difference needs few bits.
            "averages": {
                std: {n: tuple(compact.rows(slow[n] - weights[n].float())) for n in weights}
                for std, slow in self.averages.items()
            },
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises ValueError for one of another format, model or settings."""
        if state.get("format") != FORMAT:
            raise ValueError(f"a state of format {state.get('format')}, not {FORMAT}: begin in another folder")
        other = {k: (v, self.settings.get(k)) for k, v in state["settings"].items() if self.settings.get(k) != v}
        if other or state["settings"].keys() != self.settings.keys():
            raise ValueError(
                f"a state of other settings (saved, asked for): {other}: give the saved ones, or another folder"
            )
        if state["weights"].keys() != self.trainable.keys():
            raise ValueError("a state of another model: begin in another folder")
        self.step, self.images, self.seconds = (state["progress"][k] for k in ("step", "images", "seconds"))
        for name, parameter in self.trainable.items():
            device = parameter.device
            parameter.copy_(state["weights"][name])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": compact.Rows(*state["first"][name]).decode().to(device),
                "exp_avg_sq": compact.exponential(state["second"][name]).to(device),
            }
            for std, slow in self.averages.items():
                slow[name].copy_(parameter + compact.Rows(*state["averages"][std][name]).decode().to(device))

    def save(self, path: Path) -> None:
        """Write the state, whole or not at all, and go on from just what was written."""
        state = self.state()
        self.load(state)
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def load_file(self, path: Path) -> None:
        """Go on from a file that `save` wrote; raises as `load`, and ValueError for a file of another kind."""
        self.load(read_state(path))


def read_state(path: Path) -> dict[str, Any]:
    """What `Training.save` wrote; raises ValueError for a file of another kind, and OSError."""
    with path.open("rb") as file:
        # Before 2.6 torch runs the code in files of its older formats, weights_only or not: CVE-2025-32434.
        begins = file.read(len(ARCHIVE))
    try:
        state = torch.serialization.load(path, weights_only=True) if begins == ARCHIVE else None
    except Exception:  # a broken archive has many ways to say so
        state = None
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise ValueError(f"{path} is no state that was saved here, or is broken: begin in another folder")
    return state


def rate_scale(step: int, updates: int | None, decay: int) -> float:
    """Warmup, stable, decay (arXiv 2404.06395): rises, stays, and falls linearly over the last `decay` of `updates`."""
    left = 1.0 if not decay or updates is None else (updates - step) / decay
    return max(0.0, min(1.0, (step + 1) / RATE_WARMUP, left))


def fit(
    training: Training,
    loss: Callable[[Any, int], Tensor],
    path: Path,
    lr: float,
    batch_size: int,
    updates: int | None,
    decay: int = 0,
    save_every: int = 500,
    kept: Path | None = None,
    check: Callable[[Training], dict[str, float]] | None = None,
) -> None:
    """Train until `updates` are made in all, or for ever; with `decay`, the rate falls over the last of them.

    `loss(model, step)` gives a scalar that depends on the step alone. Every `save_every` updates the state goes to
    `path`, a line of progress (with what `check` measures) to `path` with the suffix .jsonl, and, each time that the
    training has grown by a twentieth, the averages to the folder `kept`.
    """
    if path.exists():
        training.load_file(path)
    progress = path.with_suffix(".jsonl")
    total, began, count = torch.zeros(()), time.monotonic(), 0
    noted = max((step for step, _ in averages.saved_files([kept], training.step)), default=0) if kept else 0
    with _stopping() as asked, tqdm(total=updates, initial=training.step, desc=path.stem, unit="update") as bar:
        while updates is None or training.step < updates:
            if asked:
                training.seconds += time.monotonic() - began
                training.save(path)
                raise KeyboardInterrupt(f"stopped at update {training.step}, which is saved")
            value = loss(training.model, training.step)
            training.update(value, lr * rate_scale(training.step, updates, decay))
            training.images += batch_size
            total, count = total.to(value.device) + value.detach(), count + 1
            last = training.step == updates
            bar.update(1)
            if training.step % save_every and not last:
                continue
            training.seconds += time.monotonic() - began
            if kept and (last or training.step >= 1.05 * noted):
                averages.write(kept, training.step, training.averages)
                noted = training.step
            line = {"step": training.step, "images": training.images, "hours": training.seconds / 3600}
            line |= {"loss": total.item() / count} | (check(training) if check else {})
            with progress.open("a") as file:
                file.write(("" if _ends_a_line(progress) else "\n") + json.dumps(line) + "\n")
            training.save(path)
            bar.set_postfix({k: f"{v:.4f}" for k, v in line.items() if k not in ("step", "images")}, refresh=False)
            total, began, count = torch.zeros(()), time.monotonic(), 0


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Within, Ctrl-C and SIGTERM are heard after the update that is under way; a second one breaks off at once."""
    asked: list[int] = []

    def hear(number: int, _frame: object) -> None:
        asked.append(number)
        signal.signal(number, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ends_a_line(path: Path) -> bool:
    """Whether a text can be appended: a kill may have cut its last line."""
    return not path.exists() or path.stat().st_size == 0 or path.read_bytes()[-1:] == b"\n"


def read_progress(path: Path) -> list[dict[str, float]]:
    """The lines of progress beside the state `path`, in order; of those made twice (after a kill) the later one.

    Lines that a kill has cut are left out.
    """
    lines, rows = path.with_suffix(".jsonl"), {}
    for line in lines.read_bytes().splitlines() if lines.exists() else ():
        try:
            row = json.loads(line)
            rows[row["step"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return [row for _, row in sorted(rows.items())]
