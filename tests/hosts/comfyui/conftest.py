"""ComfyUIs of the tests' own: a server with this clone in its custom_nodes, and files for it to load."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from turbodistill.core.student import Student

HERE = Path(__file__).parent
CLONE = HERE.parents[2]
PROMPT = "a red fox, flat"


def module(name):
    """A module beside this one, by its path: tests are no package, and nothing is put on sys.path."""
    full = f"turbodistill_comfyui_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, HERE / f"{name}.py")
        sys.modules[full] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


def pytest_generate_tests(metafunc):
    """Each test is for each ComfyUI that is here; which run unasked, the marks `share` and `newest` say."""
    if "installation" not in metafunc.fixturenames:
        return
    try:
        here = module("client").installations()
    except FileNotFoundError as error:
        here = [error]
    names = [getattr(each, "version", "ComfyUI") for each in here]
    metafunc.parametrize("installation", here, ids=names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def installation(request):
    """ComfyUI's folder and its Python."""
    if isinstance(request.param, FileNotFoundError):
        pytest.skip(str(request.param))
    return request.param.folder, request.param.python


@pytest.fixture(scope="session")
def comfyui(installation, tmp_path_factory):
    """The server: client.ComfyUI."""
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "turbodistill").symlink_to(CLONE, target_is_directory=True)
    for name in ("random_conditioning.py", "faults.py", "narrow.py", "families.py"):
        (base / "custom_nodes" / name).symlink_to(HERE / name)
    for folder in ("input", "output", "user", "models/checkpoints", "models/loras"):
        (base / folder).mkdir(parents=True)
    with module("client").serve(*installation, base) as server:
        yield server
    shutil.rmtree(base / "models")  # pytest keeps its last folders; the log is enough


@pytest.fixture(scope="session")
def serve(installation):
    """A folder, and further flags -> a context with a server of a test's own over it, with this clone."""

    def start(base, *flags):
        if not (base / "custom_nodes").exists():
            (base / "custom_nodes").mkdir(parents=True)
            (base / "custom_nodes" / "turbodistill").symlink_to(CLONE, target_is_directory=True)
        return module("client").serve(*installation, base, flags)

    return start


@pytest.fixture(scope="session")
def cancelled():
    """The exception of a prompt that was cancelled."""
    return module("client").Cancelled


@pytest.fixture(scope="session")
def node_error():
    """The exception of a prompt that a node refused."""
    return module("client").NodeError


@pytest.fixture
def graph():
    return module("client").Graph()


@pytest.fixture(scope="session")
def new_graph():
    """Makes further graphs."""
    return module("client").Graph


@pytest.fixture(scope="session")
def all_settings():
    """The settings that other nodes have, and changes -> what the page sends for Advanced Settings: every other one."""
    from turbodistill.trainer.config import Config

    return lambda others, changes: {k: v for k, v in Config().to_dict().items() if k not in others} | changes


@pytest.fixture(scope="session")
def other_vae(comfyui):
    """The file of an autoencoder with sixteen channels, as newer models have; ComfyUI fills what it lacks."""
    folder = comfyui.base / "models" / "vae"
    folder.mkdir(exist_ok=True)
    save_file({"decoder.conv_in.weight": torch.zeros(512, 16, 3, 3)}, folder / "sixteen.safetensors")
    return "sixteen.safetensors"


@pytest.fixture(scope="session")
def full():
    """The module `full_size.py` of the exports' tests."""
    file = HERE.parents[1] / "export" / "full_size.py"
    spec = importlib.util.spec_from_file_location("turbodistill_full_size", file)
    sys.modules[spec.name] = made = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="session")
