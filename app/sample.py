"""`turbodistill sample`: pictures by a student, a few-step LoRA of others, or a few-step checkpoint, as PNG files."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from ..core.schedule import TIMESTEPS
from ..demo import files
from ..trainer.config import MOST_SEED, ConfigError
from .arguments import add_model, between, folder, model_options, place

NONE = Path("none")
MOST_PROMPTS = 100_000
TOGETHER = 2**20  # pixels that are made at once: one picture of 1024 x 1024, four of 512 x 512


def command(commands: Any) -> None:
    """Add `sample` to the command line's subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sample", help="make pictures with a student, a few-step LoRA or a few-step checkpoint"
    )
    parser.add_argument("prompt", nargs="*", help="one or more prompts")
    parser.add_argument(
        "--prompts", type=place, help="further prompts: a text file, one a line, or what else distill's --prompts takes"
    )
    parser.add_argument(
        "--wildcards", type=folder, help="folder of wildcard files, besides `wildcards` beside the file of --prompts"
    )
    add_model(parser)
    parser.add_argument(
        "--student",
        type=place,
        help="file of a student, or of an LCM, Lightning, Hyper-SD, DMD2, TCD or Turbo LoRA; none where --model is "
        "itself such a checkpoint (default: the embedded model's, with --model none)",
    )
    parser.add_argument(
        "--steps", type=between(1, TIMESTEPS), help="number of steps (default: what the file was made for)"
    )
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT in pixels (default: the model's own)")
    parser.add_argument("--image", type=place, help="picture to begin from, scaled and cropped to the size")
    parser.add_argument(
        "--strength",
        type=between(0.01, 1, float),
        help="with --image: how much of it is made anew, 0.01 to 1; 0.3 keeps most, 1 hardly anything (default: 0.6)",
    )
    parser.add_argument(
        "--seed", type=between(0, MOST_SEED), default=0, help="seed of the first picture; the next ones count on"
    )
    parser.add_argument("--count", type=between(1, 10_000), default=1, help="pictures per prompt (default: 1)")
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1, mps or xpu (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="precision (default: auto, which is float32 on a CPU and half precision elsewhere)",
    )
    parser.add_argument("--out", type=folder, default=Path("."), help="folder for the PNG files (default: here)")
    parser.set_defaults(command=run)


def size(text: str) -> tuple[int, int]:
    """What argparse calls for WIDTHxHEIGHT."""
    from ..trainer.sizes import check_size

    match = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"is {text[:60]!r}: give WIDTHxHEIGHT in pixels, such as 1024x768")
    found = int(match[1]), int(match[2])
    try:
        check_size(*found)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"is {text!r}: {error}") from None
    return found


def device(text: str) -> str:
    """What argparse calls for a device."""
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"is {text[:60]!r}: give cpu, cuda, mps or xpu, or one of several as cuda:1")
    return text


def run(args: argparse.Namespace) -> int:
    """Write the pictures, and print where they are."""
    prompts = _prompts(args)
    if args.strength is not None and args.image is None:
        raise ConfigError("--strength belongs to --image: give a picture to begin from, or leave it out")
    return _make(args, prompts)


