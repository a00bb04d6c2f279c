"""A real AUTOMATIC1111 or Forge as the tests see it: its process, and its API in a few calls."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

START, ANSWER = 240, 120  # seconds that the server and an answer may take
FLAGS = (
    "--skip-prepare-environment", "--skip-torch-cuda-test", "--api", "--skip-version-check", "--no-hashing",
)  # fmt: skip
OLD_FLAGS = ("--no-download-sd-model", "--do-not-download-clip", "--disable-nan-check")  # Neo knows them no more
IN_FULL = ("--no-half", "--precision", "full")
DEFAULTS = {
    "prompt": "a fox", "seed": 1, "width": 64, "height": 64, "steps": 1, "cfg_scale": 1, "sampler_name": "ADD 1-step",
}  # fmt: skip
# The API of Forge and Neo has no defaults for these of its hires fix.
FORGE_HIRES = {"hr_additional_modules": ["Use same choices"], "hr_cfg": 1}


@dataclass(frozen=True)
class Kind:
    """One of the hosts: how its folder and Python are found, and what it is started with."""

    name: str
    variable: str  # of the environment: NAME_PATH is its folder, NAME_PYTHON its Python, NAME_FLAGS more flags
    folder: str  # in the user's home
    flags: tuple[str, ...]
    backend: bool = False  # its networks are Forge's own, of the package `backend`
    kin: bool = False  # of Forge
    upscaler: str = "Latent"  # of the hires fix


KINDS = {
    kind.name: kind
    for kind in (
        Kind("a1111", "A1111", "stable-diffusion-webui", (*OLD_FLAGS, *IN_FULL, "--use-cpu", "all")),
        Kind(
            "forge",
            "FORGE",
            "stable-diffusion-webui-forge",
            (*OLD_FLAGS, *IN_FULL, "--always-cpu", "--all-in-fp32", "--attention-pytorch"),
            backend=True,
        ),
        Kind(
            "reforge",
            "REFORGE",
            "stable-diffusion-webui-reForge",
            (*OLD_FLAGS, "--always-cpu", "--all-in-fp32"),
            kin=True,
        ),
        Kind(
            "neo",
            "NEO",
            "sd-webui-forge-neo",
            ("--cpu", "--force-fp32"),
            backend=True,
            kin=True,
            upscaler="None",  # it ships no other, and none for latents
        ),
    )
}


def installation(kind: Kind) -> tuple[Path, Path]:
    """The host's folder and Python; raises FileNotFoundError, saying where it was looked for."""
    folder = Path(_told(kind, "PATH", Path.home() / kind.folder)).expanduser()
    if not (folder / "launch.py").is_file():
        raise FileNotFoundError(f"no WebUI in {folder}: set {kind.variable}_PATH to its folder")
    own = next((p for name in ("venv", ".venv") if (p := folder / name / "bin" / "python").exists()), folder / "venv")
    python = Path(_told(kind, "PYTHON", own)).expanduser()
    if not python.is_file():
        raise FileNotFoundError(f"{python} is missing: set {kind.variable}_PYTHON to the WebUI's Python")
    return folder, python


def _told(kind: Kind, what: str, otherwise: Path | str) -> Path | str:
    """What the environment says; Neo's was FORGE_NEO_PATH."""
    older = os.environ.get(f"FORGE_{kind.variable}_{what}", otherwise)
    return os.environ.get(f"{kind.variable}_{what}", older)


class Refused(Exception):
    """The host answered with an error: its status and words."""

    def __init__(self, status: int, words: str):
        super().__init__(f"{status}: {words}")
        self.status = status


@dataclass(frozen=True)
class Made:
    """Pictures (H, W, 3) as floats 0 to 255, what the host wrote about each, and what we said of them."""

    pictures: list[np.ndarray]
    infotexts: list[str]
    remarks: list[str]

    @property
    def picture(self) -> np.ndarray:
        return self.pictures[0]

    @property
    def infotext(self) -> str:
        return self.infotexts[0]


