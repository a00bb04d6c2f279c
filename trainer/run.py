"""What every front end shares: pairs, training, checkpoints, previews, the choice of the best student.

`run(...)` yields events; the command line, the node and the tab each show them in their own way.
"""

from __future__ import annotations

import csv
import io
import logging
import random
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.card import StudentCard, read_card
from ..core.features import TeacherFeatures
from ..core.schedule import trailing_timesteps
from ..core.student import Student, student_bytes
from . import data, health
from .config import Config, ConfigError
from .distill import Diverged, State, Step, distill, tap_names
from .host import Host
from .metrics import kernel_distance
from .precision import autocast

log = logging.getLogger(__name__)

STATE, HISTORY, BEST = "state.pt", "history.csv", "student.safetensors"
HELD_OUT = 96  # pairs, at most, that are kept from training to choose the best student by
FEWEST = 4  # of them, with which every score works
PREVIEWS = 8

# Scores pictures of the student against the teacher's for the same prompts and noise; lower is better.
Score = Callable[[Tensor, Tensor], float]


class Interrupted(Exception):
    """The user ended a run before its time, after everything was saved; front ends raise it."""


@dataclass(frozen=True)
class PairsMade:
    """`done` of `total` teacher pairs (or pictures encoded, by `what`) are on disk."""

    done: int
    total: int
    what: str
    newest: data.Samples


@dataclass(frozen=True)
class Preview:
    """The student's and the teacher's latents (N, C, H, W) for the same prompts and noise."""

    update: int
    student: Tensor
    teacher: Tensor
    prompts: list[str]


@dataclass(frozen=True)
class Selected:
    """A measurement on the held-out pairs; `best` if no earlier student scored lower."""

    update: int
    score: float
    best: bool


@dataclass(frozen=True)
class Warned:
    """Something that the user should know, in words."""

    update: int
    text: str


@dataclass(frozen=True)
class Finished:
    """The end: the student file, its card, and the score by which it was chosen, if one was taken."""

    path: Path
    card: StudentCard
    score: float | None


Event = PairsMade | Step | Preview | Selected | Warned | Finished


@contextmanager
def averaged(state: State) -> Iterator[None]:
    """The student acts with the running average of its weights within."""
    live = list(state.student.trained.parameters())
    kept = [p.data for p in live]
    try:
        for parameter, slow in zip(live, state.average.parameters(), strict=True):
            parameter.data = slow.data
        yield
    finally:
        for parameter, value in zip(live, kept, strict=True):
            parameter.data = value


def student_pictures(state: State, pairs: data.Samples, rows: Tensor, steps: int = 1) -> Tensor:
    """Latents (N, C, H, W), float32 on the CPU, that the averaged student makes from these pairs' noise."""
    device = state.student.device
    parts = []
    with averaged(state), state.student.merged(), autocast(state.config, device):
        for chunk in rows.split(state.config.batch):
            cond = pairs.cond.rows(chunk).to(device)
            parts.append(state.student.generate(pairs.noise(chunk).to(device), cond, steps).float().cpu())
    return torch.cat(parts)


