"""Trainings of the same settings through each front end: command line, ComfyUI, `ui`, AUTOMATIC1111 and Forge.

All but the last two train the embedded model; those two have a small model of random weights, as in their tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CLONE = Path(__file__).parents[1]
# A training by its name and settings -> its history and its student.
Train = Callable[[str, dict[str, Any]], tuple[Path, Path]]
Images = Callable[[Path], Path]


@contextlib.contextmanager
def front(kind: str, base: Path, prompts: Sequence[str], images: Images | None = None) -> Iterator[Train]:
    """A front end by its name, ready to train in the folder `base`, where runs of an earlier time go on.

    `images` writes the pictures for trainings that see some into a new folder. Raises FileNotFoundError where a host
    is not there.
    """
    opened = {"cli": cli, "comfyui": comfyui, "ui": ui}.get(kind)
    base.mkdir(parents=True, exist_ok=True)
    with opened(base, prompts, images) if opened else webui(kind, base, prompts, images) as train:
        yield train


def folders(base: Path, extensions: str, *others: str) -> None:
    """The folders of a host's data, with this clone among its extensions."""
    for folder in (extensions, *others):
        (base / folder).mkdir(parents=True, exist_ok=True)
    if not (base / extensions / "turbodistill").exists():
        (base / extensions / "turbodistill").symlink_to(CLONE, target_is_directory=True)


def written(images: Images | None, folder: Path) -> Path:
    """The folder of pictures, written if it is asked for and not there."""
    return images(folder) if images and not folder.exists() else folder


def module(folder: str, name: str) -> Any:
    """A module of the host tests, by its path."""
    full = f"front_{folder}_{name}"
    if full not in sys.modules:
        path = CLONE / "tests" / "hosts" / folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec and spec.loader
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


def results(base: Path, name: str) -> tuple[Path, Path]:
    """A run's history, and its student wherever the host puts it."""
    students = [p for p in base.rglob("*.safetensors") if p.stem == name or p.match(f"{name}/student.safetensors")]
    return next(base.rglob(f"{name}/history.csv")), students[0]


@contextlib.contextmanager
def cli(base: Path, prompts: Sequence[str], images: Images | None) -> Iterator[Train]:
    from turbodistill.app.cli import main

    (base / "prompts.txt").write_text("\n".join(prompts))
    pictures = written(images, base / "pictures")

    def train(name: str, settings: dict[str, Any]) -> tuple[Path, Path]:
        out = base / name
        flags = ["distill", "--prompts", str(base / "prompts.txt"), "--out", str(out)]
        if settings.get("positives", "teacher") != "teacher":
            flags += ["--images", str(pictures)]
        for key, value in settings.items():
            flag = key.replace("_", "-")
            flags += [f"--{flag if value else 'no-' + flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        with contextlib.redirect_stdout(sys.stderr):
            assert main(flags) == 0
        return out / "history.csv", out / "student.safetensors"

    yield train


@contextlib.contextmanager
def comfyui(base: Path, prompts: Sequence[str], images: Images | None) -> Iterator[Train]:
    from turbodistill.trainer.config import Config
    from turbodistill.trainer.groups import ADVANCED, OF_DISTILL, OF_GUIDANCE, OF_PAIRS, OF_PROMPTS, OF_SIZES

    of_pairs = (*OF_PAIRS, *OF_PROMPTS, *OF_GUIDANCE, *OF_SIZES)
    client = module("comfyui", "client")
    folders(base, "custom_nodes", "input", "output", "user", "models/checkpoints", "models/loras")
    written(images, base / "input" / "pictures")
    with client.serve(*client.installation(), base) as server:

        def train(name: str, settings: dict[str, Any]) -> tuple[Path, Path]:
            given = Config().to_dict() | settings
            graph = client.Graph()
            demo = graph.add("TurboDistillLoadDemoModel", batch_size=1)
            parts = {"model": demo, "clip": demo[1], "vae": demo[2]}
            lines = graph.add("TurboDistillPrompts", source="the text below", text="\n".join(prompts), file="")
            own = {key: given[key] for key in of_pairs}
            pairs = graph.add("TurboDistillTeacherPairs", **parts, prompts=lines, width=64, height=64, at_once=8, **own)
            more = {"settings": graph.add("TurboDistillAdvancedSettings", **{key: given[key] for key in ADVANCED})}
            if settings.get("positives", "teacher") != "teacher":
                more["images"] = graph.add("TurboDistillImageFolder", folder="pictures")
            rest = {key: given[key] for key in OF_DISTILL}
            distilled = graph.add("TurboDistillDistill", **parts, pairs=pairs, name=name, **rest, **more)
            graph.add("PreviewAny", source=distilled[2])
            server.run(graph)
            return results(base, name)

        yield train


@contextlib.contextmanager
def ui(base: Path, prompts: Sequence[str], images: Images | None) -> Iterator[Train]:
    """The WebUI's tab and API as `turbodistill ui` serves them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "turbodistill.app.cli", "ui", "--port", str(port), "--out", str(base)]
    process = subprocess.Popen(command, stdout=sys.stderr)
    url = f"http://127.0.0.1:{port}/"

    def call(path: str, told: Any = None) -> Any:
        body = None if told is None else json.dumps(told).encode()
        request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    try:
        while True:
            try:
                call("turbodistill/v1/run")
                break
            except urllib.error.HTTPError:  # it answers: nothing has run yet
                break
            except urllib.error.URLError:
                if process.poll() is not None:
                    raise RuntimeError("`turbodistill ui` ended before it answered: what it said is above") from None
                time.sleep(0.2)
        yield _by_api(call, base, prompts, images)
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def webui(kind: str, base: Path, prompts: Sequence[str], images: Images | None) -> Iterator[Train]:
    client, made = module("webui", "client"), module("webui", "checkpoint")
    kinds = client.KINDS[kind]
    folders(base, "extensions", "models/Stable-diffusion", "models/Lora")
    file, shape = {"a1111": ("tiny.safetensors", made.A1111), "forge": ("small.ckpt", made.FORGE)}[kind]
    made.write(base / "models" / "Stable-diffusion" / file, shape)
    with client.serve(kinds, *client.installation(kinds), base) as server:
        server.txt2img(prompt="a fox", sampler_name="Euler", steps=2, seed=5)
        yield _by_api(server.call, base, prompts, images)


def _by_api(call: Callable[..., Any], base: Path, prompts: Sequence[str], images: Images | None) -> Train:
    """Trainings by the API that all pages of a WebUI's kind have."""
    pictures = written(images, base / "pictures")

    def train(name: str, settings: dict[str, Any]) -> tuple[Path, Path]:
        told = {"prompts": "\n".join(prompts), "width": 64, "height": 64, "name": name}
        if settings.get("positives", "teacher") != "teacher":
            told["images"] = str(pictures)
        call("turbodistill/v1/distill", told | {"settings": settings})
        while (run := call("turbodistill/v1/run?pictures=none"))["state"] == "working":
            time.sleep(0.2)
        assert run["state"] == "done", run["error"]
        return results(base, name)

    return train
