"""The README's table: the demo trained over several seeds, and the shipped student, measured together.

    python benchmarks/demo_seeds.py --seeds 3

Each seed is a whole demo (teacher pairs, both students) of its own; what an earlier call left in
`--out` is gone on with. Prints mean, least and most of every arm's measures over the trainings' seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from turbodistill.app import demo
from turbodistill.app.interrupt import interruptible
from turbodistill.app.progress import follow
from turbodistill.trainer.config import Config

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--minutes", type=float, help="training time of each student (default: the demo's own choice)")
parser.add_argument("--count", type=int, default=286, help="pictures per arm and seed")
parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
args = parser.parse_args()

scores: dict[str, list[dict]] = {}  # by arm, one for each seed
minutes: list[float] = []
for seed in range(args.seeds):
    folder = args.out / str(seed)
    demo.demo(folder, args.minutes, args.count, seed, follow, interruptible, unguided=True)
    figures = json.loads((folder / "figures.json").read_text())
    minutes.append(Config.from_toml(demo.settings_of(folder, "student")).minutes)
    for arm, score in figures["scores"].items():
        scores.setdefault(arm, []).append(score)


def spread(values: list[float], form: str) -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


MEASURES = ("style", "diversity", "sharpness")
kids = {arm: [score["kid"]["value"] for score in rows] for arm, rows in scores.items()}
print(f"\n{args.seeds} seeds of the whole demo, {args.count} pictures an arm; mean (least to most)")
print(f"minutes of each student's training: {spread(minutes, '.1f')}")
print(f"{'arm':<28} {'KID x 1000':>24} {'of the teacher':>15}" + "".join(f" {name:>20}" for name in MEASURES))
for arm, rows in scores.items():
    ratio = f"{np.mean(kids[arm]) / np.mean(kids[demo.TEACHER]):.2f} x"
    others = "".join(f" {spread([score[name] for score in rows], '.2f'):>20}" for name in MEASURES)
    print(f"{arm:<28} {spread(kids[arm], '.0f'):>24} {ratio:>15}{others}")
floor = figures["floor"]["kid"]
print(f"{'real, train vs held-out':<28} {floor['value']:.0f} [{floor['low']:.0f} to {floor['high']:.0f}]")
