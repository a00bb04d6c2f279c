"""The command line: `turbodistill demo | distill | sample | frames | evaluate | info | export | push | ui`."""

from __future__ import annotations

import argparse
import dataclasses
import io
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..core.version import VERSION
from ..demo import files
from ..trainer.config import Config, ConfigError, read_toml
from ..trainer.setting import nearest
from . import export, frames, info, push, sample, ui
from .arguments import add_model, between, folder, model_options, new_file, place, setting
from .interrupt import interruptible
from .progress import follow
from .quiet import quiet

METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Mistakes of the user end with one line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that cannot show a name shows its code
            stream.reconfigure(errors="backslashreplace")
    parser = make_parser()
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_unrecognised(unknown, takes_settings=args.command is run_distill))
    from ..core.card import CardError
    from ..trainer.data.files import DataError
    from ..trainer.loop.distill import Diverged
    from ..trainer.pipeline.host import ModelError
    from ..trainer.run.memory import OutOfMemory, advice, is_out_of_memory
    from ..trainer.world import Apart
    from .processes import launched

    if launched() > 1 and args.command is not run_distill:
        parser.error("only distill runs in several processes: start this one without a launcher")
    try:
        with quiet(*(("diffusers", "transformers") if getattr(args, "model", None) else ())):
            return args.command(args)
    except BrokenPipeError:
        raise  # no mistake: whoever reads our output has gone
    except (ConfigError, CardError, DataError, Diverged, ModelError, OutOfMemory, Apart, OSError, ImportError) as error:
        print(f"turbodistill: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("turbodistill: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"turbodistill: {advice('showing pictures')}", file=sys.stderr)
    return 1


def _unrecognised(unknown: Sequence[str], takes_settings: bool) -> str:
    """What to say of arguments that no command knows; of a setting's, which one is nearest."""
    flag = next((a.partition("=")[0] for a in unknown if a.startswith("--")), None)
    words = f"unrecognized arguments: {' '.join(unknown)}"
    near = nearest(flag[2:].replace("-", "_"), dataclasses.fields(Config)) if flag and takes_settings else None
    return f"{words}; the setting nearest to {flag} is --{near.replace('_', '-')}" if near else words


