"""Guidance baked in and no more: a student at CFG 1 against its teacher at its own CFG and without, in as many steps.

    python benchmarks/guidance_only.py --folder guidance   # about half an hour on a CPU core; goes on where it stopped

A student of the embedded model, from scratch, with `guidance_only`. All three arms make the same prompts from the same
noise by the same sampler (Euler's). KID is to real pictures of held-out names; style is the share whose style word a
classifier of real pictures tells right; the distance to the guided teacher's picture of the same noise is in features.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import turbodistill as td
from turbodistill.core.denoiser import Guidance
from turbodistill.demo.files import PROMPTS, REFERENCE
from turbodistill.measure.bench import Bench
from turbodistill.measure.evaluate import measure_time, student_arm, teacher_arm
from turbodistill.trainer.data.prompts import read_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the run, which goes on from there")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=3.0, help="the teacher's CFG scale")
    parser.add_argument("--count", type=int, default=64, help="pictures an arm and seed")
    parser.add_argument("--seeds", type=int, default=1, help="of the noise")
    args = parser.parse_args()
    model = td.load_model()
    config = td.Config(
        guidance_only=True, guidance=args.guidance, pair_steps=args.steps, pairs=args.pairs, updates=args.updates,
        batch_size=args.batch_size, lr=args.lr, rank=32, ema_decay=0.98, evaluate_every=0, preview_every=0,
    )  # fmt: skip
    minutes = 0.0
    for event in td.distill(model, config, args.folder, prompts=read_prompts(PROMPTS)):
        minutes = event.spent / 60 if isinstance(event, td.Step) else minutes
    student, card = td.load_student(args.folder / "student.safetensors", model)
    guided, plain, ours = (
        f"{who}, {args.steps} steps, CFG {scale:g}"
        for who, scale in (("teacher", args.guidance), ("teacher", 1), ("student", 1))
    )
    arms = {
        guided: teacher_arm(model, args.steps, Guidance(args.guidance)),
        plain: teacher_arm(model, args.steps, Guidance()),
        ours: student_arm(student),
    }
    bench = Bench(model, REFERENCE, args.count)
    scores = [bench.score(arms, seed) for seed in range(args.seeds)]
    times = {
        name: measure_time(model, arm, bench.chosen.captions[0], context=bench.context) for name, arm in arms.items()
    }
    student.release()

    print(
        f"{card.training['updates']} updates of {args.batch_size} in {minutes or card.training['minutes']:.1f} minutes"
    )
    seeds = f"{args.seeds} seed{'s' * (args.seeds > 1)}"
    print(f"{seeds} of {len(bench.chosen.captions)} pictures an arm; mean (least to most)")
    heads = ("KID x 1000", "style", "to the guided teacher", "s a picture", "passes")
    print(f"{'':<28}" + "".join(f"{head:>26}" for head in heads))
    for name in arms:
        rows = [score[name] for score in scores]
        cells = [spread([row.kid.value for row in rows], ".1f"), spread([row.style for row in rows], ".2f")]
        cells += [
            spread([row.to_teacher for row in rows], ".2f"),
            f"{times[name].seconds:.3f}",
            str(times[name].passes),
        ]
        print(f"{name:<28}" + "".join(f"{cell:>26}" for cell in cells))
    ratio = times[guided].seconds / times[ours].seconds
    print(f"The student's picture takes {1 / ratio:.2f} times as long as the guided teacher's.")


def spread(values: list[float], form: str) -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
