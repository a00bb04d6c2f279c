"""What a student keeps of its teacher's negative prompt, prefix and suffix: the shares of styles in its pictures.

    python benchmarks/baked_prompts.py --folder baked      # about 20 minutes on a CPU core; goes on where it stopped
    python benchmarks/baked_prompts.py --folder baked --front comfyui    # trained there; or ui, the WebUI's tab

The embedded model is asked for names without a style, and draws all three. Students of four recipes go on from the
shipped one: with nothing more, away from a style (negative prompt), and with a style as suffix, typed or baked in. A
classifier fitted to real pictures tells the styles of teacher and student; a student's pictures are of the bare names,
but where it says typed. Intervals are 95 % of a binomial's (Wilson).
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
import turbodistill as td
from fronts import front
from shipped import settings
from turbodistill.core.card import read_card
from turbodistill.core.denoiser import Guidance
from turbodistill.demo.files import REFERENCE, STUDENT
from turbodistill.measure.evaluate import Evaluator, load_reference, make_pictures, teacher_arm
from turbodistill.trainer.data.affixes import Affixes

STYLE, OTHER = "in flat noto style", "in glossy 3d fluent style"
RECIPES = {
    "nothing": {},
    f"negative {OTHER!r}": {"negative_prompt": OTHER},
    f"suffix {STYLE!r}, typed": {"prompt_suffix": STYLE},
    f"suffix {STYLE!r}, baked in": {"prompt_suffix": STYLE, "bake_affixes": True},
}


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z, p = 1.96, count / total
    middle, half = p + z * z / (2 * total), z * (p * (1 - p) / total + z * z / (4 * total * total)) ** 0.5
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def shares(evaluator: Evaluator, pictures: torch.Tensor) -> str:
    """The share of each style among pictures (N, 3, H, W)."""
    counts = Counter(evaluator.classifier.words(evaluator.network(pictures)[1]))
    cells = []
    for name in evaluator.classifier.names:
        low, high = wilson(counts[name], len(pictures))
        cells.append(f"{name} {counts[name] / len(pictures):.2f} ({low:.2f}-{high:.2f})")
    return "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the runs, which go on from there")
    parser.add_argument("--front", choices=("cli", "comfyui", "ui"), default="cli", help="what trains the students")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=384)
    parser.add_argument("--pictures", type=int, default=128, help="that are classified for each line")
    args = parser.parse_args()
    evaluator = Evaluator(load_reference(REFERENCE))
    names = sorted({caption.rpartition(", in ")[0] for caption in evaluator.known.captions})
    model, card = td.load_model(), read_card(STUDENT)
    prompts = (names * -(-args.pictures // len(names)))[: args.pictures]
    students = {}
    with front(args.front, args.folder / args.front, names) as train:
        for recipe, words in RECIPES.items():
            name = recipe.replace("'", "").replace(" ", "-").replace(",", "")
            _, students[recipe] = train(name, settings(card, args, **words).to_dict())
    for recipe, words in RECIPES.items():
        config = settings(card, args, **words)
        affixes = Affixes.of(config)
        teacher = teacher_arm(model, 8, Guidance.of(config), config.negative_prompt, affixes)
        by_teacher = torch.cat(list(make_pictures(model, teacher, prompts, 1)))
        print(f"{recipe}\n  teacher           {shares(evaluator, by_teacher)}", flush=True)
        student, _ = td.load_student(students[recipe], model)
        bare = torch.stack(list(td.sample(model, student, prompts, seed=100_000)))
        print(f"  student           {shares(evaluator, bare)}")
        if affixes.suffix and not affixes.baked:
            typed = torch.stack(list(td.sample(model, student, [affixes.student(p) for p in prompts], seed=100_000)))
            print(f"  student, typed    {shares(evaluator, typed)}")
        student.release()


if __name__ == "__main__":
    main()