def make_parser() -> argparse.ArgumentParser:
    """The command line: every command with its options."""
    parser = argparse.ArgumentParser(
        prog="turbodistill",
        description="Turn a diffusion checkpoint into its own one-step Turbo, and sample it in one step.",
    )
    parser.add_argument("--version", action="version", version=f"turbodistill {VERSION}")
    # A part of a flag would be taken for another one silently: --prompt for --prompts.
    whole: Any = partial(argparse.ArgumentParser, allow_abbrev=False)
    pictures = between(8, 100_000)  # fewer leave some measures undefined
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=whole)

    demo = commands.add_parser("demo", help="distil the small embedded model and report on it, start to end")
    demo.add_argument(
        "--out", type=folder, default=Path("runs/demo"), help="folder for everything (default: runs/demo)"
    )
    demo.add_argument(
        "--minutes",
        type=between(0.1, 10_000, float),
        help="training time of each of the two students (default: 8, or less where the machine is slow, so that the "
        "whole takes a quarter of an hour)",
    )
    demo.add_argument("--count", type=pictures, default=128, help="pictures per arm that are measured (default: 128)")
    demo.add_argument("--seed", type=between(0, 1_000_000), default=0, help="of pairs and training (default: 0)")
    demo.set_defaults(command=run_demo)

    distill = commands.add_parser("distill", help="distil a checkpoint with prompts alone, or with your pictures")
    add_model(distill)
    distill.add_argument(
        "--prompts",
        type=place,
        help="prose, tags or auto for a built-in list; a text file, one prompt a line; or a folder of pictures, for "
        "the prompts that A1111 or ComfyUI wrote into them (see docs/prompts.md; default: auto, which suits --model)",
    )
    distill.add_argument(
        "--wildcards", type=folder, help="folder of wildcard files, besides `wildcards` beside the file of --prompts"
    )
    distill.add_argument(
        "--images",
        type=place,
        help="captioned pictures for the discriminator: a folder, or a .tar or .parquet file (see docs/data.md)",
    )
    distill.add_argument(
        "--out", type=folder, default=Path("runs/distill"), help="folder for everything; a run there goes on"
    )
    distill.add_argument(
        "--pairs-folder", type=folder, help="folder of the teacher pairs, if other runs share them (default: in --out)"
    )
    distill.add_argument(
        "--estimate", action="store_true", help="only tell what memory it takes, and what time and disk the pairs"
    )
    distill.add_argument(
        "--fsdp",
        action="store_true",
        help="of a training in several processes: each holds a part of a full student (see docs/processes.md)",
    )
    distill.add_argument("--title", default="training", help="what its progress bar is called (default: training)")
    distill.add_argument("--config", type=place, help="TOML file of settings; the flags below go before it")
    add_settings(distill)
    distill.set_defaults(command=run_distill)

    sample.command(commands)
    frames.command(commands)
    evaluate = commands.add_parser("evaluate", help="measure students against their teacher")
    add_model(evaluate)
    evaluate.add_argument(
        "--student", type=place, action="append", help="student file, repeatable (default: the shipped one)"
    )
    evaluate.add_argument(
        "--reference", type=place, help="zip of real pictures (default: the embedded model's, of emoji)"
    )
    evaluate.add_argument(
        "--count", type=pictures, help="pictures per arm and seed (default: one of every held-out prompt)"
    )
    evaluate.add_argument("--seeds", type=between(1, 100), default=3, help="noise seeds (default: 3)")
    evaluate.add_argument("--out", type=new_file, help="also write the figures to this JSON file")
    evaluate.set_defaults(command=run_evaluate)

    info.command(commands)
    export.command(commands)
    push.command(commands)
    ui.command(commands)
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of Config, in its groups, with its default and help."""
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(Config):
        about = f.metadata
        group = groups.setdefault(about["group"], parser.add_argument_group(about["group"] + " settings"))
        options: dict[str, Any] = {"default": None, "help": f"{about['help']} (default: {f.default})", "dest": f.name}
        if isinstance(f.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": setting(type(f.default)), "choices": about["choices"]}
            options["metavar"] = None if about["choices"] else METAVARS[type(f.default)]
        group.add_argument("--" + f.name.replace("_", "-"), **options)


def settings(args: argparse.Namespace) -> Config:
    """Config from the TOML file, if one is given, and the flags."""
    base = Config.from_toml(args.config) if args.config else Config()
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config)}
    return base.replace(**{k: v for k, v in given.items() if v is not None})


def given(args: argparse.Namespace) -> set[str]:
    """The names of the settings that the flags or the TOML file give."""
    flags = {f.name for f in dataclasses.fields(Config) if getattr(args, f.name) is not None}
    return flags | set(read_toml(args.config) if args.config else ())


def run_distill(args: argparse.Namespace) -> int:
    """Distil a model into a one-step student; 0 when it is written; 130 after Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    from ..core.card import header
    from ..trainer.data.built_in import AUTO, suggest
    from ..trainer.data.prompts import find_prompts, is_built_in, suggested
    from ..trainer.pipeline.load import load_model
    from ..trainer.run import run, training
    from ..trainer.run.estimate import estimate
    from ..trainer.run.events import Interrupted
    from ..trainer.run.memory import free_memory
    from ..trainer.run.scores import latent_score
    from .planned import print_plan
    from .processes import join, launched, leave

    config = settings(args)
    if config.vram and launched() > 1:
        raise ConfigError(run.ALONE_PLANNED)
    world = join(config, args.fsdp)
    wildcards = [args.wildcards] if args.wildcards else []
    source = args.prompts or Path(AUTO)
    auto = args.prompts is None or (source == Path(AUTO) and is_built_in(source))
    if auto and args.model is None:
        source, auto = files.PROMPTS, False
    found = None if auto else find_prompts(source, wildcards=wildcards)
    run.check_inputs(config, args.images)
    host = load_model(args.model, **model_options(args))
    if found is None:
        found = suggested(suggest(host.name, host.architecture, header(str(args.model))[0]))
    if found.words and world.leads:
        print(found.words)
    score = latent_score if args.model else _judge(None).kid_score(host)
    if config.vram:
        chosen = print_plan(host, config, found.lines, args.images, given(args), args.out)
        if args.estimate or not chosen.fits:
            return 0 if chosen.fits else 1
        config = chosen.config.replace(vram=0.0)
    if args.estimate:
        if world.leads:
            print(estimate(host, config, found.lines, args.images).in_words(free_memory(host.denoiser.device)))
        return 0
    events = run.run(host, config, args.out, found.lines, args.images, score, args.pairs_folder, world=world)
    try:
        finished = follow(events, config, args.out, host, args.title, world)
    except Interrupted as end:
        leave()
        if world.leads:
            print(f"saved; to go on: turbodistill {shlex.join(sys.argv[1:])}")
        return end.status
    leave()
    if world.leads:
        print(f"student: {finished.path}\nhistory: {args.out / training.HISTORY}\npictures: {args.out / 'previews'}")
    return 0


def _judge(reference: Path | None):
    from ..measure.evaluate import Evaluator, load_reference

    return Evaluator(load_reference(reference or files.REFERENCE))


def run_demo(args: argparse.Namespace) -> int:
    """Train the embedded model's students and report on them; 0 when the report is written."""
    from ..trainer.run.events import Interrupted
    from .demo import Failed, demo

    try:
        page = demo(args.out, args.minutes, args.count, args.seed, follow, interruptible)
    except Interrupted as end:
        print(f"saved; to go on: turbodistill {shlex.join(sys.argv[1:])}")
        return end.status
    except Failed as error:
        print(f"turbodistill: {error}", file=sys.stderr)
        return 1
    print(f"\nreport: {page.resolve()}")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Measure students against their teacher and print the table."""
    from ..core.card import read_card
    from ..measure.bench import evaluate
    from ..trainer.data.files import check_file, write_whole
    from ..trainer.pipeline.load import load_model

    if args.model and not args.reference:
        raise ConfigError(
            "--model needs --reference: a zip of pictures such as the model should make, with a metadata.jsonl of rows "
            "{file_name, text, style, split}, where split is train or heldout"
        )
    students, reference = args.student or [files.STUDENT], args.reference or files.REFERENCE
    check_file("reference set", reference)
    for student in students:
        read_card(student)
    text, figures = evaluate(load_model(args.model, **model_options(args)), students, reference, args.count, args.seeds)
    print(text)
    if args.out:
        write_whole(args.out, figures.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
