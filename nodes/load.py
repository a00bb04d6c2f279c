"""Nodes that give a MODEL which samples in one step: a student, a known family, the demo model."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..core.card import header, read_card, read_student
from ..core.families import FAMILIES, suspect
from .graph import file_names
from .host import embedded, patcher
from .schema import schema, within_bounds

CATEGORY = "TurboDistill"
BUILT_IN = "the demo model's student (built in)"


def student_files() -> list[str]:
    """The files that may be students, as `folder/name`."""
    return [BUILT_IN] + [f"{folder}/{name}" for folder in patcher.FOLDERS for name in patcher.files(folder)]


def student_path(choice: str) -> Path:
    """Raises FileNotFoundError if the file has gone since the list was made."""
    if choice == BUILT_IN:
        return embedded.STUDENT
    folder, _, name = choice.partition("/")
    path = patcher.file_path(folder, name) if folder in patcher.FOLDERS else None
    if path is None:
        raise FileNotFoundError(
            f"student {choice:.200} is not in ComfyUI's models: put it there, refresh the page (R) and choose it"
        )
    return Path(path)


class LoadStudent(io.ComfyNode):
    """Loads a student onto a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["turbo lora", "distilled lora", "add", "ladd", "one step lora"],
            node_id="TurboDistillLoadStudent",
            display_name="Load Student",
            category=CATEGORY,
            description="Makes a model sample in one step with a student that TurboDistill trained from it. "
            "The file itself says how it is sampled: no timestep or prediction type needs to be set.",
            inputs=[
                io.Model.Input("model", tooltip="The base model that the student was distilled from."),
                io.Combo.Input(
                    "student",
                    options=student_files(),
                    tooltip="A LoRA in models/loras, or a full student in checkpoints or diffusion_models.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="1 is the student as it was trained; less leans back towards the base model.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="For One-Step Sample, or One-Step Scheduler and Sampler, at cfg 1."),
                io.String.Output("card", display_name="card", tooltip="What the student says of itself."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, student: str, **_):
        path = student_path(student)
        return f"{path} {path.stat().st_mtime_ns}"

    @classmethod
    def validate_inputs(cls, student: str | None) -> bool | str:
        try:
            if student is not None:  # else another node will give it
                student_path(student)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    @within_bounds
    def execute(cls, model, student: str, strength: float) -> io.NodeOutput:
        path = student_path(student)
        patcher.check_student(model, header(path)[1], read_card(path), strength, path.name)  # before all of it is read
        tensors, card = read_student(path)
        patched, warning = patcher.with_student(model, tensors, card, strength, path.name)
        return io.NodeOutput(patched, "\n".join(filter(None, (warning, card.in_words()))))


class DetectOneStep(io.ComfyNode):
    """Sets a known one-step model up for its own sampling."""

    AUTOMATIC = "recognise by its files"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["sdxl turbo", "lightning", "hyper sd", "dmd2", "lcm", "nitrofusion", "distilled model"],
            node_id="TurboDistillDetectOneStep",
            display_name="Detect One-Step Model",
            category=CATEGORY,
            description="For one-step and few-step models made elsewhere (Turbo, Lightning, Hyper-SD, DMD2, LCM, "
            "TCD, PCM, NitroFusion, schnell, klein and others): finds out the family from the model's architecture and "
            "the names and metadata of its files, and sets prediction type and timesteps accordingly.",
            inputs=[
                io.Model.Input("model", tooltip="A distilled checkpoint, or a model with a distillation LoRA."),
                io.Combo.Input(
                    "family",
                    options=[cls.AUTOMATIC, *FAMILIES],
                    tooltip="Choose it yourself if the files do not tell.",
                ),
                io.Int.Input(
                    "made_for_steps",
                    default=0,
                    min=0,
                    max=8,
                    tooltip="Steps it was made for, where the files do not tell; 0 is the family's own.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL"),
                io.String.Output("found", display_name="found", tooltip="The family and how it is sampled."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    @within_bounds
    def execute(cls, model, family: str, made_for_steps: int) -> io.NodeOutput:
        names = file_names(cls.hidden.prompt or {}, cls.hidden.unique_id)
        if family == cls.AUTOMATIC:
            found = patcher.sampling_by_files(names, model)
            if found is None:
                merge = next(filter(suspect, names), "")
                raise ValueError(
                    f"no one-step family is recognised in {', '.join(names) or 'this graph'}: choose the family"
                    + f", or sample as the page of {merge} says, which may be a merge" * bool(merge)
                )
            if made_for_steps and found.name in FAMILIES:
                found = FAMILIES[found.name].for_steps(made_for_steps)
        elif family not in FAMILIES:
            raise ValueError(f"family is {family!r:.100}: use one of {', '.join((cls.AUTOMATIC, *FAMILIES))}")
        else:
            found = FAMILIES[family].for_steps(made_for_steps or None)
        return io.NodeOutput(patcher.with_sampling(model, found), found.in_words())


class LoadDemoModel(io.ComfyNode):
    """Loads the embedded model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            search_aliases=["emoji", "example model", "demo checkpoint"],
            node_id="TurboDistillLoadDemoModel",
            display_name="Load Demo Model",
            category=CATEGORY,
            description="The small model that comes with TurboDistill: emoji of 64 x 64 in three styles. "
            "Runs on any machine in seconds, to try one-step sampling and distillation.",
            inputs=[io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures in the empty latent.")],
            outputs=[
                io.Model.Output("MODEL"),
                io.Clip.Output("CLIP"),
                io.Vae.Output("VAE"),
                io.Latent.Output("LATENT", tooltip="Empty, of the size that the model was made for."),
            ],
        )

    @classmethod
    @within_bounds
    def execute(cls, batch_size: int) -> io.NodeOutput:
        return io.NodeOutput(*embedded.load(), embedded.empty_latent(batch_size))