def _prompts(args: argparse.Namespace) -> list[str]:
    """Every prompt as often as it is wanted, its choices drawn."""
    from ..generate.sample import check_numbers
    from ..trainer.data.prompts import drawn, find_prompts
    from ..trainer.data.wildcards import Wildcards

    wildcards = [args.wildcards] if args.wildcards else []
    typed = Wildcards(wildcards).put_into(args.prompt) if wildcards else args.prompt
    read, words = find_prompts(args.prompts, wildcards=wildcards) if args.prompts else ([], "")
    given = [*typed, *read]
    if words:
        print(words, file=sys.stderr)
    if not given:
        raise ConfigError("there is no prompt: write one or more, or give a file with --prompts")
    if len(given) * args.count > MOST_PROMPTS:
        raise ConfigError(f"{len(given)} prompts {args.count} times each: at most {MOST_PROMPTS} pictures are made")
    prompts = [prompt for prompt in given for _ in range(args.count)]
    try:
        check_numbers(len(prompts), args.seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return drawn(prompts, range(args.seed, args.seed + len(prompts)))


def _make(args: argparse.Namespace, prompts: list[str]) -> int:
    from ..generate.few_step import cast, check_steps, few_step_model, open_file
    from ..generate.sample import sample
    from ..trainer.data.files import write_whole
    from ..trainer.data.images import to_image
    from ..trainer.pipeline.load import load_model

    student = args.student or (NONE if args.model else files.STUDENT)
    file = None if student == NONE else open_file(student)
    if file:  # before minutes of loading
        check_steps(file.recipe, args.steps)
    if args.image:
        read_picture(args.image, (16, 16))
    how = model_options(args) | ({"with_student": True} if args.model else {})
    if args.model and file and file.card and file.card.clip_skip > 1:  # as it was trained, unless another is asked for
        how = {"clip_skip": file.card.clip_skip} | how
    host = load_model(args.model, args.device, args.size, **how)
    model, remarks = few_step_model(host, file, args.model)
    steps, said = check_steps(model.recipe, args.steps)
    for remark in [*remarks, *said]:
        print(f"turbodistill: {remark}", file=sys.stderr)
    cast(host, model, args.dtype)
    start: dict[str, Any] = {}
    if args.image:
        start["strength"] = args.strength or 0.6
        start["picture"] = host.encode_images(read_picture(args.image, host.resolution)[None])
    base = file.card.base_model if file and file.card else host.name
    timesteps = model.recipe.timesteps(steps, start.get("strength", 1.0))
    settings = {
        "Steps": steps,
        **_sampler(model.recipe, steps),
        "CFG scale": f"{model.recipe.cfg:g}",
        "Seed": 0,
        "Size": f"{host.resolution[0]}x{host.resolution[1]}",
        "Clip skip": host.clip_skip if host.clip_skip > 1 else None,
        "Denoising strength": start.get("strength"),
        "ADD model": None if file and file.card else model.recipe.name,
        "ADD timesteps": None if model.recipe.ordinary else " ".join(map(str, timesteps)),
        "Model": base,
        "Student": file.path.name if file else None,
    }
    together = max(1, min(16, TOGETHER // (host.resolution[0] * host.resolution[1])))
    number = _last_number(args.out)
    for k, picture in enumerate(sample(host, model, prompts, args.seed, steps, together, **start)):
        seed = args.seed + k
        number, path = _free(args.out, number + 1, f"{_slug(prompts[k])}-{seed}")
        write_whole(path, _png_bytes(to_image(picture), infotext(prompts[k], settings | {"Seed": seed})))
        print(path)
    return 0


def _sampler(recipe: Any, steps: int) -> dict[str, str]:
    """The WebUIs' names of what samples so."""
    if recipe.ordinary:
        return {"Sampler": "Euler", "Schedule type": "SGM Uniform"}
    return {"Sampler": f"ADD {'1-step' if steps == 1 else 'few-step'}"}


def _last_number(folder: Path) -> int:
    """The largest number that one of our files there begins with; 0 where there is none."""
    found = (re.match(r"([0-9]{5,20})-", path.name) for path in folder.glob("*.png"))
    return max((int(match[1]) for match in found if match), default=0)


def _free(folder: Path, number: int, name: str) -> tuple[int, Path]:
    """The first number from this one on of which no such file is there, which others may write meanwhile; its path."""
    while (path := folder / f"{number:05d}-{name}.png").exists():
        number += 1
    return number, path


def read_picture(path: Path, size: tuple[int, int]) -> Any:
    """A picture's file, scaled and cropped to a size, (3, height, width) in [0, 1]; raises DataError."""
    from ..trainer.data.files import check_file
    from ..trainer.data.found import Picture
    from ..trainer.data.images import load_picture

    check_file("picture", path)
    return load_picture(Picture(str(path), "", "", lambda: path.open("rb")), size)


def infotext(prompt: str, settings: dict[str, Any]) -> str:
    """How a picture was made, in the WebUIs' words, which their tab PNG Info reads; settings of None are left out."""
    written = {name: str(value) for name, value in settings.items() if value is not None}
    quoted = {name: json.dumps(v, ensure_ascii=False) if re.search(r"[,:\n]", v) else v for name, v in written.items()}
    return f"{prompt}\n" + ", ".join(f"{name}: {value}" for name, value in quoted.items())


def _slug(prompt: str) -> str:
    """The beginning of a prompt as a part of a file's name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:50].strip("-") or "picture"


def _png_bytes(image: Any, parameters: str) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    about, buffer = PngInfo(), io.BytesIO()
    about.add_text("parameters", parameters)
    image.save(buffer, "png", pnginfo=about)
    return buffer.getvalue()
