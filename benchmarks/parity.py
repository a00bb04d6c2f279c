"""Whether a change of the code moved any number: losses and students of a matrix of small trainings, as hashes.

    python benchmarks/parity.py --front cli > before.txt      # also comfyui, a1111, forge: the real hosts
    python benchmarks/parity.py --front cli | diff before.txt -

Each training has a regression phase of 2 updates and 20 in all. Losses are those of the history file; a student's
hash is of its tensors alone. The hosts train what their page would: a LoRA or copy judged by latents.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

CLONE = Path(__file__).parents[1]
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
PICTURES = "pictures"
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


def module(folder: str, name: str) -> Any:
    """A module of the host tests, by its path."""
    full = f"parity_{folder}_{name}"
    if full not in sys.modules:
        path = CLONE / "tests" / "hosts" / folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(full, path)
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


def pictures(folder: Path) -> Path:
    """A few captioned pictures."""
    from PIL import Image

    folder.mkdir(parents=True)
    for i, line in enumerate(LINES):
        Image.new("RGB", (64, 64), (80 * i, 200 - 60 * i, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(line)
    return folder


def results(base: Path, name: str) -> tuple[Path, Path]:
    """A run's history, and its student wherever the host puts it."""
    students = [p for p in base.rglob("*.safetensors") if p.stem == name or p.match(f"{name}/student.safetensors")]
    return next(base.rglob(f"{name}/history.csv")), students[0]


# A training by its name and settings -> its history and its student.
Train = Callable[[str, dict[str, Any]], tuple[Path, Path]]


@contextlib.contextmanager
def cli(base: Path) -> Iterator[Train]:
    from turbodistill.app.cli import main

    (base / "prompts.txt").write_text("\n".join(LINES))
    images = pictures(base / PICTURES)

    def train(name: str, settings: dict[str, Any]) -> tuple[Path, Path]:
        out = base / name
        flags = ["distill", "--prompts", str(base / "prompts.txt"), "--out", str(out)]
        flags += ["--pairs-folder", str(base / "pairs")]
        if settings.get("positives"):
            flags += ["--images", str(images)]
        for key, value in (PAIRS | settings).items():
            flag = key.replace("_", "-")
            flags += [f"--{flag if value else 'no-' + flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        with contextlib.redirect_stdout(sys.stderr):
            assert main(flags) == 0
        return out / "history.csv", out / "student.safetensors"

    yield train


@contextlib.contextmanager
def comfyui(base: Path) -> Iterator[Train]:
    from turbodistill.trainer.config import Config

    client = module("comfyui", "client")
    (base / "custom_nodes").mkdir(parents=True)
    (base / "custom_nodes" / "turbodistill").symlink_to(CLONE, target_is_directory=True)
    for folder in ("input", "output", "user", "models/checkpoints", "models/loras"):
        (base / folder).mkdir(parents=True)
    pictures(base / "input" / PICTURES)
    with client.serve(*client.installation(), base) as server:

        def train(name: str, settings: dict[str, Any]) -> tuple[Path, Path]:
            graph = client.Graph()
            demo = graph.add("TurboDistillLoadDemoModel", batch_size=1)
            parts = {"model": demo, "clip": demo[1], "vae": demo[2]}
            prompts = graph.add("TurboDistillPrompts", source="the text below", text="\n".join(LINES), file="")
            pairs = graph.add(
                "TurboDistillTeacherPairs", **parts, prompts=prompts, width=64, height=64, at_once=8, **PAIRS
            )
            own = {k: settings[k] for k in ("rank", "updates", "batch_size", "gradient_checkpointing")}
            rest = Config().to_dict() | settings
            rest = {
                k: v for k, v in rest.items() if k not in PAIRS and k not in own and not k.startswith("pixel_backbone")
            }
            more = {"settings": graph.add("TurboDistillAdvancedSettings", **rest)}
            if settings.get("positives"):
                more["images"] = graph.add("TurboDistillImageFolder", folder=PICTURES)
            distilled = graph.add("TurboDistillDistill", **parts, pairs=pairs, name=name, **own, **more)
            graph.add("PreviewAny", source=distilled[2])
            server.run(graph)
            return results(base, name)

        yield train


@contextlib.contextmanager
def webui(kind: str, base: Path) -> Iterator[Train]:
    client, made = module("webui", "client"), module("webui", "checkpoint")
    kinds = client.KINDS[kind]
    for folder in ("extensions", "models/Stable-diffusion", "models/Lora"):
        (base / folder).mkdir(parents=True)
    (base / "extensions" / "turbodistill").symlink_to(CLONE, target_is_directory=True)
    images = pictures(base / PICTURES)
    file, shape = {"a1111": ("tiny.safetensors", made.A1111), "forge": ("small.ckpt", made.FORGE)}[kind]
    made.write(base / "models" / "Stable-diffusion" / file, shape)
    with client.serve(kinds, *client.installation(kinds), base) as server:
        server.txt2img(prompt="a fox", sampler_name="Euler", steps=2, seed=5)

        def train(name: str, settings: dict[str, Any]) -> tuple[Path, Path]:
            told = {"prompts": "\n".join(LINES), "width": 64, "height": 64, "name": name}
            if settings.get("positives"):
                told["images"] = str(images)
            server.call("turbodistill/v1/distill", told | {"settings": PAIRS | settings})
            while (run := server.call("turbodistill/v1/run?pictures=none"))["state"] == "working":
                time.sleep(0.2)
            assert run["state"] == "done", run["error"]
            return results(base, name)

        yield train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--front", choices=("cli", "comfyui", "a1111", "forge"), default="cli")
    parser.add_argument("--only", help="a case by its name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the hosts, too: another number of threads sums in another order
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        opened = {"cli": cli, "comfyui": comfyui}.get(args.front, lambda folder: webui(args.front, folder))
        with opened(base) as train:
            for number, (case, changes) in enumerate(CASES.items()):
                if (case in OF_CLI and args.front != "cli") or (args.only and args.only != case):
                    continue
                history, student = train(f"case-{number}", COMMON | changes)
                print(
                    f"{args.front:<8} {case:<34} losses {of_history(history)} student {of_student(student)}", flush=True
                )


if __name__ == "__main__":
    main()
