"""Whether a change of the code moved any number: losses and students of a matrix of small trainings, as hashes.

    python benchmarks/parity.py --front cli > before.txt      # also ui, and the real comfyui, a1111, forge
    python benchmarks/parity.py --front cli | diff before.txt -

Each training has a regression phase of 2 updates and 20 in all. Losses are those of the history file; a student's
hash is of its tensors alone. The hosts train what their page would: a LoRA or copy judged by latents.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fronts import front
from safetensors.torch import load_file

PAIRS = {"pairs": 8, "pair_steps": 2, "pair_sampler": "dpmpp_2m", "guidance": 3.0, "seed": 0}
COMMON = {
    "rank": 4,
    "updates": 20,
    "batch_size": 2,
    "gradient_checkpointing": False,
    "regression_updates": 2,
    "discriminator_warmup": 1,
    "adversarial_ramp": 2,
}
COMMON |= {"head_channels": 8, "precision": "float32", "preview_every": 0, "evaluate_every": 0, "save_every": 20}
CASES: dict[str, dict[str, Any]] = {
    "LADD, approximate R1": {},
    "LADD, exact R1": {"r1": "exact", "r1_weight": 0.01},
    "ADD, pixels": {"pixel_backbone": "embedded", "pixel_size": 56},
    "ADD's distillation": {"distillation_weight": 2.5, "teacher_steps": 2},
    "NFSD": {"distillation": "nfsd", "distillation_weight": 1.0},
    "matching": {"distillation": "matching", "distillation_weight": 0.5, "fake_score_rank": 4},
    "relativistic, mismatch, features": {
        "adversarial": "relativistic",
        "mismatch_weight": 0.5,
        "feature_weight": 0.2,
        "condition_image": True,
        "student_steps": 3,
    },
    "accumulation 2": {"gradient_accumulation": 2},
    "discriminator updates 3": {"discriminator_updates": 3},
    "two time scales": {
        "distillation": "matching",
        "distillation_weight": 0.5,
        "fake_score_rank": 4,
        "fake_score_updates": 3,
        "discriminator_updates": 2,
    },
    "R1 of the data": {"r1": "data"},
    "checkpointing": {"gradient_checkpointing": True},
    "full copy": {"rank": 0, "lr": 1e-5},
    "x0, some layers": {"prediction": "x0", "start_timestep": 900, "targets": "attention", "alpha": 2.0},
    "real pictures too": {"positives": "both", "fresh_noise_share": 0.2, "first_step_share": 0.7},
}
OF_CLI = {"ADD, pixels"}
LINES = ["a red fox, animal, in flat noto style", "an owl, animal, in flat twemoji style", "a cat, animal"]


def digest(parts: Iterator[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:16]


def of_history(path: Path) -> str:
    """A hash of every number of a history but the times."""
    with path.open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    assert len(rows) == 20
    return digest(repr(sorted(row.items())).encode() for row in rows)


def of_student(path: Path) -> str:
    tensors = load_file(path)
    return digest(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))


def pictures(folder: Path) -> Path:
    """A few captioned pictures."""
    from PIL import Image

    folder.mkdir(parents=True)
    for i, line in enumerate(LINES):
        Image.new("RGB", (64, 64), (80 * i, 200 - 60 * i, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(line)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--front", choices=("cli", "comfyui", "ui", "a1111", "forge"), default="cli")
    parser.add_argument("--only", help="a case by its name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the hosts, too: another number of threads sums in another order
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        with front(args.front, base, LINES, pictures) as train:
            for number, (case, changes) in enumerate(CASES.items()):
                if (case in OF_CLI and args.front != "cli") or (args.only and args.only != case):
                    continue
                history, student = train(f"case-{number}", PAIRS | COMMON | changes)
                print(
                    f"{args.front:<8} {case:<34} losses {of_history(history)} student {of_student(student)}", flush=True
                )


if __name__ == "__main__":
    main()
