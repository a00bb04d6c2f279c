"""The demonstration on the embedded model, and the measurement of its students over several seeds."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..core.card import read_card
from ..core.student import load_student
from ..demo.files import PROMPTS, REFERENCE, SETTINGS
from ..demo.files import STUDENT as SHIPPED
from ..measure import report
from ..measure.evaluate import (
    Arm,
    Judge,
    Score,
    load_reference,
    make_pictures,
    measure_time,
    student_arm,
    table,
    teacher_arm,
    to_json,
    unpack_reference,
)
from ..trainer.config import Config
from ..trainer.data.files import write_whole
from ..trainer.data.pairs import make_pairs
from ..trainer.data.prompts import read_prompts
from ..trainer.diffusers_host import DiffusersHost, load_host
from ..trainer.loop.precision import autocast
from ..trainer.run import run
from ..trainer.run.events import Interrupted

SHOWN = 8  # prompts in the report's grid; of names that the teacher was trained on, then of others, as many
ALIKE_PROMPTS, ALIKE = 8, 4  # for diversity: prompts, and samples of each
TEACHER, UNGUIDED = "teacher, 50 steps", "teacher, 50 steps, no CFG"
STUDENT = "student, 1 step"
LONGEST, SHORTEST = 8.0, 3.0  # minutes of training that a demonstration gives each student
WHOLE = 14.0  # minutes that it should take in all: a slow machine trains for less time
PATIENCE = 30  # seconds in which a training that is told to end saves
PAIRS, PICTURES = "pairs", "pictures"  # folders, beside those of the students


def arms_of(host: DiffusersHost, guidance: float) -> dict[str, Arm]:
    """What every student is compared with."""
    return {
        TEACHER: teacher_arm(host, 50, guidance),
        UNGUIDED: teacher_arm(host, 50, 1.0),
        "teacher, 1 step": teacher_arm(host, 1, guidance),
    }


class Bench:
    """A reference set's held-out prompts (`count` of them, or all), and the pictures that arms make of them."""

    def __init__(self, host: DiffusersHost, reference: Path | None, count: int | None):
        self.host = host
        self.judge = Judge(load_reference(reference or REFERENCE))
        known, held = (
            split.take(np.random.default_rng(0).permutation(len(split.captions)).tolist())
            for split in (self.judge.known, self.judge.real)
        )
        self.chosen = held.take(range(len(held.captions))[:count])
        self.shown = known.captions[: SHOWN // 2] + held.captions[: SHOWN // 2]
        self.context = functools.partial(autocast, Config(), host.denoiser.device)

    def pictures(self, arm: Arm, prompts: Sequence[str], seed: int, title: str) -> Tensor:
        batches = []
        with tqdm(total=len(prompts), desc=title, unit="picture", leave=False) as bar:
            for batch in make_pictures(self.host, arm, prompts, seed, self.context):
                batches.append(batch)
                bar.update(len(batch))
        return torch.cat(batches)

    def alike(self, arm: Arm, seed: int, title: str) -> Tensor:
        """Several pictures of each of a few prompts, (P, S, 3, H, W)."""
        prompts = [p for p in self.chosen.captions[:ALIKE_PROMPTS] for _ in range(ALIKE)]
        return self.pictures(arm, prompts, seed + 50, title).unflatten(0, (-1, ALIKE))

    def score(self, arms: dict[str, Arm], seed: int) -> dict[str, Score]:
        """Every arm's measures for one noise seed; the teacher's arm comes first."""
        teacher, teacher_alike = None, None
        scores = {}
        for name, arm in arms.items():
            images = self.pictures(arm, self.chosen.captions, seed, name)
            alike = self.alike(arm, seed, name)
            if teacher is None or teacher_alike is None:
                teacher, teacher_alike = images, alike
            scores[name] = self.judge.score(images, self.chosen.styles, alike, teacher, teacher_alike)
        return scores


class Failed(RuntimeError):
    """A training that ran as a command of its own did not end well; it has said why."""


def images_of(config: Config, out: Path) -> Path | None:
    """The folder of real pictures of a demonstration in `out`, for the students whose discriminator wants them."""
    return out / PICTURES if config.sees_pictures else None


def settings_of(out: Path, name: str) -> Path:
    """The file of the settings by which a demonstration in `out` trains a student."""
    return out / f"{name}.toml"


def train_here(host, configs: Mapping[str, Config], out: Path, follow: Callable[..., Any], score: Score) -> None:
    """Train one student after the other, in `out/<name>`; `follow(events, config, folder, host)` shows a run."""
    prompts = read_prompts(PROMPTS)
    for name, config in configs.items():
        print(f"{name}:")
        write_whole(settings_of(out, name), config.to_toml().encode())
        events = run.run(host, config, out / name, prompts, images_of(config, out), score, out / PAIRS)
        follow(events, config, out / name, host)


def train_apart(configs: Mapping[str, Config], out: Path, stop: Sequence) -> None:
    """Train all students at once, each by `turbodistill distill` on its share of the cores.

    Two trainings of one thread do nearly twice the work of one with two. As soon as `stop` holds
    something they end as at Ctrl-C: raises Interrupted then. If one fails, the other is ended so,
    too: raises Failed.
    """
    threads = max(1, torch.get_num_threads() // len(configs))
    children = []
    try:
        for position, (name, config) in enumerate(configs.items()):
            command = [sys.executable, "-m", f"{__package__}.cli", "distill", "--config", str(settings_of(out, name))]
            command += ["--out", str(out / name), "--pairs-folder", str(out / PAIRS), "--title", name]
            if images := images_of(config, out):
                command += ["--images", str(images)]
            write_whole(settings_of(out, name), config.to_toml().encode())
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_POSITION": str(position)}
            # In a session of its own it hears of Ctrl-C from here alone: a second one would break it off.
            children.append(subprocess.Popen(command, env=environment, start_new_session=True))
        told_at = -math.inf  # when they were told to end
        while any(child.poll() is None for child in children):
            ends = stop or any(child.returncode for child in children)
            # Told again: what comes while Python imports may be lost in a callback of its own, which raises nothing.
            if ends and time.monotonic() > told_at + PATIENCE:
                told_at = time.monotonic()
                for child in children:  # one that has ended is passed over
                    child.send_signal(signal.SIGINT)
            time.sleep(0.2)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
    codes = [child.returncode for child in children]
    if failed := [code for code in codes if code not in (0, 130)]:
        raise Failed(
            f"a training ended with status {failed[0]}: its last lines above say why. Mend that, and give the command "
            "again: what is done is kept"
        )
    if told_at > 0 or 130 in codes:
        raise Interrupted


def _pairs(host, config: Config, folder: Path, stop: Sequence) -> None:
    made = make_pairs(host, config, read_prompts(PROMPTS), folder)
    with tqdm(total=config.pairs, desc="teacher pairs", unit="") as bar:
        for done, _ in made:
            bar.update(done - bar.n)
            if stop:
                raise Interrupted


def training_minutes(spent: float, pace: float, pictures: int) -> float:
    """Minutes of training for each student, so that the whole demonstration takes WHOLE where that can be.

    `spent` seconds are gone; the teacher needs `pace` seconds for one of the `pictures` to be measured.
    """
    # Beside the teacher's pictures: those of its timing, one by one; the students'; features and the report.
    ahead = pace * (pictures + 12) * 1.15 + 40
    # Beside the updates: two starts of Python, previews, and the choice of the best student.
    left = (60 * WHOLE - spent - ahead - 30) / 1.08
    return min(LONGEST, max(SHORTEST, left / 60))


def demo(
    out: Path,
    minutes: float | None,
    count: int,
    seed: int,
    follow: Callable[..., Any],
    interruptible: Callable[[], AbstractContextManager[Sequence]],
    unguided: bool = False,
) -> Path:
    """Pairs, two students (with and without the adversarial loss, at equal time), measurement, report.

    Each student trains for `minutes`; None takes what `training_minutes` says, once. `unguided` measures the
    teacher without guidance as well. `follow(events, config, folder, host)` shows a run; the sequence
    that `interruptible()` gives holds something once the user wants an end. What an earlier call left in
    `out` is gone on with. Returns the report's path. Raises Interrupted, Failed.
    """
    begun = time.monotonic()
    config = Config.from_toml(SETTINGS).replace(seed=seed, updates=1_000_000)
    host = load_host()
    bench = Bench(host, None, count)
    arms = arms_of(host, config.guidance)
    if not unguided:
        del arms[UNGUIDED]
    with interruptible() as stop:
        _pairs(host, config, out / PAIRS, stop)
        unpack_reference(REFERENCE, "train", out / PICTURES)
        paused = time.monotonic()
        shown = {TEACHER: list(bench.pictures(arms[TEACHER], bench.shown, seed + 7, TEACHER))}
        chosen = settings_of(out, "student")
        if minutes is None and chosen.exists():  # by an earlier call, which this one goes on with
            minutes = Config.from_toml(chosen).minutes
        elif minutes is None:
            now = time.monotonic()
            pictures = len(bench.chosen.captions) + ALIKE_PROMPTS * ALIKE
            minutes = training_minutes(now - begun, (now - paused) / len(bench.shown), pictures)
        config = config.replace(minutes=minutes)
        configs = {
            "student": config,
            "regression": config.replace(
                adversarial_weight=0.0,
                distillation_weight=0.0,
                feature_weight=0.0,
                positives="teacher",
                pixel_backbone="",
            ),
        }
        if apart := host.denoiser.device.type == "cpu" and torch.get_num_threads() > 1:
            train_apart(configs, out, stop)
    if not apart:
        train_here(host, configs, out, follow, bench.judge.kid_score(host))

    paths = {"regression only": out / "regression" / run.BEST, STUDENT: out / "student" / run.BEST}
    if SHIPPED.exists():
        paths["shipped student, 1 step"] = SHIPPED
    students = {name: load_student(path, host.denoiser)[0] for name, path in paths.items()}
    arms |= {name: student_arm(student) for name, student in students.items()}
    scores = bench.score(arms, seed)
    timed = (TEACHER, "teacher, 1 step", STUDENT)
    timings = {name: measure_time(host, arms[name], context=bench.context) for name in timed}
    for name in ("teacher, 1 step", "regression only", STUDENT):
        shown[name] = list(bench.pictures(arms[name], bench.shown, seed + 7, name))
    columns = [report.Column(*_heading(name), pictures) for name, pictures in shown.items()]
    for student in students.values():
        student.release()
    floor = bench.judge.floor()
    print(table(scores, floor))
    write_whole(out / "figures.json", to_json(scores, floor, timings).encode())
    page = report.Report(
        "TurboDistill: one step beside fifty",
        columns,
        bench.shown,
        scores,
        floor,
        timings,
        read_card(paths[STUDENT]),
        out / "student" / run.HISTORY,
        STUDENT,
        TEACHER,
    )
    return report.write(page, out)


def _heading(name: str) -> tuple[str, str]:
    first, _, rest = name.partition(", ")
    return first, rest or "1 step"


def measure_students(
    model: Path | None, students: Sequence[Path], reference: Path | None, count: int | None, seeds: int
) -> tuple[str, str]:
    """Score the teacher's arms and each student over several noise seeds; returns a table and JSON."""
    host = load_host(model)
    bench = Bench(host, reference, count)
    per_seed: list[dict[str, Score]] = []
    loaded = [(path, *load_student(path, host.denoiser)) for path in students]
    guidance = loaded[0][2].guidance
    arms = arms_of(host, guidance)
    for path, student, _, _ in loaded:
        arms[f"{path.parent.name}/{path.stem}"] = student_arm(student)
    for seed in range(seeds):
        per_seed.append(bench.score(arms, seed))
    timings = {name: measure_time(host, arm, context=bench.context) for name, arm in arms.items() if name != UNGUIDED}
    for _, student, _, _ in loaded:
        student.release()
    floor = bench.judge.floor()
    lines = []
    for seed, scores in enumerate(per_seed):
        lines += [f"seed {seed}, {len(bench.chosen.captions)} pictures an arm", table(scores, floor), ""]
    lines.append(f"KID x 1000 over {seeds} {'seed' if seeds == 1 else 'seeds'}: mean (least to most)")
    base = np.mean([s[TEACHER].kid.value for s in per_seed])
    for name in arms:
        values = [s[name].kid.value for s in per_seed]
        mean = float(np.mean(values))
        lines.append(
            f"  {name:<28} {mean:8.1f} ({min(values):.1f} to {max(values):.1f}), {mean / base:.2f} x {TEACHER}"
        )
    slow = timings[TEACHER]
    for name, timing in timings.items():
        ratio = f"{slow.seconds / timing.seconds:.1f} x faster than {TEACHER}"
        lines.append(f"  {name:<28} {1000 * timing.seconds:8.1f} ms a picture, {timing.passes} passes, {ratio}")
    figures = {
        "seeds": [{k: asdict(v) for k, v in s.items()} for s in per_seed],
        "timings": {k: asdict(v) for k, v in timings.items()},
    }
    return "\n".join(lines), json.dumps(figures, indent=1)
