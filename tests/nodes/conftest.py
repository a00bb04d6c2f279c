"""Our nodes over stand-ins of ComfyUI, toy denoisers as MODELs, and student files of them."""

import importlib.util
from pathlib import Path

import pytest
import torch
from turbodistill.core.card import StudentCard, fingerprint
from turbodistill.core.student import Student, student_bytes


@pytest.fixture(scope="session")
def comfyui():
    """The module `stand_ins.py`, by its path."""
    spec = importlib.util.spec_from_file_location("turbodistill_stand_ins", Path(__file__).with_name("stand_ins.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nodes(comfyui):
    """Our modules: nodes.host, nodes.load and so on; ComfyUI's stand-ins are importable as long as this lives."""
    with comfyui.installed() as modules:
        yield modules


@pytest.fixture
def model_of(comfyui):
    """A toy denoiser -> the MODEL that ComfyUI would make of it."""

    def build(toy, **settings):
        schedule = toy.schedule
        if toy.prediction == "flow":
            space = comfyui.model_sampling(comfyui.CONST, comfyui.ModelSamplingDiscreteFlow, schedule.shift)
            # A flow model is told sigma here, the toy its unshifted timestep.
            settings.setdefault("process_timestep", lambda t: schedule.timestep(t / 1000) / 1000)
        else:
            reading = {"eps": comfyui.EPS, "v": comfyui.V_PREDICTION, "x0": comfyui.X0}[toy.prediction]
            space = comfyui.model_sampling(reading, comfyui.ModelSamplingDiscrete)
            settings.setdefault("process_timestep", lambda t: t / 1000)
        return comfyui.ModelPatcher(comfyui.BaseModel(toy.backbone, space, **settings))

    return build


@pytest.fixture
def student_of(toys):
    """A toy teacher -> a student of it that has learnt something."""

    def build(teacher, rank=4, **settings):
        student = Student(teacher, rank, **settings)
        if student.lora:
            toys.nudge(student.lora)
        else:
            with torch.no_grad():
                for weight in student.backbone.parameters():
                    weight.add_(torch.randn_like(weight), alpha=0.1)
        return student

    return build


def card_of(student: Student) -> StudentCard:
    lora = student.lora
    return StudentCard(
        kind="lora" if lora else "full",
        base_model="toy",
        base_hash=fingerprint(student.teacher.backbone),
        architecture="toy",
        prediction=student.reading,
        base_prediction=student.teacher.prediction,
        timesteps=(student.start,),
        guidance=4.0,
        resolution=(8, 8),
        rank=lora.rank if lora else 0,
        alpha=lora.alpha if lora else 0.0,
    )


@pytest.fixture
def saved(tmp_path):
    """A student -> the path of its file, as the trainer writes it but in full precision."""

    def save(student, name="student.safetensors"):
        path = tmp_path / name
        path.write_bytes(student_bytes(student, card_of(student), torch.float32))
        return path

    return save
