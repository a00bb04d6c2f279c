"""Shared by the tests of the tab, the API and the job: a toy model as a backend, nothing left running."""

import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
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


FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-component-update",
    "--disable-background-networking",
)


@pytest.fixture(scope="session")
def chromium():
    """Where the browser is; asked for before a server is started for nothing."""
    pytest.importorskip("playwright", reason="needs playwright: pip install playwright")
    path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if not Path(path).is_file():
        pytest.skip(f"needs a Chromium: there is none at {path}; say in CHROMIUM where it is")
    return path


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    # Not longer than a module: its event loop stands in the way of asyncio.run.
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def port():
    """A number that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def served(chromium, port, tmp_path_factory):
    """`turbodistill ui`, running: where it is, its folder, its process."""
    folder = tmp_path_factory.mktemp("ui")
    command = [sys.executable, "-m", "turbodistill.app.cli", "ui", "--port", str(port), "--out", str(folder)]
    log = (folder / "log.txt").open("w+")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    url, begun = f"http://127.0.0.1:{port}", time.monotonic()
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            break
        except (urllib.error.URLError, TimeoutError):
            assert process.poll() is None and time.monotonic() - begun < 90, (folder / "log.txt").read_text()
            time.sleep(0.2)
    yield url, folder, process
    process.terminate()
    process.wait(30)
    log.close()
