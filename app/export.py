"""`turbodistill export`: a student's file in the format that another program reads."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .arguments import between, place

# As in generate/export, which is imported when it is needed.
FORMATS = {
    "kohya": "LoRA for ComfyUI, the WebUIs and diffusers",
    "comfy": "LoRA with ComfyUI's names",
    "peft": "LoRA as diffusers saves it",
    "merged": "checkpoint with the student in it, for all of them",
    "diffusers": "pipeline folder",
    "lora": "LoRA of --rank out of a full student",
}
DTYPES = ("float16", "bfloat16", "float32")


def command(commands: Any) -> None:
    """Add `export` to the command line's subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export", help="write a student as a LoRA, a merged checkpoint or a diffusers folder"
    )
    parser.add_argument("student", type=place, help="student file")
    words = "; ".join(f"{name}: {about}" for name, about in FORMATS.items())
    parser.add_argument("--to", choices=FORMATS, required=True, help=words)
    parser.add_argument(
        "--out", type=place, required=True, help="file that ends in .safetensors; with --to diffusers a folder"
    )
    parser.add_argument(
        "--base",
        type=place,
        help="the base model: a .safetensors file or a diffusers folder (for merged, diffusers, lora)",
    )
    parser.add_argument("--rank", type=between(1, 1024), help="rank of --to lora; 32 to 128, more is nearer and larger")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="precision of what is written (default: float16)"
    )
    parser.add_argument(
        "--tokenizer",
        type=place,
        help="file or folder of CLIP's vocabulary, for --to diffusers of a single file (default: found)",
    )
    parser.add_argument("--force", action="store_true", help="replace an --out that is there")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Write the file or the folder; 0 when it is there."""
    from tqdm import tqdm

    from ..generate.export.export import Export

    made = Export(args.student, args.to, args.out, args.base, args.rank, args.dtype, args.tokenizer, args.force)
    for remark in made.remarks:
        print(f"turbodistill: {remark}", file=sys.stderr)
    progress = made.run()
    bar = tqdm(desc=args.out.name, unit="B", unit_scale=True, delay=0.5)
    try:
        for step in progress:
            bar.total = step.total
            bar.update(step.done - bar.n)
    finally:
        progress.close()
        bar.close()
    print("\n".join(made.report))
    return 0
