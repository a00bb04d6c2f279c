"""`turbodistill frames`: frames between pictures, between those of a video, or between prompts, as a film."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..demo import files
from ..trainer.config import MOST_SEED, ConfigError
from .arguments import add_model, between, model_options, place
from .sample import device, read_picture, size

MOST_TIMES = 16
MOST_RATE = 120


def command(commands: Any) -> None:
    """Add `frames` to the command line's subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "frames", help="make the frames between pictures, those of a video, or prompts"
    )
    parser.add_argument("pictures", nargs="*", type=place, help="two or more pictures, in order")
    parser.add_argument("--video", type=place, help="a video, in place of pictures; its sound is left out")
    parser.add_argument("--between", type=between(1, 1000), help="frames between two pictures or prompts (default: 15)")
    parser.add_argument(
        "--times", type=between(2, MOST_TIMES), help="with --video: how many times as many frames, 2 to 16 (default: 2)"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="prompt of the pictures, repeatable for one each; without pictures two or more prompts are drawn",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the film: .mp4, .webp or .gif; or a folder for PNG files"
    )
    parser.add_argument(
        "--fps", type=between(1, MOST_RATE, float), help="frames a second (default: 24, or the video's times --times)"
    )
    parser.add_argument(
        "--strength",
        type=between(0.01, 1, float),
        default=0.4,
        help="how much is made anew in the middle between two pictures, 0.01 to 1 (default: 0.4)",
    )
    parser.add_argument(
        "--turn",
        type=between(0, 3.14, float),
        default=0.2,
        help="radians by which the noise turns from one picture to the next; more moves more (default: 0.2)",
    )
    parser.add_argument("--seed", type=between(0, MOST_SEED - 1), default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--steps", type=between(1, 8), default=1, help="steps of each frame (default: 1)")
    add_model(parser)
    parser.add_argument(
        "--student", type=place, help="file of a student, or of a few-step LoRA (default: the embedded one)"
    )
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT in pixels (default: the model's own)")
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1, mps or xpu (default: cuda if there is one)")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Write the film, and print where it is and how many frames it has."""
    from ..generate.film import FORMATS, check_format
    from ..generate.frames import Motion, check_motion

    _check(args)
    kind = args.out.suffix.lower().removeprefix(".")
    if kind in FORMATS:
        check_format(kind)
    elif kind:
        raise ConfigError(f"--out is {args.out}: give a name that ends with .mp4, .webp or .gif, or a folder")
    motion = Motion(args.strength, args.turn, args.seed, args.steps)
    args.between = args.times - 1 if args.video else args.between or 15
    check_motion(motion, args.between)
    try:
        made = _write(args, motion, kind)
    except ValueError as error:  # such as a video of one frame
        raise ConfigError(str(error)) from None
    print(f"{args.out}: {made} frames")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not belong together."""
    if args.video and args.pictures:
        raise ConfigError("--video and pictures are given: give one of them")
    if args.video and args.between:
        raise ConfigError("--between is of pictures: a video takes --times")
    if args.times and not args.video:
        raise ConfigError("--times is of a video: pictures take --between")
    if not args.video and not args.pictures and len(args.prompt) < 2:
        raise ConfigError("there is nothing to make frames between: give two pictures, --video, or --prompt twice")
    if len(args.pictures) == 1:
        raise ConfigError(f"{args.pictures[0]} is one picture: give two or more")
    if args.pictures and len(args.prompt) not in (0, 1, len(args.pictures)):
        raise ConfigError(
            f"{len(args.prompt)} prompts and {len(args.pictures)} pictures are given: give one prompt, or one each"
        )
    if args.video and len(args.prompt) > 1:
        raise ConfigError("--video takes one --prompt for all its frames")
    if args.video:
        args.times = args.times or 2


def _write(args: argparse.Namespace, motion: Any, kind: str) -> int:
    from tqdm import tqdm

    from ..generate.few_step import few_step_model, open_file
    from ..generate.film import read_film, write_film
    from ..generate.frames import interpolate, morph
    from ..generate.stream import Stream
    from ..trainer.data.files import whole_file
    from ..trainer.data.images import to_image
    from ..trainer.pipeline.load import load_model

    host = load_model(args.model, args.device, args.size, **model_options(args))
    model, remarks = few_step_model(host, open_file(args.student or files.STUDENT), args.model)
    for remark in remarks:
        print(f"turbodistill: {remark}", file=sys.stderr)
    stream, rate = Stream(host, model), args.fps or 24.0
    if args.video:
        film = read_film(args.video, host.resolution)
        rate = args.fps or film.rate * args.times
        given: Iterator[Any] = film.pictures
    else:
        given = (read_picture(path, host.resolution) for path in args.pictures)
    with model.merged():
        if args.video or args.pictures:
            frames = interpolate(stream, given, args.between, args.prompt or ("",), motion)
        else:
            frames = morph(stream, args.prompt, args.between, motion)
        shown = tqdm(frames, desc="frames", unit="frame", leave=False)
        if kind:
            pixels = ((_pixels(frame), 1 / rate) for frame in shown)
            with whole_file(args.out) as part, part.open("wb") as file:
                return write_film(file, kind, pixels)
        args.out.mkdir(parents=True, exist_ok=True)
        number = 0
        for number, frame in enumerate(shown, 1):
            to_image(frame).save(args.out / f"{number:06d}.png")
        return number


def _pixels(frame: Any) -> Any:
    return frame.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
