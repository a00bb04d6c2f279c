"""Shared by all tests: the toys, one thread, one seed."""

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def toys():
    """The module `toys.py`, by its path: tests are no package, and nothing is put on sys.path."""
    spec = importlib.util.spec_from_file_location("turbodistill_toys", Path(__file__).with_name("toys.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def seeded():
    """The same draws whichever tests ran before; one thread, since toys are too small for more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
