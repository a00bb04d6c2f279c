"""An AUTOMATIC1111, a Forge, a reForge and a Forge Neo of the tests' own, with this clone in their extensions."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
CLONE = HERE.parents[2]


def module(name):
    """A module beside this one, by its path: tests are no package, and nothing is put on sys.path."""
    full = f"turbodistill_webui_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, HERE / f"{name}.py")
        sys.modules[full] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


KINDS = module("client").KINDS


@pytest.fixture(scope="session", params=list(KINDS))
def kind(request):
    """Each host in turn."""
    return KINDS[request.param]


@pytest.fixture(scope="session")
def installation(kind):
    """The host's folder and its Python."""
    try:
        return module("client").installation(kind)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def bare(kind, installation, tmp_path_factory):
    """The server before it has a checkpoint, and what it answered then: a distillation's refusal, the samplers."""
    client = module("client")
    base = tmp_path_factory.mktemp(kind.name)
    for folder in ("extensions", "models/Stable-diffusion", "models/Lora"):
        (base / folder).mkdir(parents=True)
    (base / "extensions" / "turbodistill").symlink_to(CLONE, target_is_directory=True)
    (base / "extensions" / "inspector").symlink_to(HERE / "inspector", target_is_directory=True)
    with client.serve(kind, *installation, base) as server:
        try:
            answer = server.call("turbodistill/v1/distill", {"name": "nothing", "prompts": "a fox"})
        except client.Refused as error:
            answer = str(error)
        yield server, answer, server.samplers()
    shutil.rmtree(base / "models")  # pytest keeps its last folders; the log is enough


@pytest.fixture(scope="session")
def webui(bare, kind):
    """The server with a checkpoint: client.WebUI."""
    server, *_ = bare
    made = module("checkpoint")
    file, shape = ("tiny.safetensors", made.A1111) if kind.name == "a1111" else ("small.ckpt", made.FORGE)
    made.write(server.data / "models" / "Stable-diffusion" / file, shape)
    server.call("sdapi/v1/refresh-checkpoints", {})
    (found,) = server.call("sdapi/v1/sd-models")
    server.set(sd_model_checkpoint=found["title"])
    if kind.kin:
        server.set(live_previews_enable=False)  # reForge would fetch a model for them
    return server


@pytest.fixture(scope="session")
def refused():
    """The exception of a request that the host answered with an error."""
    return module("client").Refused


@pytest.fixture(scope="session")
def encoded():
    """A picture (H, W) or (H, W, 3) as the API takes it."""
    return module("client").encoded


@pytest.fixture(scope="session")
def drawing():
    """A picture (64, 64, 3) for image to image."""
    y, x = np.mgrid[:64, :64]
    return np.stack([4 * y, 4 * x, 255 - 2 * y], -1).astype(np.float32)


@pytest.fixture(scope="session")
def gap():
    """The largest difference of two pictures, of 255."""
    return lambda one, other: float(np.abs(one - other).max())


@pytest.fixture(scope="session")
def distance():
    """The mean difference of two pictures, of 255."""
    return lambda one, other: float(np.abs(one - other).mean())


@pytest.fixture(scope="module")
def trainer(webui, refused):
    """Trainings in the host: trainer.Trainer."""
    made = module("trainer").Trainer(webui, refused)
    webui.txt2img(**made.PLAIN)  # Forge loads its model with the first picture
    return made


@pytest.fixture(autouse=True)
def alone(request):
    """Whatever runs when a test ends is cancelled."""
    yield
    if "trainer" in request.fixturenames:
        trainer = request.getfixturevalue("trainer")
        try:
            trainer.ask("cancel")
        except trainer.refused:
            return
        trainer.ended()
