"""One student of three sizes against a student of each size alone, on the embedded model: KID per size.

    python benchmarks/sizes.py --folder sizes      # about 25 minutes on two CPU cores; goes on where it stopped

All four go on from the shipped student, with the same settings and updates. The pictures of each size are compared with
as many of the teacher's of that size, of the same names and other noise: KID x 1000 with its 95 % interval. The first
line is what the teacher itself has, between two noises; the second the shipped student, which knows 64 x 64 alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import turbodistill as td
from shipped import settings
from torch import Tensor
from turbodistill.core.card import read_card
from turbodistill.core.denoiser import Guidance
from turbodistill.demo.files import PROMPTS, REFERENCE, STUDENT
from turbodistill.measure.evaluate import Arm, Evaluator, load_reference, make_pictures, student_arm, teacher_arm
from turbodistill.measure.metrics import kid
from turbodistill.trainer.data.prompts import read_prompts

SIZES = ("64x64", "48x72", "72x48")
ALL = ", ".join(SIZES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the runs, which go on from there")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=384)
    parser.add_argument("--pictures", type=int, default=192, help="that are compared, for each line")
    args = parser.parse_args()
    evaluator = Evaluator(load_reference(REFERENCE))
    prompts = (evaluator.real.captions * args.pictures)[: args.pictures]
    model, card = td.load_model(), read_card(STUDENT)
    students = {"shipped student": STUDENT}
    for sizes in (ALL, *SIZES):
        config = settings(card, args, sizes=sizes)
        place = args.folder / sizes.replace(", ", "+")
        for _ in td.distill(model, config, place, prompts=read_prompts(PROMPTS)):
            pass
        students[f"student of {sizes}"] = place / "student.safetensors"

    def features(size: str, arm: Arm, seed: int) -> Tensor:
        width, height = map(int, size.split("x"))
        pictures = torch.cat(list(make_pictures(model.sized(width, height), arm, prompts, seed)))
        return evaluator.network(pictures)[0]

    teacher = teacher_arm(model, 8, Guidance(card.guidance))
    references = {size: features(size, teacher, 1) for size in SIZES}
    print("KID x 1000 to the teacher's pictures" + "".join(f"{size:>24}" for size in SIZES))

    def line(name: str, arm: Arm) -> None:
        cells = [str(kid(features(size, arm, 2), references[size])) for size in SIZES]
        print(f"{name:<36}" + "".join(f"{cell:>24}" for cell in cells), flush=True)

    line("teacher, other noise", teacher)
    for name, path in students.items():
        student, _ = td.load_student(path, model)
        line(name, student_arm(student))
        student.release()


if __name__ == "__main__":
    main()
