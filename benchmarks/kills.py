"""Runs that are killed at random moments, and whether each ends as one that nobody disturbed.

    python benchmarks/kills.py --kills 100

Small trainings of the embedded model, in processes of their own, get SIGKILL at moments that a seed draws: most while
the adversarial or the matching loss trains, the rest while pairs are made, students are selected, and files are saved.
Some are killed again when they go on. Then each runs to its end, and its student, state, history and pairs are
compared, bit for bit, with those of a run that was left alone. Prints a table; the exit code is 1 if one differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from tqdm import tqdm
from turbodistill.core.card import KEY
from turbodistill.trainer.config import Config
from turbodistill.trainer.loop import distill
from turbodistill.trainer.loop.steps import Phase
from turbodistill.trainer.pipeline.load import load_model
from turbodistill.trainer.run import run, training
from turbodistill.trainer.run.history import History
from turbodistill.trainer.run.state_file import read_state

PROMPTS = ["a {red|blue} fox", "an owl", "a green fish", "cat face, in flat noto style"]
SMALL: dict[str, Any] = {
    "rank": 4, "pairs": 70, "pair_steps": 1, "batch_size": 2, "updates": 10, "regression_updates": 3,
    "discriminator_warmup": 1, "adversarial_ramp": 2, "save_every": 2, "evaluate_every": 3, "preview_every": 0,
    "precision": "float32", "head_channels": 8,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "adversarial": {"discriminator_updates": 2},
    "matching": {
        "student_steps": 2, "distillation": "matching", "distillation_weight": 0.5, "fake_score_rank": 4,
        "fake_score_updates": 2,
    },
}  # fmt: skip
# Where kills are wanted; what trains is named after the recipe.
WANTED = {"training": 60, "regression": 5, "pairs": 10, "selection": 12, "saving": 13}


class Mark(NamedTuple):
    """A moment at which a run turned to something."""

    phase: str
    seconds: float  # since its begin


def tell(pipe: int) -> None:
    """Make what runs in this process say into a pipe what it turns to."""
    now = ["pairs"]

    def say(phase: str) -> None:
        os.write(pipe, f"{phase}\n".encode())

    def told(function: Callable[..., Any], phase: Callable[..., str]) -> Callable[..., Any]:
        def tells(*given: Any, **more: Any) -> Any:
            now.append(phase(*given))
            say(now[-1])
            try:
                return function(*given, **more)
            finally:
                now.pop()
                say(now[-1])

        return tells

    def trains(state: Any, *_: Any) -> str:
        return "training" if Phase.of(state).adversarial else "regression"

    say(now[0])
    distill._update = told(distill._update, trains)
    training.Training.select = told(training.Training.select, lambda *_: "selection")
    for holder, name in ((training, "save_state"), (History, "__init__"), (History, "add")):
        setattr(holder, name, told(getattr(holder, name), lambda *_: "saving"))
    events = training.Training.events

    def begun(self: Any) -> Any:
        now[0] = "between"  # the pairs are made
        say(now[0])
        yield from events(self)

    training.Training.events = begun


def start(host: Any, prompts: Sequence[str], config: Config, folder: Path) -> tuple[int, int]:
    """A run in a process of its own: its number, and the pipe that its marks come through."""
    marks, pipe = os.pipe()
    process = os.fork()
    if process:
        os.close(pipe)
        return process, marks
    os.close(marks)
    try:
        tell(pipe)
        for _ in run.run(host, config, folder, prompts):
            pass
        os._exit(0)
    except BaseException as error:
        print(f"{folder}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def follow(process: int, marks: int, phase: str = "", number: int = 0, wait: float = 0.0) -> tuple[list[Mark], int]:
    """A run's marks until it ends, and its status; it is killed so long after it turned to a phase once more."""
    found: list[Mark] = []
    began, rest, kills_at = time.monotonic(), b"", float("inf")
    os.set_blocking(marks, False)
    while True:
        try:
            read = os.read(marks, 4096)
        except BlockingIOError:
            if time.monotonic() >= kills_at:
                os.kill(process, signal.SIGKILL)
                kills_at = float("inf")
            time.sleep(0.0002)
            continue
        if not read:
            break
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            found.append(Mark(line.decode(), time.monotonic() - began))
            if phase and found[-1].phase == phase:
                if number == 0:
                    kills_at = time.monotonic() + wait
                number -= 1
    os.close(marks)
    return found, os.waitpid(process, 0)[1]


