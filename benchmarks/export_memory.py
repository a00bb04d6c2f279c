"""How much of the computer's memory an export takes, and loading, against the size of the checkpoint.

    python benchmarks/export_memory.py                  # a synthetic SDXL of 6.9 GB in float16
    python benchmarks/export_memory.py --kind sd15

Each runs in a process of its own. Printed are the largest resident set (VmHWM), with the pages of mapped files
that the system can take back, and the memory that it cannot (RssAnon), both with Python and torch in them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from turbodistill.core.card import StudentCard
from turbodistill.core.fit import read_base

TESTS = Path(__file__).parents[1] / "tests" / "export"
WHAT = ("kohya", "peft", "merged", "diffusers", "load")
EXPORT = """
import sys, threading
from pathlib import Path
from turbodistill.generate.export.export import Export
from turbodistill.trainer.checkpoint.load import load_pipeline

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

most, over = [0], threading.Event()
def watch():
    while not over.wait(0.02):
        most[0] = max(most[0], status("RssAnon"))
thread = threading.Thread(target=watch)
thread.start()
student, to, out, base, tokenizer = sys.argv[1:]
if to == "load":
    loaded = load_pipeline(base, tokenizer=tokenizer)
    assert not any(p.is_meta for p in loaded.pipe.unet.parameters())
else:
    for _ in Export(Path(student), to, Path(out), Path(base), tokenizer=Path(tokenizer)).run():
        pass
over.set()
thread.join()
print(status("VmHWM") * 1024, most[0] * 1024)
"""


def synthetic():
    """The tests' full-size checkpoints."""
    spec = importlib.util.spec_from_file_location("turbodistill_full_size", TESTS / "full_size.py")
    sys.modules[spec.name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def write_student(made, path: Path, base: Path, kind: str, rank: int = 4) -> Path:
    """A LoRA on all layers of the UNet."""
    noise, about = made.Noise(1), made.KINDS[kind]
    tensors = {}
    for name, shape in made.single_file_shapes(about).items():
        if not (name.startswith("model.diffusion_model.") and name.endswith(".weight")) or len(shape) < 2:
            continue
        layer = name.removeprefix("model.diffusion_model.").removesuffix(".weight")
        key, small = "lora_unet_" + layer.replace(".", "_"), min(rank, shape[0])
        tensors[f"{key}.lora_down.weight"] = noise("down", (small, *shape[1:])).clone()
        tensors[f"{key}.lora_up.weight"] = 0.1 * noise("up", (shape[0], small, *(1 for _ in shape[2:])))
        tensors[f"{key}.alpha"] = torch.tensor(float(small))
    card = StudentCard(
        "lora", base.stem, read_base(base).hashes[0], about.architecture, about.prediction, about.prediction, (999,),
        4.0, (512, 512), rank=rank, alpha=float(rank),
    )  # fmt: skip
    save_file(tensors, path, card.to_metadata())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="sdxl", choices=("sd15", "sd21", "sdxl"))
    parser.add_argument("--only", nargs="*", choices=WHAT, help="some of them")
    parser.add_argument("--folder", type=Path, help="where the files lie meanwhile (default: the system's for such)")
    args = parser.parse_args()
    made = synthetic()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        place = Path(folder)
        base = made.write(place / "base.safetensors", args.kind)
        student = write_student(made, place / "student.safetensors", base, args.kind)
        (place / "vocab.json").write_text('{"!": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}')
        (place / "merges.txt").write_text("#version: 0.2\n")
        size = base.stat().st_size
        print(f"{args.kind}: {size / 1e9:.2f} GB in float16")
        print(f"{'what':<12}{'VmHWM':>10}{'of the file':>13}{'RssAnon':>10}{'of the file':>13}")
        for to in args.only or WHAT:
            out = place / ("out" if to == "diffusers" else "out.safetensors")
            ran = subprocess.run(
                [sys.executable, "-c", EXPORT, *map(str, (student, to, out, base, place))],
                capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            if ran.returncode:
                sys.exit(ran.stderr)
            whole, anonymous = map(int, ran.stdout.split())
            columns = (f"{n / 1e9:>7.2f} GB{n / size:>13.2f}" for n in (whole, anonymous))
            print(f"{to:<12}{''.join(columns)}", flush=True)
            if out.is_file():
                out.unlink()


if __name__ == "__main__":
    main()
