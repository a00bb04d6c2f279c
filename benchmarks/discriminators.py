"""What sees the student: latents, pictures, or both, for as many minutes each, or as many updates.

    python benchmarks/discriminators.py --folder discriminators               # about an hour on a quiet CPU core
    python benchmarks/discriminators.py --folder discriminators --updates 150 # equal updates, sharpness told

Students of the embedded model from scratch, on the same teacher pairs with the demo's settings (demo/demo.toml): LADD's
discriminator on noisy latents, ADD's on decoded pictures, half of each, and the variants of ADD's. The minutes are
those of the training alone. Everything goes on where it stopped; the best third may get more seeds than the rest.
KID is to real pictures of held-out names; style is the share whose style word a classifier of real pictures tells
right; sharpness is the power in high frequencies over real pictures'.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import turbodistill as td
from turbodistill.core.denoiser import Guidance
from turbodistill.demo.files import PROMPTS, REFERENCE, SETTINGS
from turbodistill.measure.bench import Bench
from turbodistill.measure.evaluate import student_arm, teacher_arm, unpack_reference
from turbodistill.trainer.data.prompts import read_prompts

ARMS = {
    "latents (LADD)": {"pixel_backbone": ""},
    "pictures (ADD)": {},
    "both": {"pixel_share": 0.5},
    "both, latents a quarter": {"pixel_share": 0.75},
    "pictures, augmented": {"augment": True},
    "pictures, raw": {"raw_pictures": True},
    "pictures, teacher's": {"positives": "teacher"},
}
TEACHER = "teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the runs, which go on from there")
    parser.add_argument("--minutes", type=float, default=4.0, help="of each training")
    parser.add_argument("--updates", type=int, default=0, help="of each training, in place of the minutes")
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--count", type=int, default=96, help="pictures an arm")
    parser.add_argument("--seeds", type=int, default=3, help="of the training")
    parser.add_argument("--arms", type=int, default=3, help=f"the first so many of {', '.join(ARMS)}")
    args = parser.parse_args()
    model = td.load_model()
    bench = Bench(model, REFERENCE, args.count)
    pictures = args.folder / "pictures"
    if not pictures.exists():
        unpack_reference(REFERENCE, "train", pictures)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for name in list(ARMS)[: args.arms]:
            rows.setdefault(name, []).append(one(model, bench, pictures, args, name, seed))
    guided = Guidance(td.Config.from_toml(SETTINGS).guidance)
    teacher = figures(bench.score({TEACHER: teacher_arm(model, 50, guided)}, 0)[TEACHER])
    told = f"{args.updates} updates" if args.updates else f"{args.minutes:g} minutes"
    print(f"{told} of training each, {args.seeds} seeds, {args.count} pictures; mean (least to most)")
    heads = ("KID x 1000", "style", "sharpness", "updates", "accuracy")
    print(f"{'':<26}" + "".join(f"{head:>26}" for head in heads))
    print(f"{'teacher, 50 steps':<26}" + "".join(f"{teacher[head]:>26.2f}" for head in heads[:3]))
    for name, found in rows.items():
        cells = [spread([row[head] for row in found], ".2f") for head in heads]
        print(f"{name:<26}" + "".join(f"{cell:>26}" for cell in cells))


def one(model, bench: Bench, pictures: Path, args, name: str, seed: int) -> dict[str, float]:
    """The figures of one training, which are kept beside it."""
    length = {"updates": args.updates} if args.updates else {"minutes": args.minutes, "updates": 100_000}
    config = td.Config.from_toml(SETTINGS).replace(
        pairs=args.pairs, seed=seed, evaluate_every=0, preview_every=0, save_every=50, **length, **ARMS[name]
    )
    run = args.folder / f"{args.updates or args.minutes:g} {name} {seed}"
    kept = run / "figures.json"
    if kept.exists():
        return json.loads(kept.read_text())
    shared = args.folder / f"pairs-{seed}"
    images = pictures if config.sees_pictures else None
    prompts = read_prompts(PROMPTS)
    accuracies: list[float] = []
    for event in td.distill(model, config, run, prompts=prompts, images=images, pairs_folder=shared):
        if isinstance(event, td.Step) and event.health:
            accuracies.append(event.health.accuracy)
    student, card = td.load_student(run / "student.safetensors", model)
    found = figures(bench.score({name: student_arm(student)}, seed)[name])
    student.release()
    late = accuracies[len(accuracies) // 2 :]
    found |= {"updates": card.training["updates"], "accuracy": float(np.mean(late)) if late else float("nan")}
    kept.write_text(json.dumps(found))
    return found


def figures(score) -> dict[str, float]:
    return {"KID x 1000": score.kid.value, "style": score.style, "sharpness": score.sharpness}


def spread(values: list[float], form: str) -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