def what_is_left(folder: Path) -> dict[str, Any]:
    """All that must be the same, by file: tensors as bytes, no times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == training.STATE:
            found[name] = plain(read_state(path) | {"spent": 0})
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = dict(file.metadata())
                found[name] = {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
            if KEY in about:
                card = json.loads(about[KEY])
                card["training"].pop("minutes")
                found[name] |= about | {KEY: card}
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def plain(value: Any) -> Any:
    """A state with bytes in place of its tensors."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The files in which two runs differ."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def draw(draws: random.Random, whole: list[Mark], wanted: str) -> tuple[str, int, float]:
    """A moment within a phase, by a run that was left alone: the phase, which of its times, and how long into it."""
    times = [(k, after.seconds - mark.seconds) for k, (mark, after) in enumerate(pairwise(whole))]
    times = [(k, length) for k, length in times if whole[k].phase == wanted]
    number = draws.randrange(len(times))
    return wanted, number, draws.random() * times[number][1]


def compare(
    host: Any, prompts: Sequence[str], configs: Mapping[str, Config], kills: int, seed: int, out: Path
) -> tuple[Counter[str], Counter[str]]:
    """Kill runs of each config in turn until there were so many kills; how many in each phase, and how many of them
    ended in a run that is equal to one that was left alone. What differs stays in `out`.
    """
    torch.set_num_threads(1)  # more of them would not survive a fork
    draws = random.Random(seed)
    wholes, lefts = {}, {}
    for name, config in configs.items():
        for _ in run.run(host, config, out / name, prompts):  # here, so that what it imports is there in every fork
            pass
        lefts[name] = what_is_left(out / name)
        wholes[name], status = follow(*start(host, prompts, config, out / f"{name}-again"))
        assert status == 0 and what_is_left(out / f"{name}-again") == lefts[name], f"{name} is not the same twice"
    killed, equal = Counter[str](), Counter[str]()
    bar = tqdm(total=kills, unit="kill")
    for number in count():
        name = list(configs)[number % len(configs)]
        folder = out / f"killed-{number}"
        phases: list[str] = []
        for _ in range(1 + (draws.random() < 0.25)):
            (wanted,) = draws.choices(list(WANTED), list(WANTED.values()))
            moment = draw(draws, wholes[name], wanted)
            marks, status = follow(*start(host, prompts, configs[name], folder), *moment)
            if os.WIFSIGNALED(status):
                phases.append(name if marks[-1].phase == "training" else marks[-1].phase)
        _, status = follow(*start(host, prompts, configs[name], folder))
        found = differences(what_is_left(folder), lefts[name]) if status == 0 else ["it failed"]
        killed.update(phases)
        bar.update(len(phases))
        if found:
            bar.write(f"{folder}, {name}, killed in {', '.join(phases)}: {', '.join(found)}", sys.stdout)
        else:
            equal.update(phases)
            shutil.rmtree(folder)
        if killed.total() >= kills:
            break
    bar.close()
    return killed, equal


def main() -> int:
    """Kill, go on, compare; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="an empty folder, which is kept (default: a temporary one)")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    configs = {name: Config(**SMALL | changes) for name, changes in RECIPES.items()}
    killed, equal = compare(load_model(None), PROMPTS, configs, args.kills, args.seed, out)
    print(f"{'killed in':<16}{'kills':>8}{'bit-equal':>12}")
    for phase in killed:
        print(f"{phase:<16}{killed[phase]:>8}{equal[phase]:>12}")
    print(f"{'in all':<16}{killed.total():>8}{equal.total():>12}")
    if args.out is None and equal == killed:
        shutil.rmtree(out)
    return int(equal != killed)


if __name__ == "__main__":
    sys.exit(main())
