"""The README's table: the demo trained over several seeds, and the shipped student, measured together.

    python benchmarks/demo_seeds.py --seeds 3

Each seed is a whole demo (teacher pairs, both students) of its own; what an earlier call left in
`--out` is gone on with. Prints mean, least and most of KID x 1000 per arm, over the trainings' seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from turbodistill.trainer import cli, demo
from turbodistill.trainer.config import Config

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--minutes", type=float, help="training time of each student (default: the demo's own choice)")
parser.add_argument("--count", type=int, default=286, help="pictures per arm and seed")
parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
args = parser.parse_args()

kids: dict[str, list[float]] = {}
styles: dict[str, list[float]] = {}
diversities: dict[str, list[float]] = {}
minutes: list[float] = []
for seed in range(args.seeds):
    folder = args.out / str(seed)
    demo.demo(folder, args.minutes, args.count, seed, cli.follow, cli.interruptible, unguided=True)
    figures = json.loads((folder / "figures.json").read_text())
    minutes.append(Config.from_toml(demo.settings_of(folder, "student")).minutes)
    for arm, score in figures["scores"].items():
        kids.setdefault(arm, []).append(score["kid"]["value"])
        styles.setdefault(arm, []).append(score["style"])
        diversities.setdefault(arm, []).append(score["diversity"])

kid = figures["floor"]["kid"]
base = np.mean(kids[demo.TEACHER])


def spread(values: list[float], form: str) -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


print(f"\n{args.seeds} seeds of the whole demo, {args.count} pictures an arm; mean (least to most)")
print(f"minutes of each student's training: {spread(minutes, '.1f')}")
print(f"{'arm':<28} {'KID x 1000':>24} {'of the teacher':>15} {'style':>20} {'diversity':>20}")
for arm, values in kids.items():
    ratio = f"{np.mean(values) / base:.2f} x"
    row = f"{arm:<28} {spread(values, '.0f'):>24} {ratio:>15}"
    print(f"{row} {spread(styles[arm], '.2f'):>20} {spread(diversities[arm], '.2f'):>20}")
print(f"{'real, train vs held-out':<28} {kid['value']:.0f} [{kid['low']:.0f} to {kid['high']:.0f}]")
