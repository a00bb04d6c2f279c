"""Shared by all tests: the toys, one thread, one seed."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

# What tests start has one thread, too: on two processes more of them would wait for each other in turn.
os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """On several processes: a host's tests run in one, so that its server starts once, and begin first, being long."""
    for item in items:
        room, *inside = item.path.relative_to(HERE).parts
        host = (*inside[:1], getattr(item, "callspec", None) and item.callspec.params.get("kind"))
        item.add_marker(pytest.mark.xdist_group(str(host if room == "hosts" else item.path)))
    items.sort(key=lambda item: HERE / "hosts" not in item.path.parents)


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
