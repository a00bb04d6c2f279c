"""A real ComfyUI as the tests see it: its process, and its API in a few calls."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor

START, RUN = 180, 120  # seconds that the server and a prompt may take
FLAGS = ("--cpu", "--listen", "127.0.0.1", "--disable-api-nodes", "--disable-auto-launch")


class NodeError(Exception):
    """What a node said when it refused its inputs or failed: `node` is its class, the message its words."""

    def __init__(self, node: str, message: str):
        super().__init__(f"{node}: {message}")
        self.node = node


class Cancelled(Exception):
    """The prompt was cancelled."""


@dataclass(frozen=True)
class Node:
    """A node in a graph; itself as another's input it means its first output, `node[1]` the second."""

    name: str

    def __getitem__(self, output: int) -> list:
        return [self.name, output]


@dataclass
class Graph:
    """A prompt in the making."""

    prompt: dict[str, dict] = field(default_factory=dict)

    def add(self, kind: str, **inputs: Any) -> Node:
        """A new node of a class, with values and links as its inputs."""
        linked = {k: v[0] if isinstance(v, Node) else v for k, v in inputs.items()}
        name = str(len(self.prompt) + 1)
        self.prompt[name] = {"class_type": kind, "inputs": linked}
        return Node(name)

    def sample(self, model, positive, latent, seed: int = 0, steps: int = 1, denoise: float = 1.0) -> Node:
        """One-Step Sample."""
        return self.add(
            "TurboDistillSample",
            model=model,
            positive=positive,
            latent_image=latent,
            seed=seed,
            steps=steps,
            denoise=denoise,
        )

    def custom(self, model, positive, latent, sigmas, sampler, seed: int = 0) -> Node:
        """SamplerCustom at cfg 1."""
        return self.add(
            "SamplerCustom",
            model=model,
            add_noise=True,
            noise_seed=seed,
            cfg=1.0,
            positive=positive,
            negative=positive,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
        )


@dataclass(frozen=True)
class Run:
    """A prompt that ran: what its output nodes gave to the page, and the nodes that the cache answered."""

    outputs: dict[str, dict]
    cached: frozenset[str]


