"""A toy host, as the trainer's tests have it."""

import importlib.util
import sys
from pathlib import Path

import pytest

NAME = "turbodistill_trainer_kit"


@pytest.fixture(scope="session")
def kit():
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, Path(__file__).parents[1] / "trainer" / "conftest.py")
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]
