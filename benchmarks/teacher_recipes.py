"""What makes the teacher learn faster: its recipe with one change each, at equal updates.

    python benchmarks/teacher_recipes.py                       # all of them, one seed
    python benchmarks/teacher_recipes.py --seeds 3 --arms base align

Each is trained anew for `--updates`, the learning rate falling over the last quarter. What an earlier call has
trained and measured is kept in `--out`; without anything left to do the command prints its table in a second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from teacher import Gallery, measure
from turbodistill.demo.recipe import averages, dataset, pack
from turbodistill.demo.recipe.fit import Training, fit
from turbodistill.demo.recipe.teacher import Recipe, Teacher
from turbodistill.trainer.data.files import write_whole

LR = 4e-4
# Name -> recipe and learning rate; each differs from the first in one thing, the last in all that helped.
ARMS: dict[str, tuple[Recipe, float]] = {
    "base": (Recipe(), LR),
    "lr 1e-3": (Recipe(), 1e-3),
    "x0": (Recipe(prediction="x0"), LR),
    "min-snr": (Recipe(weighting="min-snr"), LR),
    "logit-normal": (Recipe(timesteps="logit-normal"), LR),
    "drawn captions": (Recipe(captions="drawn"), LR),
    "augment": (Recipe(augment=True), LR),
    "align": (Recipe(align=0.5), LR),
    "combined": (Recipe(weighting="min-snr", captions="drawn", align=0.5), 1e-3),
    "combined, no align": (Recipe(weighting="min-snr", captions="drawn"), 1e-3),
}


def run(name: str, seed: int, args) -> dict[str, float]:
    """Train and measure one arm with one seed, or read what was measured."""
    recipe, lr = ARMS[name]
    stem = f"{name.replace(',', '').replace(' ', '-')}-{args.updates}-{seed}"
    note = args.out / f"{stem}.json"
    if note.exists():
        return json.loads(note.read_text())
    teacher = Teacher(args.folder, recipe, "cpu", args.batch_size, seed)
    training = Training(teacher.learner, teacher.identity())
    fit(training, teacher.loss, args.out / f"{stem}.pt", lr, args.batch_size, args.updates, decay=args.updates // 4)
    unet = teacher.filled(training.averages[averages.TRACKED[0]])
    figures = {"held_out_loss": teacher.held_out_loss(unet), "minutes": training.seconds / 60}
    with tempfile.TemporaryDirectory() as scratch:
        denoiser, model = (Path(scratch) / f"{n}.safetensors" for n in ("denoiser", "model"))
        weights = {k: v.contiguous() for k, v in unet.state_dict().items()}
        save_file(weights, denoiser, {"prediction": recipe.prediction})
        pack.pack_model(args.folder, model, denoiser)
        # The same noise for all: only the training's seed differs.
        once = argparse.Namespace(seeds=1, steps=args.steps, guidance=3.0)
        found = measure(Gallery(args.folder), model, once, ("train", "combination"))
    for split, m in found.items():
        means = {key: torch.as_tensor(value, dtype=torch.float64).mean() for key, value in m.items()}
        figures |= {f"{split} {key}": float(mean) for key, mean in means.items()}
    write_whole(note, json.dumps(figures, indent=1).encode())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=dataset.BUILD)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--updates", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {name: [run(name, seed, args) for seed in range(args.seeds)] for name in args.arms}
    shown = (
        "held_out_loss",
        "train kid",
        "train first_five",
        "train style",
        "combination kid",
        "combination first_five",
    )
    print(f"{args.updates} updates of {args.batch_size} pictures; mean (least to most) of {args.seeds} seeds")
    print(f"{'':<16}" + "".join(f"{name:>28}" for name in shown))
    for name, figures in rows.items():
        columns = [[f[key] for f in figures] for key in shown]
        cells = (f"{np.mean(c):.4g} ({min(c):.4g} to {max(c):.4g})" for c in columns)
        print(f"{name:<16}" + "".join(f"{cell:>28}" for cell in cells))


if __name__ == "__main__":
    main()
