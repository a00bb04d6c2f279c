"""Shared by the tests of the tab, the API and the job: a toy model as a backend, nothing left running."""

import base64
import io
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image


def png(seed: int) -> bytes:
    noise = numpy.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype="uint8")
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "png")
    return buffer.getvalue()


def pixels(url: str) -> torch.Tensor:
    """A data URL's picture (3, H, W), bytes."""
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as file:
        return torch.from_numpy(numpy.array(file.convert("RGB"))).movedim(-1, 0)


@pytest.fixture(scope="session")
def toy():
    """The toy backend's module, and helpers for pictures: tests are no package, and nothing can import them."""
    import importlib.util

    path = Path(__file__).with_name("toy_backend.py")
    spec = importlib.util.spec_from_file_location("turbodistill_toy_backend", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return SimpleNamespace(**vars(module), png=png, pixels=pixels)


@pytest.fixture
def backend(toy, tmp_path, monkeypatch):
    """A toy model as a backend; whatever runs on it ends with the test."""
    from turbodistill.page import job

    monkeypatch.setattr(job, "_current", None)
    made = toy.ToyBackend(tmp_path)
    yield made
    if left := job.running():
        left.cancel()
        made.gate.set()
        left.wait(60)


@pytest.fixture(scope="session")
def webui():
    """The stand-ins of the hosts' samplers and scripts, by their path."""
    import importlib.util

    path = Path(__file__).parent / "stand_ins" / "webui.py"
    spec = importlib.util.spec_from_file_location("turbodistill_webui_stand_ins", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
