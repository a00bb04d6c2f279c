"""Teacher and students measured side by side: pictures of the same prompts and noise, scores, times."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..core.denoiser import Guidance
from ..core.student import load_student
from ..trainer.config import Config
from ..trainer.data.affixes import NO_AFFIXES, Affixes
from ..trainer.data.files import DataError
from ..trainer.host import Host
from ..trainer.loop.precision import autocast
from .evaluate import (
    Arm,
    Evaluator,
    Score,
    load_reference,
    make_pictures,
    measure_time,
    student_arm,
    table,
    teacher_arm,
)

ALIKE_PROMPTS, ALIKE = 8, 4  # for diversity: prompts, and samples of each
SHOWN = 8  # prompts that are shown: of trained names, then of others, as many
TEACHER, UNGUIDED = "teacher, 50 steps", "teacher, 50 steps, no CFG"


def arms_of(host: Host, guidance: Guidance, negative: str = "", affixes: Affixes = NO_AFFIXES) -> dict[str, Arm]:
    """What every student is compared with: its teacher, as it made the pairs."""
    return {
        TEACHER: teacher_arm(host, 50, guidance, negative, affixes),
        UNGUIDED: teacher_arm(host, 50, Guidance(), affixes=affixes),
        "teacher, 1 step": teacher_arm(host, 1, guidance, negative, affixes),
    }


class Bench:
    """A reference set's held-out prompts (`count` of them, or all), and the pictures that arms make of them."""

    def __init__(self, host: Host, reference: str | Path, count: int | None):
        self.host = host
        self.evaluator = Evaluator(load_reference(reference))
        known, held = (
            split.take(np.random.default_rng(0).permutation(len(split.captions)).tolist())
            for split in (self.evaluator.known, self.evaluator.real)
        )
        self.chosen = held.take(range(len(held.captions))[:count])
        self.shown = known.captions[: SHOWN // 2] + held.captions[: SHOWN // 2]
        self.context = functools.partial(autocast, Config(), host.denoiser)

    def pictures(self, arm: Arm, prompts: Sequence[str], seed: int, title: str) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1], one a prompt; raises DataError for what is none."""
        batches = []
        with tqdm(total=len(prompts), desc=title, unit="picture", leave=False) as bar:
            for batch in make_pictures(self.host, arm, prompts, seed, self.context):
                if not batch.isfinite().all():
                    raise DataError(
                        f"{title}: its pictures are no pictures, their numbers are NaN or infinity. Use another "
                        "student, checkpoint or VAE, or a model in float32"
                    )
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
            scores[name] = self.evaluator.score(images, self.chosen.styles, alike, teacher, teacher_alike)
        return scores


def evaluate(
    host: Host, students: Sequence[str | Path], reference: str | Path, count: int | None = None, seeds: int = 3
) -> tuple[str, str]:
    """Measure student files against the model that they were made of; a table and JSON.

    `reference` is a zip of real pictures (see `load_reference`); `count` pictures an arm and seed, by default one of
    every held-out prompt. Raises CardError, DataError, and ImportError where the extra `demo` is not installed.
    """
    paths = [Path(path) for path in students]
    bench = Bench(host, reference, count)
    per_seed: list[dict[str, Score]] = []
    loaded = [(path, *load_student(path, host.denoiser)) for path in paths]
    first = loaded[0][2]
    arms = arms_of(host, Guidance.of(first), first.negative_prompt, Affixes.of(first))
    for path, student, card, _ in loaded:
        arms[f"{path.parent.name}/{path.stem}"] = student_arm(student, affixes=Affixes.of(card))
    for seed in range(seeds):
        per_seed.append(bench.score(arms, seed))
    prompt = bench.chosen.captions[0]
    timed = {name: arm for name, arm in arms.items() if name != UNGUIDED}
    timings = {name: measure_time(host, arm, prompt, context=bench.context) for name, arm in timed.items()}
    for _, student, _, _ in loaded:
        student.release()
    floor = bench.evaluator.floor()
    lines = [warning for *_, warning in loaded if warning]
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
        passes = f"{timing.passes} {'pass' if timing.passes == 1 else 'passes'}"
        ratio = f"{slow.seconds / timing.seconds:.1f} x faster than {TEACHER}"
        lines.append(f"  {name:<28} {1000 * timing.seconds:8.1f} ms a picture, {passes}, {ratio}")
    figures = {
        "seeds": [{k: asdict(v) for k, v in s.items()} for s in per_seed],
        "timings": {k: asdict(v) for k, v in timings.items()},
    }
    return "\n".join(lines), json.dumps(figures, indent=1)