@dataclass(frozen=True)
class ComfyUI:
    """A running server; `base` holds its models, inputs and outputs."""

    url: str
    base: Path
    log: Path
    process: subprocess.Popen

    def get(self, path: str) -> bytes:
        """The body of a page; raises urllib.error.HTTPError."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=30) as answer:
            return answer.read()

    def post(self, path: str, told: dict | None = None) -> int:
        """Send JSON to a route; the answer's status."""
        body = json.dumps(told or {}).encode()
        request = urllib.request.Request(f"{self.url}/{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def run(self, graph: Graph) -> Run:
        """Run a prompt to its end; raises NodeError if a node of it was refused or failed, Cancelled if it was."""
        return self.wait(self.queue(graph))

    def queue(self, graph: Graph) -> str:
        """Begin to run a prompt, and give its id; raises NodeError if a node of it was refused."""
        body = json.dumps({"prompt": graph.prompt, "prompt_id": str(uuid.uuid4())}).encode()
        request = urllib.request.Request(f"{self.url}/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                told = json.load(answer)
        except urllib.error.HTTPError as error:
            told = json.load(error)
        for refused in told["node_errors"].values():
            words = "; ".join(f"{e['message']}: {e['details']}" for e in refused["errors"])
            raise NodeError(refused["class_type"], words)
        if "error" in told:
            raise NodeError("prompt", str(told["error"]))
        return told["prompt_id"]

    def wait(self, prompt: str, seconds: float = RUN) -> Run:
        """A queued prompt's end, as `run` gives it."""
        ends = time.monotonic() + seconds
        while not (history := json.loads(self.get(f"history/{prompt}"))):
            if time.monotonic() > ends:
                raise TimeoutError(f"the prompt runs longer than {seconds} s")
            time.sleep(0.02)
        done = history[prompt]
        said = dict(done["status"]["messages"])
        if failed := said.get("execution_error"):
            raise NodeError(failed["node_type"], failed["exception_message"])
        if "execution_interrupted" in said:
            raise Cancelled(prompt)
        return Run(done["outputs"], frozenset(said["execution_cached"]["nodes"]))

    def clear(self) -> None:
        """Cancel what runs and what waits; raises TimeoutError if it does not end."""
        self.post("queue", {"clear": True})
        ends = time.monotonic() + RUN
        while json.loads(self.get("queue"))["queue_running"]:
            if time.monotonic() > ends:
                raise TimeoutError(f"what was cancelled runs on for {RUN} s")
            self.post("interrupt")
            time.sleep(0.1)

    def _view(self, place: dict) -> bytes:
        return self.get("view?" + urllib.parse.urlencode(place))

    def latents(self, graph: Graph, *outputs) -> list[Tensor]:
        """Run a graph and give the latents (B, C, H, W) of these outputs."""
        return self.latents_and_run(graph, *outputs)[0]

    def latents_and_run(self, graph: Graph, *outputs) -> tuple[list[Tensor], Run]:
        """As `latents`, and the run itself."""
        whole = Graph(dict(graph.prompt))
        savers = [whole.add("SaveLatent", samples=o, filename_prefix=uuid.uuid4().hex) for o in outputs]
        run = self.run(whole)
        bodies = [self._view(run.outputs[saver.name]["latents"][0]) for saver in savers]
        return [load(body)["latent_tensor"] for body in bodies], run

    def pictures(self, run: Run, node: Node) -> Tensor:
        """Pictures (B, H, W, 3) in [0, 1] that a node showed."""
        shown = [Image.open(io.BytesIO(self._view(place))) for place in run.outputs[node.name]["images"]]
        return torch.from_numpy(np.stack([np.asarray(picture) for picture in shown])) / 255

    def text(self, graph: Graph, output) -> str:
        """Run a graph and give one output as text."""
        whole = Graph(dict(graph.prompt))
        shown = whole.add("PreviewAny", source=output)
        return self.run(whole).outputs[shown.name]["text"][0]


@dataclass(frozen=True)
class Installation:
    """A ComfyUI: its folder and Python; and whether it is the newest of those that are here."""

    folder: Path
    python: str
    newest: bool = True

    @property
    def version(self) -> str:
        """As it says, "0.33.0"; its folder's name where it says none."""
        file = self.folder / "comfyui_version.py"
        told = re.search(r'__version__ = "([^"]+)"', file.read_text()) if file.is_file() else None
        return told[1] if told else self.folder.name


def installations() -> list[Installation]:
    """The ComfyUIs that are here, the oldest first: COMFYUI_PATHS, or else COMFYUI_PATH and COMFYUI_NEW_PATH.

    Raises FileNotFoundError, which says where one was looked for, if there is none, or not where it is said to be.
    """
    if paths := os.environ.get("COMFYUI_PATHS"):
        folders = missing = [Path(path).expanduser() for path in paths.split(os.pathsep)]
    else:
        home = Path.home() / "comfy"
        usual = {"COMFYUI_PATH": home / "ComfyUI", "COMFYUI_NEW_PATH": home / "ComfyUI-new"}
        folders = [Path(os.environ.get(variable, folder)).expanduser() for variable, folder in usual.items()]
        missing = [folder for variable, folder in zip(usual, folders, strict=True) if variable in os.environ]
    here = list(dict.fromkeys(folder.resolve() for folder in folders if (folder / "main.py").is_file()))
    missing = [folder for folder in missing if not (folder / "main.py").is_file()] or ([] if here else folders)
    if missing:
        raise FileNotFoundError(
            f"needs a ComfyUI: there is none in {missing[0]}; say in COMFYUI_PATHS where it is, several with "
            f"{os.pathsep!r} between them, the oldest first"
        )
    return [Installation(folder, _python(folder, folder == here[0]), folder == here[-1]) for folder in here]


def installation() -> tuple[Path, str]:
    """Folder and Python of the oldest; raises as `installations`."""
    found = installations()[0]
    return found.folder, found.python


def _python(folder: Path, first: bool) -> str:
    places = (folder / ".venv", folder / "venv", folder.parent / "venv")
    found = next((p / "bin" / "python" for p in places if (p / "bin" / "python").exists()), sys.executable)
    return str(os.environ.get("COMFYUI_PYTHON", found) if first else found)


@contextmanager
def serve(comfyui: Path, python: str, base: Path, flags: Sequence[str] = ()) -> Iterator[ComfyUI]:
    """A server of its own over the folder `base`, ended with the context; raises RuntimeError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = base / "comfyui.log"
    told = ("--base-directory", base, "--database-url", f"sqlite:///{base / 'comfyui.db'}", "--port", port)
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as lines:
        process = subprocess.Popen(
            [python, "main.py", *FLAGS, *os.environ.get("COMFYUI_FLAGS", "").split(), *flags, *map(str, told)],
            cwd=comfyui,
            env=os.environ | offline,
            stdout=lines,
            stderr=subprocess.STDOUT,
        )
    server = ComfyUI(f"http://127.0.0.1:{port}", base, log, process)
    try:
        _wait_until_up(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(server: ComfyUI, process: subprocess.Popen) -> None:
    ends = time.monotonic() + START
    while process.poll() is None and time.monotonic() < ends:
        try:
            server.get("system_stats")
            return
        except OSError:
            time.sleep(0.2)
    what = f"is not up after {START} s" if process.poll() is None else f"ended with status {process.returncode}"
    raise RuntimeError(f"ComfyUI {what}; its last lines:\n" + "\n".join(server.log.read_text().splitlines()[-20:]))
