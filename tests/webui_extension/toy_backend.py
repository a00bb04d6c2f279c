"""A program with a toy model loaded, as the tab, the API and the job want it; no diffusers, no host."""

from __future__ import annotations

import importlib.util
import threading
from contextlib import contextmanager
from pathlib import Path

from turbodistill.core.card import fingerprint
from turbodistill.trainer.data.built_in import Suggestion, suggest


def module_at(path: Path, name: str):
    """A test module by its path: tests are no package, and nothing is put on sys.path."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit = module_at(Path(__file__).parents[1] / "trainer" / "conftest.py", "turbodistill_trainer_kit")

# Quick: every part of the default loss, four updates.
QUICK = {
    "rank": 2, "pairs": 8, "pair_steps": 2, "pair_sampler": "euler", "guidance": 2.0, "batch_size": 2, "updates": 4,
    "regression_updates": 1, "adversarial_ramp": 0, "head_channels": 8, "precision": "float32", "preview_every": 2,
    "evaluate_every": 2, "save_every": 100, "taps": "blocks.0,blocks.1",
}  # fmt: skip
PROMPTS = "\n".join(kit.WORDS)


class ToyBackend:
    """Remembers what it was asked; `gate` holds the model's passes back while it is cleared."""

    name = "Toy"
    sizes = (32, 32)
    usage = "in a prompt: <lora:{name}:1>"
    settings = QUICK
    limits: dict = {}  # noqa: RUF012 - a constant
    page_fields: dict = {}  # noqa: RUF012 - a constant

    def __init__(self, folder: Path):
        self.folder, self.title = folder, "toy.safetensors"
        self.readable = None
        self.lists: dict[str, Path] = {}  # built in, besides "words"
        self.host = kit.conv_host()
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()  # a pass has begun
        self.told: list[Path] = []
        self.host.denoiser.backbone.register_forward_pre_hook(self._wait())
        self.before = fingerprint(self.host.denoiser.backbone), kit.weights(self.host.denoiser.backbone)

    def _wait(self):
        entered, gate = self.entered, self.gate

        def wait(*_):  # a plain function: a full copy of the network takes it along
            entered.set()
            assert gate.wait(60)

        return wait

    def checkpoint(self) -> str:
        return self.title

    def runs_folder(self) -> Path:
        return self.folder / "outputs" / "runs"

    def students_folder(self) -> Path:
        return self.folder / "Lora"

    def readable_folders(self) -> list[Path] | None:
        return self.readable

    def prompts(self) -> dict[str, Path]:
        path = self.folder / "words.txt"
        path.write_text(PROMPTS)
        return {"words": path, **self.lists}

    def suggestion(self) -> Suggestion:
        return suggest(self.title)

    def wildcards(self) -> list[Path]:
        return [self.folder / "wildcards"]

    @contextmanager
    def open(self, width: int, height: int):
        if (width, height) != self.host.resolution:
            raise ValueError(f"{width} x {height} pixels: the toy makes 32 x 32")
        with self.lock:
            yield self.host

    def refusal(self):
        return ""

    def free_memory(self):
        return None

    def saved(self, path: Path) -> None:
        assert self.lock.acquire(blocking=False), "the model is still in use"
        self.lock.release()
        self.told.append(path)