def split(pairs: data.Samples) -> tuple[Tensor, Tensor]:
    """Rows to train on and held-out rows: those of every tenth prompt, or of every tenth pair if prompts are few.

    At least FEWEST are held out; of fewer than twice as many pairs, all are both.
    """
    unique = sorted(set(pairs.prompts))
    random.Random(0).shuffle(unique)
    if len(unique) >= 20:
        held = set(unique[: max(FEWEST, len(unique) // 10)])
        mask = torch.tensor([p in held for p in pairs.prompts])
    else:
        every = max(2, min(10, len(pairs) // FEWEST))
        mask = torch.arange(len(pairs)) % every == every - 1
    if mask.sum() < FEWEST:
        rows = torch.arange(len(pairs))
        return rows, rows[:PREVIEWS]
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()[:HELD_OUT]


def take(samples: data.Samples, rows: Tensor) -> data.Samples:
    seeds = None if samples.seeds is None else samples.seeds[rows]
    texts = [samples.prompts[i] for i in rows.tolist()]
    return data.Samples(samples.latents[rows], samples.cond.rows(rows), texts, seeds)


def save_state(state: State, folder: Path) -> None:
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    data.write_whole(folder / STATE, buffer.getvalue())


def resume(state: State, folder: Path) -> bool:
    """Load the folder's last state, if it has one; raises ConfigError if it was made with other settings."""
    path = folder / STATE
    if not path.exists():
        return False
    try:
        saved = torch.serialization.load(path, weights_only=True, map_location=state.student.device)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete it to begin anew; the teacher pairs stay") from None
    state.load_state_dict(saved)
    return True


def make_card(host: Host, state: State, metrics: dict[str, Any]) -> StudentCard:
    config, student = state.config, state.student
    return StudentCard(
        kind="lora" if student.lora is not None else "full",
        base_model=host.name,
        base_hash=host.base_hash,
        architecture=host.architecture,
        prediction=student.reading,
        base_prediction=student.prediction,
        timesteps=tuple(trailing_timesteps(config.steps, student.start, student.schedule.timesteps)),
        guidance=config.guidance,
        resolution=host.resolution,
        rank=config.rank,
        alpha=student.lora.alpha if student.lora is not None else 0.0,
        targets=config.targets,
        method=_method(config),
        training={"updates": state.update, "minutes": round(state.spent / 60, 1), **_told(config)},
        metrics=metrics,
    )


def _method(config: Config) -> str:
    """What the student was made by, in the papers' names."""
    names = ["ADD/LADD"] if config.adversarial_weight > 0 else []
    if config.distillation_weight > 0:
        names.append(
            {"matching": "distribution matching", "nfsd": "NFSD"}.get(config.distillation, "ADD's distillation")
        )
    return ", ".join(names) or "regression to the teacher's pictures"


def _told(config: Config) -> dict[str, Any]:
    """The settings that a reader of the card asks for."""
    names = (
        "pairs",
        "batch",
        "steps",
        "positives",
        "adversarial",
        "adversarial_weight",
        "distillation",
        "distillation_weight",
    )
    return {n: getattr(config, n) for n in (*names, "regression_weight", "seed")}


def write_student(host: Host, state: State, path: Path, metrics: dict[str, Any]) -> StudentCard:
    """Save the averaged student with its card."""
    card = make_card(host, state, metrics)
    with averaged(state):
        data.write_whole(path, student_bytes(state.student, card))
    return card


class History:
    """Losses and health of every update, in a CSV file that grows as training goes."""

    def __init__(self, path: Path, update: int):
        self.path = path
        self.columns: list[str] = []
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [r for r in csv.DictReader(file) if None not in r.values() and int(r["update"]) <= update]
        # A run killed after its last saved state repeats some updates: their rows are dropped, as is a row cut short.
        if rows:
            self.columns = list(rows[0])
            self._write(rows, "w")
        elif path.exists():
            path.unlink()

    def add(self, step: Step) -> None:
        row = {"update": step.update, "seconds": round(step.seconds, 4), **asdict(step.health), **step.losses}
        if not set(row) <= set(self.columns):
            old = []
            if self.path.exists():
                with self.path.open(newline="") as file:
                    old = list(csv.DictReader(file))
            self.columns += [c for c in row if c not in self.columns]
            self._write([*old, row], "w")
        else:
            self._write([row], "a")

    def _write(self, rows: Sequence[dict[str, Any]], mode: str) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)
        if mode == "w":
            data.write_whole(self.path, text.getvalue().encode())
        else:
            with self.path.open("a", newline="") as file:
                file.write(text.getvalue())


def latent_score(student: Tensor, teacher: Tensor) -> float:
    """Kernel distance on downsampled latents, which every host has. Front ends with a feature network pass theirs."""
    size = min(8, student.shape[-1])
    pooled = [torch.nn.functional.adaptive_avg_pool2d(x.float(), size).flatten(1) for x in (student, teacher)]
    return kernel_distance(*pooled)


def run(
    host: Host,
    config: Config,
    folder: str | Path,
    prompts: Sequence[str],
    images: str | Path | None = None,
    score: Score = latent_score,
    pairs_folder: str | Path | None = None,
) -> Iterator[Event]:
    """Distil `host`'s model into a one-step student, in `folder`; an earlier run there goes on.

    Makes what is missing of the teacher pairs (in `pairs_folder`, by default inside `folder`), then
    trains; yields events as it goes. Closing the generator saves the state and stops. `images` is a
    captioned folder of real pictures for the discriminator. Ends with Finished. Raises DataError,
    ConfigError, or Diverged (after writing the last good student).
    """
    folder = Path(folder)
    _writable(folder)
    pairs_folder = Path(pairs_folder or folder / "pairs")
    if images is None and config.positives != "teacher":
        raise ConfigError(f"positives is {config.positives!r} but there are no images: give a folder, or use 'teacher'")
    total = 0 if images is None else len(data.read_image_folder(images))
    if config.rank:  # a setting that does not fit this model is told before hours of pairs
        _create(host, config).release()
    for done, newest in data.make_pairs(host, config, prompts, pairs_folder):
        yield PairsMade(done, config.pairs, "teacher pairs", newest)
    pairs = data.load_pairs(pairs_folder, config.pairs)
    reals = None
    if images is not None:
        parts = []
        for done, newest in data.cache_images(host, images, folder / "images"):
            parts.append(newest)
            yield PairsMade(done, total, "pictures", newest)
        reals = data.Samples.cat(parts)
    train_rows, held_rows = split(pairs)
    train, held = take(pairs, train_rows), take(pairs, held_rows)
    student = _create(host, config)
    try:
        state = State.create(student, config, pairs)
    except BaseException:
        student.release()
        raise
    try:
        yield from _train(host, state, folder, train, held, reals, score)
    finally:
        state.release()


def _create(host: Host, config: Config) -> Student:
    """A fresh student, the same for the same seed; raises ConfigError for targets or taps this model lacks."""
    try:
        TeacherFeatures(host.denoiser, tap_names(config))
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            return Student(
                host.denoiser, config.rank, config.alpha or None, config.targets, config.output, config.start
            )
    except (ValueError, re.error) as error:
        raise ConfigError(str(error)) from None


def _train(
    host: Host,
    state: State,
    folder: Path,
    train: data.Samples,
    held: data.Samples,
    reals: data.Samples | None,
    score: Score,
) -> Iterator[Event]:
    config = state.config
    if resume(state, folder):
        log.info("going on from update %d", state.update)
    history = History(folder / HISTORY, state.update)
    uncond = host.encode_text([""])
    recent: deque[health.Health] = deque(maxlen=100)
    shown = torch.arange(min(PREVIEWS, len(held)))
    card = None
    saved = True

    def preview() -> Preview:
        pictures = student_pictures(state, held, shown)
        return Preview(state.update, pictures, held.latents[shown], [held.prompts[i] for i in shown])

    def select() -> Selected:
        nonlocal card
        value = score(student_pictures(state, held, torch.arange(len(held))), held.latents)
        best = value <= state.extra.get("best", float("inf"))
        if best:
            state.extra["best"] = value
            card = write_student(host, state, folder / BEST, {"score on held-out prompts": round(value, 4)})
        return Selected(state.update, value, best)

    if state.update == 0:
        yield preview()
    try:
        with closing(distill(state, train, uncond, reals)) as steps:
            for step in steps:
                saved = False
                history.add(step)
                if step.update > config.warmup:
                    recent.append(step.health)
                yield step
                if config.select_every and step.update % config.select_every == 0:
                    yield select()
                if config.preview_every and step.update % config.preview_every == 0:
                    yield preview()
                if step.update % config.save_every == 0:
                    save_state(state, folder)
                    saved = True
                if step.update % 100 == 0 and recent:
                    for text in health.warnings(health.average(recent), config.adversarial_weight > 0):
                        yield Warned(step.update, text)
    except Diverged as error:
        if not (folder / BEST).exists():
            write_student(host, state, folder / BEST, {})
        raise Diverged(f"{error}: {folder / BEST}") from None
    except GeneratorExit:  # closed between two updates, where the state is whole
        if not saved:
            save_state(state, folder)
        raise
    if not saved:
        save_state(state, folder)
    if config.select_every and state.update % config.select_every:
        last = select()
        save_state(state, folder)  # with the best score, or a longer run would begin to choose anew
        yield last
    if not config.select_every or not (folder / BEST).exists():
        card = write_student(host, state, folder / BEST, {})
    yield preview()
    if card is None:
        card = read_card(folder / BEST)
    yield Finished(folder / BEST, card, state.extra.get("best"))


def _writable(folder: Path) -> None:
    """Raise OSError now, not after an hour, if nothing can be written there."""
    probe = folder / ".writable"
    data.write_whole(probe, b"")
    probe.unlink()
