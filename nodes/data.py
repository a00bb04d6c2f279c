"""Nodes that give a distillation its data: prompts, pictures of one's own, and the teacher's pairs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from comfy_api.latest import io, ui

from ..demo import files
from ..trainer.checks import check_prompt_place
from ..trainer.config import Config
from ..trainer.data.built_in import AUTO, LISTS, Suggestion, suggest
from ..trainer.data.files import DataError, path_of
from ..trainer.data.images import check_pictures, load_picture, load_some
from ..trainer.data.pairs import digest, make_pairs, pairs_key
from ..trainer.data.picture_prompts import is_pictures
from ..trainer.data.pictures import read_pictures
from ..trainer.data.prompts import FoundPrompts, draw_prompts, find_prompts, prompt_lines, suggested
from ..trainer.data.sizes import with_buckets
from ..trainer.data.walk import stamp
from ..trainer.groups import OF_GUIDANCE, OF_IMAGES, OF_PAIRS, OF_PROMPTS, OF_SIZES
from ..trainer.run.events import PairsMade
from ..trainer.run.monitor import Monitor
from ..trainer.sizes import BUCKETS
from .graph import file_names
from .host import page, patcher
from .host.training import ComfyUIHost, cancellable
from .load import CATEGORY
from .panel import watched
from .schema import schema, within_bounds
from .settings import widgets

PROMPTS = io.Custom("TURBODISTILL_PROMPTS")
IMAGES = io.Custom("TURBODISTILL_IMAGES")
PAIRS = io.Custom("TURBODISTILL_PAIRS")
SHOWN = 16  # pictures that a node shows of many


@dataclass(frozen=True)
class Pairs:
    """Teacher pairs on disk, and how they were made: what `trainer.run` needs to find them again."""

    folder: Path
    prompts: list[str]
    settings: dict[str, Any]
    width: int
    height: int
    sampler: Any = None
    sigmas: torch.Tensor | None = None


@dataclass(frozen=True)
class Images:
    """Where captioned pictures lie, and what happens to those that cannot be used."""

    place: Path
    broken_pictures: str


class Prompts(io.ComfyNode):
    """Prompts from a text, a file, one's own pictures or a built-in list."""

    TEXT, FILE = "the text below", "the file below"
    BUILT_IN: ClassVar[dict[str, str | Path]] = {
        **{f"built in: {name}": name for name in (AUTO, *LISTS)},
        "built in: the demo model's": files.PROMPTS,
    }

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["prompt list", "wildcards", "dynamic prompts", "captions"],
            node_id="TurboDistillPrompts",
            display_name="Prompts",
            category=CATEGORY,
            description="The prompts that a student learns from: what you write, a file of yours, those of your own "
            "pictures, or built-in ones. Of {red|blue} one is drawn for every picture.",
            inputs=[
                io.Combo.Input(
                    "source",
                    options=[cls.TEXT, cls.FILE, *cls.BUILT_IN],
                    tooltip="Prompts like those you will use later are best. Built in are lists in sentences (prose) "
                    "and in booru tags; auto takes what suits the connected model.",
                ),
                io.String.Input(
                    "text",
                    default="a {red|black|white} {fox|cat|owl} in a {forest|city|garden}, {photo|oil painting}",
                    multiline=True,
                    dynamic_prompts=False,  # the page would draw once for all pictures
                    tooltip="One prompt a line; of {red|blue} one is drawn, and for __colour__ a line of the wildcard "
                    "file colour.txt. Lines that begin with # are left out.",
                ),
                io.String.Input(
                    "file",
                    default="",
                    tooltip="A text file, one prompt a line; or a folder of pictures as ComfyUI, A1111 or Forge saved "
                    "them, for the prompts in them. Its name in ComfyUI's input folder, or its whole path.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="For the built-in list auto: the model that will be distilled."
                ),
            ],
            outputs=[
                PROMPTS.Output("PROMPTS", display_name="PROMPTS", tooltip="For Teacher Pairs."),
                io.String.Output("examples", display_name="examples", tooltip="Some of the prompts as they are drawn."),
                io.String.Output(
                    "about",
                    display_name="about",
                    tooltip="Which built-in list it is and why; what pictures gave prompts.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, source: str, text: str, file: str, **_):
        changes = ""
        if source in (cls.TEXT, cls.FILE):
            with suppress(DataError, OSError):  # reported when it runs, not when ComfyUI asks whether to run
                place = page.input_path(file) if source == cls.FILE else None
                changes = (
                    stamp(place)
                    if place and is_pictures(place)
                    else digest("\n".join(cls._found(source, text, file, None).lines))
                )
        return f"{source} {text} {file} {changes}"

    @classmethod
    def execute(cls, source: str, text: str, file: str, model: Any = None) -> io.NodeOutput:
        lines, about = cls._found(source, text, file, model)
        return io.NodeOutput(lines, "\n".join(dict.fromkeys(draw_prompts(lines, SHOWN))), about)

    @classmethod
    def _found(cls, source: str, text: str, file: str, model: Any) -> FoundPrompts:
        if source == cls.TEXT:
            lines = prompt_lines(text, page.wildcard_folders())
            if not lines:
                raise DataError("there is no prompt in the text: write one a line")
            return FoundPrompts(lines)
        if source == cls.FILE:
            if not path_of(file):
                raise DataError(
                    "file is empty: give the name of a text file in ComfyUI's input folder, or a whole path"
                )
            place = check_prompt_place(page.input_path(file), page.readable_folders())
            return find_prompts(place, wildcards=page.wildcard_folders())
        if source not in cls.BUILT_IN:
            raise DataError(f"source is {source!r:.100}: use one of {', '.join((cls.TEXT, cls.FILE, *cls.BUILT_IN))}")
        chosen = cls.BUILT_IN[source]
        if chosen == AUTO:
            return suggested(suggest() if model is None else _suggestion(cls, model))
        return find_prompts(LISTS.get(str(chosen), chosen))


class ImageFolder(io.ComfyNode):
    """A folder of captioned pictures, and its captions as prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["dataset", "captions", "training images"],
            node_id="TurboDistillImageFolder",
            display_name="Image Folder",
            category=CATEGORY,
            description="Pictures of your own with captions, for the discriminator to take for real. Not needed: "
            "prompts alone make a student of the model as it is.",
            inputs=[
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="A folder of pictures, each with a .txt of the same name, or with one metadata.jsonl "
                    "(file_name, text); or of .tar or .parquet files. Its name in ComfyUI's input folder, or its whole "
                    "path.",
                ),
                *widgets(OF_IMAGES),
            ],
            outputs=[
                IMAGES.Output("IMAGES", display_name="IMAGES", tooltip="For Distill."),
                PROMPTS.Output(
                    "CAPTIONS", display_name="CAPTIONS", tooltip="The captions as prompts, for Teacher Pairs."
                ),
                io.String.Output(
                    "about", display_name="about", tooltip="How many pictures there are, and what is left out and why."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_):
        if not folder.strip():
            return ""
        try:
            return stamp(page.input_path(folder))
        except DataError as error:
            return str(error)

    @classmethod
    def execute(cls, folder: str, broken_pictures: str) -> io.NodeOutput:
        if not folder.strip():
            raise DataError("folder is empty: give the name of a folder in ComfyUI's input folder, or a whole path")
        images = Images(page.input_path(folder), Config(broken_pictures=broken_pictures).broken_pictures)
        found = read_pictures(images.place, broken_pictures)
        if broken_pictures == "stop":
            check_pictures(found.pictures)
            shown = [load_picture(picture, (256, 256)) for picture in found.pictures[:SHOWN]]
        else:
            shown = load_some(found.pictures, (256, 256), SHOWN)
        about = found.in_words() or f"{len(found.pictures)} pictures"
        preview = ui.PreviewImage(torch.stack(shown).movedim(1, -1), cls=cls)
        return io.NodeOutput(images, found.captions, about, ui=preview)


def base_name(cls, model) -> str:
    """What the MODEL is called: its files, as the graph names them."""
    names = file_names(cls.hidden.prompt or {}, cls.hidden.unique_id)
    return " + ".join(reversed(names)) or patcher.title(model)


def _suggestion(cls, model) -> Suggestion:
    """The built-in list for the MODEL, by what its files say."""
    names = file_names(cls.hidden.prompt or {}, cls.hidden.unique_id)
    return suggest(base_name(cls, model), patcher.architecture(model), patcher.metadata(names))


def _buckets(images: Images | None, resolution: tuple[int, int]) -> str:
    """The sizes that the pictures fit, of the area of `resolution`; raises DataError where there are none."""
    if images is None:
        raise DataError("sizes is 'buckets', those that pictures of yours fit: connect an Image Folder to images")
    found = read_pictures(images.place, images.broken_pictures)
    return with_buckets(Config(sizes=BUCKETS), found, resolution).sizes


class TeacherPairs(io.ComfyNode):
    """Makes the teacher's pictures that a student learns from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["dataset", "synthetic data", "cache latents"],
            node_id="TurboDistillTeacherPairs",
            display_name="Teacher Pairs",
            category=CATEGORY,
            description="Makes pictures with the model as it is, from prompts alone: what the student learns to make "
            "in one step from the same noise. They are kept on disk; cancel when you like, the next run goes on.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will be distilled, with any LoRA you want in it."),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.Vae.Input("vae", tooltip="The model's VAE; here it shows the pictures."),
                PROMPTS.Input("prompts", tooltip="From Prompts, or an Image Folder's captions."),
                io.Int.Input("width", default=512, min=16, max=4096, step=8, tooltip="Pixels; as you will sample it."),
                io.Int.Input("height", default=512, min=16, max=4096, step=8, tooltip="Pixels; as you will sample it."),
                *widgets(OF_PAIRS),
                io.Int.Input("at_once", default=4, min=1, max=256, tooltip="Pictures that are made at a time."),
                *widgets((*OF_PROMPTS, *OF_GUIDANCE, *OF_SIZES), optional=True),
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip="Yours, from KSamplerSelect: the teacher samples with it in place of pair_sampler.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Yours, from BasicScheduler or another one, at denoise 1: in place of pair_steps.",
                ),
                IMAGES.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures of yours, from Image Folder, for sizes 'buckets': those that they fit.",
                ),
            ],
            outputs=[PAIRS.Output("PAIRS", display_name="PAIRS", tooltip="For Distill.")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    @within_bounds
    def execute(
        cls,
        model,
        clip,
        vae,
        prompts: Sequence[str],
        width,
        height,
        at_once,
        sampler=None,
        sigmas=None,
        images: Images | None = None,
        **settings,
    ) -> io.NodeOutput:
        if settings.get("sizes", "").strip() == BUCKETS:
            settings["sizes"] = _buckets(images, (width, height))
        config = Config(**settings, batch_size=at_once)
        loaded = ComfyUIHost(model, clip, vae, base_name(cls, model), width, height)
        loaded = loaded.sampled_by(sampler, sigmas, config)
        folder = page.output_folder() / "pairs" / pairs_key(loaded, config, prompts)
        monitor = Monitor("pairs", folder.name, config, lambda latents: page.show(loaded.decode(latents)))
        with watched(cls.hidden, monitor) as panel, cancellable(model):
            patcher.load(model)
            for done, newest in make_pairs(loaded, config, prompts, folder, monitor.warn):
                panel.follow(PairsMade(done, config.pairs, "teacher pairs", newest))
            monitor.end("done")
        return io.NodeOutput(Pairs(folder, list(prompts), settings, width, height, sampler, sigmas))
