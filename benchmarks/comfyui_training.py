"""What a training step in a real ComfyUI costs, in time and memory, beside the least it could cost.

    python benchmarks/comfyui_training.py --size 64

Runs ComfyUI's own Python, without its server, on a Stable Diffusion 1.5 of random weights in full size
(or `--checkpoint`). Prints the step's time over the sum of its passes, each measured alone in the same
process; and the peak of memory over that of the weights and one pass forward and backward.
COMFYUI_PATH and COMFYUI_PYTHON as for the tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

from comfyui_speed import CLONE, full_size, module

# An accelerator's allocator keeps what is freed for the next pass. glibc's gives it back to the system, which hands
# it out again page by page, zeroed: a step, which holds more at once than any of its passes, then pays for that alone.
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2), "MALLOC_TRIM_THRESHOLD_": str(64 * 1024**3)}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", type=Path, help="a checkpoint of your own")
parser.add_argument("--size", type=int, default=64, help="pixels of a side (default: 64)")
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--rank", type=int, default=64)
parser.add_argument("--repeats", type=int, default=5, help="steps that are timed (default: 5)")
parser.add_argument("--give-back", action="store_true", help="let the C library give freed memory back (see KEEP)")
parser.add_argument("--checkpointing", action="store_true")
parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16", "float16"))


def main() -> None:
    args = parser.parse_args()
    comfyui, python = module("client").installation()
    with tempfile.TemporaryDirectory() as folder:
        path = args.checkpoint or Path(folder) / "checkpoints" / full_size(Path(folder))
        inside = Path(__file__).with_name("comfyui_training_inside.py")
        told = (args.size, args.batch, args.rank, args.repeats, int(args.checkpointing), args.precision)
        environment = os.environ | ({} if args.give_back else KEEP)
        subprocess.run([python, inside, comfyui, CLONE, path, *map(str, told)], env=environment, check=True)


if __name__ == "__main__":
    main()
