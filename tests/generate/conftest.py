"""A toy host, as the trainer's tests have it."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from turbodistill.core.card import StudentCard
from turbodistill.core.families import of_card
from turbodistill.core.student import Student
from turbodistill.generate.recipe import FewStepModel
from turbodistill.generate.stream import Stream

NAME = "turbodistill_trainer_kit"


@pytest.fixture(scope="session")
def kit():
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, Path(__file__).parents[1] / "trainer" / "conftest.py")
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]


@pytest.fixture
def made(kit, toys):
    """A host, and a stream of a student on it that is trained for two steps."""
    host = kit.conv_host()
    torch.manual_seed(0)
    student = Student(host.denoiser, 4)
    toys.nudge(student.lora, 0.3)
    of = {"prediction": "eps", "base_prediction": "eps", "timesteps": (999, 499), "guidance": 3.0}
    card = StudentCard("lora", "toy", "", "", **of, resolution=host.resolution, rank=4)
    model = FewStepModel(student, replace(of_card(card), prediction="inherit"))
    with student.merged():
        yield host, student, Stream(host, model)
    student.release()
