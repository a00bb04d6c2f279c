"""The demonstration on the embedded model, and the measurement of its students over several seeds."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..core.card import read_card
from ..core.denoiser import Guidance
from ..core.student import load_student
from ..demo.files import PROMPTS, REFERENCE, SETTINGS
from ..demo.files import STUDENT as SHIPPED
from ..measure import bench as measuring
from ..measure import report
from ..measure.bench import ALIKE, TEACHER, UNGUIDED, Bench, arms_of
from ..measure.evaluate import (
    measure_time,
    student_arm,
    table,
    to_json,
    unpack_reference,
)
from ..trainer.config import Config
from ..trainer.data.affixes import Affixes
from ..trainer.data.files import LIBC, write_whole
from ..trainer.data.pairs import make_pairs
from ..trainer.data.prompts import read_prompts
from ..trainer.pipeline.load import load_model
from ..trainer.run import run, training
from ..trainer.run.events import Interrupted
from ..trainer.run.scores import Score as SelectionScore

STUDENT = "student, 1 step"
LONGEST, SHORTEST = 8.0, 3.0  # minutes of training that a demonstration gives each student
WHOLE = 14.0  # minutes that it should take in all: a slow machine trains for less time
PATIENCE = 30  # seconds in which a training that is told to end saves
PR_SET_PDEATHSIG = 1  # of Linux's prctl
PAIRS, PICTURES = "pairs", "pictures"  # folders, beside those of the students


class Failed(RuntimeError):
    """A training that ran as a command of its own did not end well; it has said why."""


def images_of(config: Config, out: Path) -> Path | None:
    """The folder of real pictures of a demonstration in `out`, for the students whose discriminator wants them."""
    return out / PICTURES if config.sees_pictures else None


def settings_of(out: Path, name: str) -> Path:
    """The file of the settings by which a demonstration in `out` trains a student."""
    return out / f"{name}.toml"


def train_here(
    host, configs: Mapping[str, Config], out: Path, follow: Callable[..., Any], score: SelectionScore
) -> None:
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
    something, a signal's number, they save and end: raises Interrupted then. If one fails, the other
    is ended so, too: raises Failed. On Linux they save and end, too, when this process does.
    """
    threads = max(1, torch.get_num_threads() // len(configs))
    children = []
    try:
        for position, (name, config) in enumerate(configs.items()):
            command = [sys.executable, "-m", __name__.rsplit(".", 2)[0], "distill", "--title", name]
            command += ["--config", str(settings_of(out, name)), "--out", str(out / name)]
            command += ["--pairs-folder", str(out / PAIRS)]
            if images := images_of(config, out):
                command += ["--images", str(images)]
            write_whole(settings_of(out, name), config.to_toml().encode())
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_POSITION": str(position)}
            # In a session of its own it hears of Ctrl-C from here alone: a second one would break it off. What it says
            # in the end, such as how to go on, is of its own command, not of this one; errors and bars are on stderr.
            how: dict[str, Any] = {"stdout": subprocess.DEVNULL, "start_new_session": True}
            if sys.platform == "linux":
                how["preexec_fn"] = _end_with_parent
            children.append(subprocess.Popen(command, env=environment, **how))
        told_at = -math.inf  # when they were told to end
        while any(child.poll() is None for child in children):
            ends = stop or any(child.returncode for child in children)
            # Told again: what comes while Python starts may be lost.
            if ends and time.monotonic() > told_at + PATIENCE:
                told_at = time.monotonic()
                for child in children:  # one that has ended is passed over
                    child.terminate()  # which it takes as the first Ctrl-C, however often it comes
            time.sleep(0.2)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
    codes = [child.returncode for child in children]
    ended = {Interrupted(number).status for number in (signal.SIGINT, signal.SIGTERM)}
    ended |= {-signal.SIGTERM} if told_at > 0 else set()  # it had not begun yet
    if failed := [code for code in codes if code != 0 and code not in ended]:
        raise Failed(f"a training {_end_in_words(failed[0])}, and give the command again: what is done is kept")
    if told_at > 0 or ended & set(codes):
        raise Interrupted(*stop[:1])


def _end_with_parent() -> None:
    """Linux sends a process SIGTERM when the one that started it has ended, however that ended."""
    assert LIBC is not None
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_in_words(code: int) -> str:
    """How a training ended badly, and what to do, by its return code."""
    if code >= 0:
        return f"ended with status {code}: its last lines above say why. Mend that"
    name = next((each.name for each in signal.Signals if each == -code), f"signal {-code}")
    if name == "SIGKILL":
        return "was killed by the system (SIGKILL), probably since memory was short: close other programs"
    return f"was ended from outside ({name}): see by what"


def _pairs(host, config: Config, folder: Path, stop: Sequence) -> None:
    made = make_pairs(host, config, read_prompts(PROMPTS), folder)
    with tqdm(total=config.pairs, desc="teacher pairs", unit="") as bar:
        for done, _ in made:
            bar.update(done - bar.n)
            if stop:
                raise Interrupted(*stop[:1])


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
    host = load_model()
    bench = Bench(host, REFERENCE, count)
    arms = arms_of(host, Guidance.of(config), config.negative_prompt, Affixes.of(config))
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
            pictures = len(bench.chosen.captions) + measuring.ALIKE_PROMPTS * ALIKE
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
        train_here(host, configs, out, follow, bench.evaluator.kid_score(host))

    paths = {"regression only": out / "regression" / training.BEST, STUDENT: out / "student" / training.BEST}
    if SHIPPED.exists():
        paths["shipped student, 1 step"] = SHIPPED
    students = {name: load_student(path, host.denoiser)[0] for name, path in paths.items()}
    arms |= {name: student_arm(student) for name, student in students.items()}
    scores = bench.score(arms, seed)
    timed = (TEACHER, "teacher, 1 step", STUDENT)
    timings = {name: measure_time(host, arms[name], bench.shown[0], context=bench.context) for name in timed}
    for name in ("teacher, 1 step", "regression only", STUDENT):
        shown[name] = list(bench.pictures(arms[name], bench.shown, seed + 7, name))
    columns = [report.Column(*_heading(name), pictures) for name, pictures in shown.items()]
    for student in students.values():
        student.release()
    floor = bench.evaluator.floor()
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
        out / "student" / training.HISTORY,
        STUDENT,
        TEACHER,
    )
    return report.write(page, out)


def _heading(name: str) -> tuple[str, str]:
    first, _, rest = name.partition(", ")
    return first, rest or "1 step"
