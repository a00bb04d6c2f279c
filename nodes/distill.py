"""The nodes that make a student of the loaded model, and keep it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..core.card import StudentCard, read_card, read_student
from ..core.families import suspect
from ..trainer.checks import check_backbone, check_name, find_student
from ..trainer.config import Config
from ..trainer.data.files import DataError, write_whole
from ..trainer.data.pairs import pairs_key
from ..trainer.groups import ADVANCED, LATER, OF_DISTILL, OF_VRAM
from ..trainer.run import run
from ..trainer.run.events import Finished, Preview
from ..trainer.run.monitor import Monitor
from ..trainer.run.plan import set_by_hand
from .data import IMAGES, PAIRS, Images, Pairs, base_name
from .graph import file_names
from .host import page, patcher, save
from .host.training import ComfyUIHost, cancellable, trainable
from .host.vision import eye_name, eye_of
from .load import CATEGORY
from .panel import keep, stopped_early, watched
from .schema import schema
from .settings import widgets

SETTINGS = io.Custom("TURBODISTILL_SETTINGS")
STUDENT = io.Custom("TURBODISTILL_STUDENT")
# ComfyUI's own types, which its nodes for LoRA training give and take.
LORA_MODEL = io.Custom("LORA_MODEL")
LOSS_MAP = io.Custom("LOSS_MAP")
CURVES = ("regression", "guidance", "distillation", "features", "adversarial")  # the first there is tells most
BEGINS = {"batch_size": 4, "gradient_checkpointing": True}  # where the widgets do, for a large model on one card


@dataclass(frozen=True)
class Trained:
    """A student's file, its card, and the MODEL that it was put on."""

    path: Path
    card: StudentCard
    model: Any


class AdvancedSettings(io.ComfyNode):
    """The settings that a first training needs not."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["hyperparameters", "learning rate", "training settings"],
            node_id="TurboDistillAdvancedSettings",
            display_name="Advanced Settings",
            category=CATEGORY,
            description="Every setting of a distillation that Distill does not ask for itself. What is good to begin "
            "with is set.",
            inputs=[*widgets(ADVANCED[: -len(LATER)]), *widgets(LATER, optional=True)],
            outputs=[SETTINGS.Output("SETTINGS", display_name="SETTINGS", tooltip="For Distill.")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        Config(**settings)  # a setting that cannot be is told here, on the node that has it
        return io.NodeOutput(settings)


def run_folder(name: str) -> Path:
    """Where a run of this name lies; raises ConfigError for a name that is no folder's."""
    return page.output_folder() / "runs" / check_name(name)