@dataclass
class WebUI:
    """A running server; `data` holds its models, extensions and outputs."""

    kind: Kind
    url: str
    data: Path
    log: Path
    process: subprocess.Popen

    def call(self, path: str, told: Any = None, headers: Mapping[str, str] | None = None, patience: float = 0) -> Any:
        """GET, or POST with JSON, and the JSON of the answer; raises Refused."""
        body = None if told is None else json.dumps(told).encode()
        given = {"Content-Type": "application/json"} | dict(headers or {})
        request = urllib.request.Request(f"{self.url}/{path}", body, given)
        try:
            with urllib.request.urlopen(request, timeout=patience or ANSWER) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode()) from None

    def status(self, path: str, told: Any, headers: Mapping[str, str]) -> int:
        """The status of the answer to a POST."""
        try:
            self.call(path, told, headers)
        except Refused as refused:
            return refused.status
        return 200

    def txt2img(self, **given: Any) -> Made:
        return self._make("txt2img", given)

    def img2img(self, picture: np.ndarray, **given: Any) -> Made:
        return self._make("img2img", {"init_images": [encoded(picture)], **given})

    def from_infotext(self, infotext: str) -> Made:
        """What the host makes when the infotext is pasted into an empty page."""
        # The page knows "Use same sampler", the API does not; Forge's stumbles over lists.
        given = {"infotext": infotext, "hr_sampler_name": None, "hr_scheduler": None, "styles": []}
        if self.kind.backend:
            given["hr_additional_modules"] = FORGE_HIRES["hr_additional_modules"]
        return self._made("txt2img", given)

    def _make(self, where: str, given: dict[str, Any]) -> Made:
        hires = {"hr_upscaler": self.kind.upscaler} | (FORGE_HIRES if self.kind.backend else {})
        hires = hires if given.get("enable_hr") else {}
        return self._made(where, DEFAULTS | hires | given)

    def _made(self, where: str, told: dict[str, Any]) -> Made:
        answer = self.call(f"sdapi/v1/{where}", {"do_not_save_grid": True, **told})
        about = json.loads(answer["info"])
        kept = slice(about["index_of_first_image"], None)
        return Made(
            [decoded(picture) for picture in answer["images"][kept]],
            about["infotexts"][kept],
            about["extra_generation_params"].get("ADD remarks", []),
        )

    def samplers(self) -> list[str]:
        return [sampler["name"] for sampler in self.call("sdapi/v1/samplers")]

    def set(self, **options: Any) -> None:
        """Change settings of the host."""
        self.call("sdapi/v1/options", options)

    def refresh_loras(self) -> None:
        self.call("sdapi/v1/refresh-loras", {})


def encoded(picture: np.ndarray) -> str:
    """A picture (H, W) or (H, W, 3) as the API takes it."""
    file = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), dtype=np.float32)


@contextmanager
def serve(kind: Kind, folder: Path, python: Path, data: Path) -> Iterator[WebUI]:
    """A server over a folder of data, as long as the context lives; raises RuntimeError if it does not come up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = data / "server.log"
    # Forge serves its own style and scripts only from where the data are, unless told.
    place = ["--port", str(port), "--data-dir", str(data), "--gradio-allowed-path", str(folder)]
    command = [str(python), "-u", "launch.py", *FLAGS, *kind.flags, *str(_told(kind, "FLAGS", "")).split(), *place]
    quiet = {
        "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False",
        "OMP_NUM_THREADS": "1", "SD_WEBUI_RESTARTING": "1",  # opens no browser
    }  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | quiet, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    webui = WebUI(kind, f"http://127.0.0.1:{port}", data, log, process)
    try:
        wait_until_up(webui)
        yield webui
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_up(webui: WebUI) -> None:
    """Returns when the API answers and its last routes are there; raises RuntimeError with the end of the log."""
    ends = time.monotonic() + START
    while time.monotonic() < ends:
        if webui.process.poll() is not None:
            break
        try:
            # Before that its routes are not all there, and asking for one can keep it from making them.
            if "Startup time" in webui.log.read_text() and webui.samplers():
                return
        except (OSError, Refused, ValueError):
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server did not come up:\n{webui.log.read_text()[-3000:]}")