def script(installation, tmp_path_factory):
    """A script beside this file and checkpoints' short names -> what ComfyUI's own Python, without a server, tells."""
    folder, python = installation
    place = tmp_path_factory.mktemp("script")

    def run(name, *checkpoints):
        files = [module("checkpoints").write_bare(checkpoint, place) for checkpoint in checkpoints]
        ran = subprocess.run(
            [python, *map(str, (HERE / f"{name}.py", folder, CLONE, *files))], capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        return json.loads(ran.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def checkpoints(comfyui):
    """Synthetic checkpoints on the server, by short names: checkpoints.Checkpoint."""
    return module("checkpoints").write(comfyui.base / "models")


class Parts(NamedTuple):
    """What a graph samples with: links to outputs of its nodes."""

    model: object
    positive: object
    latent: object


@pytest.fixture
def synthetic(graph, checkpoints):
    """A checkpoint's short name -> its model, a random prompt and an empty latent of 64 x 64, in the graph."""

    def load(name, file=None, seed=0, batch=1):
        checkpoint = checkpoints[name]
        loaded = graph.add("CheckpointLoaderSimple", ckpt_name=file or checkpoint.file)
        positive = graph.add("TestsRandomConditioning", seed=seed, width=checkpoint.width, pooled=checkpoint.pooled)
        empty = "EmptySD3LatentImage" if name == "sd3" else "EmptyLatentImage"
        return Parts(loaded[0], positive[0], graph.add(empty, width=64, height=64, batch_size=batch)[0])

    return load


@pytest.fixture(scope="session")
def condition(checkpoints):
    """A checkpoint's short name -> the same random prompt (1 row) for its denoiser here."""
    from turbodistill.core.denoiser import Cond

    def draw(name, seed=0):
        checkpoint = checkpoints[name]
        drawn = module("random_conditioning").RandomConditioning().draw(seed, checkpoint.width, checkpoint.pooled)
        ((states, told),) = drawn[0]
        if not name.startswith("sdxl"):
            return Cond(states)
        sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])  # as made, cropped at, wanted
        return Cond(states, told["pooled_output"], {"time_ids": sizes})

    return draw


class Demo(NamedTuple):
    """The embedded model in a graph: `model` is its student, `text` the prompt."""

    model: object
    positive: object
    latent: object
    base: object
    clip: object
    vae: object
    text: str


@pytest.fixture
def demo(graph):
    """The embedded model and its shipped student in the graph, with one prompt and an empty latent of four."""
    loaded = graph.add("TurboDistillLoadDemoModel", batch_size=4)
    built_in = "the demo model's student (built in)"
    student = graph.add("TurboDistillLoadStudent", model=loaded, student=built_in, strength=1.0)
    positive = graph.add("CLIPTextEncode", clip=loaded[1], text=PROMPT)
    return Demo(student[0], positive[0], loaded[3], loaded[0], loaded[1], loaded[2], PROMPT)


@pytest.fixture
def trained(toys):
    """A denoiser -> a student of it that has learnt something; its hooks are gone when the test ends."""
    made = []

    def train(denoiser, rank=4, **settings):
        student = Student(denoiser, rank, **settings)
        made.append(student)
        if student.lora:
            toys.nudge(student.lora)
        return student

    yield train
    for student in made:
        student.release()


@pytest.fixture(scope="session")
def noise():
    """Seed and shape -> the noise that ComfyUI draws."""

    def draw(seed, *shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def gap():
    """The largest difference of two tensors, in standard deviations of the second."""
    return lambda found, expected: float((found - expected).abs().max() / expected.std())


@pytest.fixture(scope="session")
def saved(comfyui, checkpoints):
    """A checkpoint's short name and a student of it -> the student's choice in Load Student."""
    makers = module("checkpoints")

    def save(name, student=None, file="student.safetensors", **card):
        folder = "checkpoints" if card.get("kind") == "full" else "loras"
        path = comfyui.base / "models" / folder / file
        checkpoint = checkpoints[name]
        if student is None:
            makers.write_sd3_student(path, checkpoint)
        else:
            makers.write_student(path, student, makers.card_of(checkpoint, **card))
        return f"{folder}/{file}"

    return save


@pytest.fixture(scope="session")
def whole(comfyui, checkpoints):
    """The file of a Stable Diffusion 1 with its text encoder and autoencoder."""
    return module("checkpoints").write_whole(checkpoints["sd15"], comfyui.base / "models")


@pytest.fixture
def distilling(comfyui, graph):
    """Adds distillations of the demo model to a graph: distilling.Distilling."""
    return module("distilling").Distilling(comfyui, graph)


@pytest.fixture
def teacher(comfyui, new_graph):
    """Hash of the cached demo model, and a picture that it makes in four steps."""

    def look(moment):
        graph = new_graph()
        demo = graph.add("TurboDistillLoadDemoModel", batch_size=2)
        told = comfyui.text(graph, graph.add("TestsHash", model=demo, moment=moment)[0])
        positive = graph.add("CLIPTextEncode", clip=demo[1], text="a red fox, animal, in flat noto style")
        settings = {"steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        inputs = {"model": demo, "positive": positive, "negative": positive, "latent_image": demo[3]}
        (latents,) = comfyui.latents(graph, graph.add("KSampler", **inputs, **settings, seed=moment % 1))
        return told, latents

    return look