class Distill(io.ComfyNode):
    """Trains a one-step student of the loaded model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["train", "turbo", "add", "ladd", "dmd", "one step lora", "lora training"],
            node_id="TurboDistillDistill",
            display_name="Distill",
            category=CATEGORY,
            description="Makes a one-step student of the loaded model, on the weights that are loaded already. "
            "Everything is saved as it goes: cancel when you like, the same graph goes on from there.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the pairs were made with."),
                io.Clip.Input("clip", tooltip="The one that the pairs were made with."),
                io.Vae.Input("vae", tooltip="The model's VAE; it shows the previews, and encodes pictures of yours."),
                PAIRS.Input("pairs", tooltip="From Teacher Pairs."),
                io.String.Input(
                    "name",
                    default="my-turbo",
                    tooltip="The run's folder in output/turbodistill/runs; a run of this name goes on.",
                ),
                *widgets(OF_DISTILL, **BEGINS),
                IMAGES.Input("images", optional=True, tooltip="Pictures of yours, from Image Folder."),
                SETTINGS.Input("settings", optional=True, tooltip="From Advanced Settings."),
                *widgets(OF_VRAM, optional=True),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="From Load CLIP Vision (CLIP, SigLIP or DINO): it judges decoded pictures, in place of the "
                    "pixel backbone in Advanced Settings.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="With the student on it: for One-Step Sample."),
                STUDENT.Output("STUDENT", display_name="STUDENT", tooltip="For Save Student."),
                io.String.Output("card", display_name="card", tooltip="What the student says of itself."),
                io.Image.Output(
                    "PREVIEWS", display_name="PREVIEWS", tooltip="The student's pictures of the held-out prompts."
                ),
                LORA_MODEL.Output(
                    "LORA_MODEL",
                    display_name="LORA_MODEL",
                    tooltip="The student's LoRA, for ComfyUI's own Load LoRA Model and Save LoRA Weights. They keep no "
                    "card: how it is sampled is in Save Student's file alone.",
                ),
                LOSS_MAP.Output(
                    "LOSS_MAP",
                    display_name="LOSS_MAP",
                    tooltip="The regression loss (distance from the teacher's pictures), smoothed, for ComfyUI's own "
                    "Plot Loss Graph; of guidance alone, guidance's. The panel shows them all.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, name: str = "", **_):  # a name that another node gives is not known yet
        return stopped_early(name)

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        pairs: Pairs,
        name: str,
        images: Images | None = None,
        settings=None,
        clip_vision=None,
        **chosen,
    ) -> io.NodeOutput:
        config = Config(**(settings or {}) | pairs.settings | chosen)
        check_backbone(config.pixel_backbone, page.readable_folders())
        if clip_vision is not None:
            config = config.replace(pixel_backbone=eye_name(clip_vision))
        if images is not None:
            positives = "both" if config.positives == "teacher" else config.positives
            config = config.replace(positives=positives, broken_pictures=images.broken_pictures)
        if config.init_student:
            found = find_student(config.init_student, page.student_folders(), page.readable_folders())
            config = config.replace(init_student=found)
        folder = run_folder(name)
        with trainable(model) as trained:
            base = base_name(cls, model)
            loaded = ComfyUIHost(model, clip, vae, base, pairs.width, pairs.height, trained)
            loaded = loaded.sampled_by(pairs.sampler, pairs.sigmas, config)
            loaded.eye = None if clip_vision is None else eye_of(clip_vision, loaded.denoiser.device)
            if pairs_key(loaded, config, pairs.prompts) != pairs.folder.name:
                raise DataError("the pairs were made with another model or CLIP: connect the same ones to Distill")
            device = loaded.denoiser.device

            def show(latents):
                return page.show(loaded.decode(latents.to(device)))

            monitor = Monitor("distill", name, config, show, page.free_memory(model))
            with watched(cls.hidden, monitor, folder) as panel, cancellable(trained):
                names = file_names(cls.hidden.prompt or {}, cls.hidden.unique_id)
                if found := patcher.sampling_by_files(names, model):
                    monitor.warn(f"{base} looks like {found.name}, which is distilled already: connect its base model")
                elif word := suspect(base):
                    monitor.warn(f"{base} has {word!r} in its name: if it is a few-step model, connect its base model")
                preview, finished = cls._train(loaded, config, folder, pairs, images, panel)
            pictures = loaded.decode(preview.student.to(device)).movedim(1, -1).cpu()
        tensors, card = read_student(finished.path)
        student, _ = patcher.with_student(model, tensors, card, 1.0, finished.path.name)
        trained = Trained(finished.path, card, student)
        lora = tensors if card.kind == "lora" else page.blocked("the student is a full one: there is no LoRA")
        return io.NodeOutput(student, trained, card.in_words(), pictures, lora, loss_map(monitor.snapshot()))

    @staticmethod
    def _train(loaded, config, folder, pairs, images, panel) -> tuple[Preview, Finished]:
        """Run to the end; the last preview, and what was made."""
        control = panel.monitor.control
        place = None if images is None else images.place
        given = set_by_hand(config, BEGINS)
        events = run.run(
            loaded, config, folder, pairs.prompts, place, pairs_folder=pairs.folder, control=control, given=given
        )
        preview: Preview | None = None
        with closing(events):
            for event in events:
                if isinstance(event, Preview):
                    preview = event
                panel.follow(event)
                if isinstance(event, Finished) and preview:
                    return preview, event
        raise RuntimeError("the run ended without a student")


def loss_map(run: dict[str, Any]) -> Any:
    """The curve of a run's snapshot that tells most, as ComfyUI's LOSS_MAP."""
    losses = run["history"]["losses"]
    found = [value for value in losses.get(next((n for n in CURVES if n in losses), ""), ()) if value is not None]
    if len(set(found)) < 2:  # Plot Loss Graph divides by what lies between them
        return page.blocked("the run has no two losses to draw a curve through")
    return {"loss": found}


_saved: dict[tuple[str, str], tuple[Path | None, int]] = {}  # by name and save_as: the file, how often one had gone


class SaveStudent(io.ComfyNode):
    """Puts a student into ComfyUI's model folders."""

    LORA, MERGED = "the student (LoRA)", "a whole checkpoint"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["save lora", "export", "merge"],
            node_id="TurboDistillSaveStudent",
            display_name="Save Student",
            category=CATEGORY,
            description="Puts a student where ComfyUI and other programs find it: a LoRA into models/loras, or the "
            "model with it merged in into models/checkpoints. It says of itself how it is sampled.",
            inputs=[
                STUDENT.Input("student", tooltip="From Distill."),
                io.String.Input("name", default="my-turbo", tooltip="The file's name; / makes subfolders."),
                io.Combo.Input(
                    "save_as",
                    options=[cls.LORA, cls.MERGED],
                    tooltip="A LoRA is small and works on the base model; a whole checkpoint works by itself.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="For a whole checkpoint."),
                io.Vae.Input("vae", optional=True, tooltip="For a whole checkpoint."),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="Where it was saved.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, name: str = "", save_as: str = "", **_):
        """Changes when the file that was saved has gone, so that Run saves it again."""
        path, gone = _saved.get((name, save_as), (None, 0))
        if path and not path.exists():
            gone += 1
            keep(_saved, (name, save_as), (None, gone))
        return gone

    @classmethod
    def execute(cls, student: Trained, name: str, save_as: str, clip=None, vae=None) -> io.NodeOutput:
        if save_as == cls.LORA:
            folder = "loras" if student.card.kind == "lora" else "diffusion_models"
            path, listed = page.save_path(folder, name)
            write_whole(path, cls._read(student.path))
        else:
            folder = "checkpoints"
            path, listed = page.save_path(folder, name)
            save.save_merged(path, student.model, clip, vae, student.card)
        page.refresh(folder)
        keep(_saved, (name, save_as), (path, _saved.get((name, save_as), (None, 0))[1]))
        card = read_card(path)
        return io.NodeOutput(f"{folder}/{listed}", ui=ui.PreviewText(f"saved {path}\n{card.in_words()}"))

    @staticmethod
    def _read(path: Path) -> bytes:
        """The student's file, which Distill may have written long ago; raises DataError if it is gone."""
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(
                f"the student's file {path} cannot be read ({error.strerror}), its folder was deleted or moved: put it "
                "back, or let Distill run again under another name"
            ) from None
