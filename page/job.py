"""The one distillation that runs in the background, whichever page or program asked for it.

A thread of its own works on the loaded model, so that the page lives; pages come and go and ask for
snapshots. The module outlives a Reload UI, and the job with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.families import recognise, suspect
from ..core.gradient_checkpointing import blocks
from ..trainer.checks import check_backbone, check_inside, check_name, find_student
from ..trainer.config import ConfigError
from ..trainer.data.built_in import AUTO
from ..trainer.data.files import write_whole
from ..trainer.data.images import check_pictures
from ..trainer.data.lock import InUse, locked
from ..trainer.data.pairs import make_pairs, pairs_key
from ..trainer.data.pictures import read_pictures
from ..trainer.data.sizes import with_buckets
from ..trainer.host import Host
from ..trainer.run import run
from ..trainer.run.estimate import Estimate, estimate
from ..trainer.run.events import Event, Finished, Interrupted, PairsMade
from ..trainer.run.memory import is_out_of_memory
from ..trainer.run.monitor import Monitor
from ..trainer.run.plan import set_by_hand
from ..trainer.run.session import PLAIN, Session
from ..trainer.run.words import duration
from ..trainer.sizes import check_size
from . import limits, runs
from .backend import Backend
from .pictures import data_urls
from .request import Request
from .runs import Record

log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """A distillation runs already: the message says which."""


class NothingRuns(RuntimeError):
    """What was asked needs a distillation that runs, and none does."""


class NoTraining(RuntimeError):
    """What was asked needs a training, and what runs is at something else now."""


class Job:
    """One piece of work, in a thread of its own; every method may be called from any thread.

    Raises ConfigError, DataError or OSError, before anything is begun, for what cannot be.
    """

    def __init__(self, backend: Backend, request: Request):
        self.backend, self.request = backend, request
        self.config = request.config()
        if refusal := backend.refusal():
            raise ConfigError(refusal)
        limits.check(self.config, backend.limits, backend.name)
        if self.config.vram and "gradient_checkpointing" not in request.settings:  # a program names what it wants
            begun = backend.settings.get("gradient_checkpointing", False)
            self.config = self.config.replace(gradient_checkpointing=begun)
        self.given = set_by_hand(self.config, backend.settings)
        self.checkpoint = backend.checkpoint()
        if not self.checkpoint:
            raise ConfigError("no checkpoint is loaded: choose one first")
        self.folder = backend.runs_folder() / check_name(request.name)
        self.size = (request.width or backend.sizes[0], request.height or backend.sizes[1])
        check_size(*self.size)
        folders = backend.readable_folders()
        check_backbone(self.config.pixel_backbone, folders)
        if self.config.init_student:
            start = find_student(self.config.init_student, [backend.students_folder()], folders)
            self.config = self.config.replace(init_student=start)
        if request.kind == "distill":
            run.check_inputs(self.config, request.images or None)
        captions: list[str] = []
        if request.images:
            found = read_pictures(check_inside(request.images, folders), self.config.broken_pictures)
            if self.config.broken_pictures == "stop":
                check_pictures(found.pictures)
            captions = found.captions
            self.config = with_buckets(self.config, found, self.size)
        if request.kind == "distill":
            runs.check_settings(self.folder, self.config)
        self.prompts, words = request.find_prompts(backend, captions)
        self.begun = time.time()
        self.result = ""  # what came of it, in words
        self.estimate: Estimate | None = None
        self.monitor = Monitor(request.kind, request.name, self.config, lambda latents: [], backend.free_memory())
        if words:
            self.monitor.warn(words)
        self._cancelled = threading.Event()
        self.session = Session(self.monitor, self.folder if request.kind == "distill" else None)
        self._thread = threading.Thread(target=self._work, name=f"TurboDistill {request.name}", daemon=True)

    @property
    def working(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def begin(self) -> None:
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Until it has ended, or so long."""
        self._thread.join(seconds)

    def stop(self) -> None:
        """End the training after this update and keep the best student; raises NothingRuns or NoTraining."""
        self._must_train()
        self.monitor.control.stop = True

    def preview(self) -> None:
        """Make a preview after this update; raises NothingRuns or NoTraining."""
        self._must_train()
        self.monitor.control.preview = True

    def cancel(self) -> None:
        """Break off within the model's next pass, with everything saved; raises NothingRuns."""
        if not self.working:
            raise NothingRuns("nothing runs now")
        self._cancelled.set()

    def _must_train(self) -> None:
        if not self.working:
            raise NothingRuns("nothing runs now")
        if not self.monitor.running:
            raise NoTraining("it does not train now: Cancel ends it, and keeps what is made so far")

    def snapshot(self) -> dict[str, Any]:
        """All that a page shows, as JSON values: the monitor's, and what it works on."""
        width, height = self.size
        shown = self.monitor.snapshot() | {
            "checkpoint": self.checkpoint,
            "width": width,
            "height": height,
            "begun": self.begun,
            "result": self.result,
            "cancelling": self._cancelled.is_set() and self.working,
        }
        if shown["cancelling"] and shown["state"] == "working":
            shown["headline"] = "Cancelling: everything so far is saved"
        return shown

    def in_words(self) -> str:
        """What it is at, for whoever would start another one."""
        snapshot = self.monitor.snapshot()
        far = f", {snapshot['what']} {snapshot['done']} of {snapshot['total']}" if snapshot["total"] else ""
        left = "" if snapshot["time_left"] is None else f", {duration(snapshot['time_left'])} left"
        return f"{self.request.name}{far}{left}"

    def _work(self) -> None:
        full = False
        try:
            with self.backend.open(*self.size) as host, _cancellable(host.denoiser.backbone, self._cancelled.is_set):
                self._check_cancel()
                self.monitor.show = lambda latents: data_urls(host.decode(latents.to(host.denoiser.device)))
                finish = getattr(self, f"_{self.request.kind}")(host)
            finish()
        except Interrupted:
            self._record_end("cancelled")
            self.monitor.end("cancelled")
        except Exception as error:
            full = is_out_of_memory(error)
            level = logging.INFO if full or isinstance(error, PLAIN) else logging.ERROR
            log.log(level, "%s failed", self.request.name, exc_info=True)
            text = self.session.failed(error)
            if not isinstance(error, InUse):
                self._record_end("failed", text)
        finally:
            self.session.close()
        if full and torch.cuda.is_available():  # outside of the handler: the error's frames held on to the tensors
            torch.cuda.empty_cache()

    def _record_end(self, state: str, error: str = "") -> None:
        if self.request.kind == "distill" and (record := runs.read_record(self.folder)):
            try:
                record.ended(state, error).write(self.folder)
            except OSError as trouble:
                log.warning("%s", trouble)

    def _check_cancel(self) -> None:
        """Raise Interrupted if Cancel was pressed."""
        if self._cancelled.is_set():
            raise Interrupted

    def _follow(self, event: Event) -> None:
        self.session.take(event)
        self._check_cancel()

    def _pairs_folder(self, key: str) -> Path:
        return self.backend.runs_folder().parent / "pairs" / key

    def _estimate(self, host: Host) -> Callable[[], None]:
        self.estimate = estimate(host, self.config, self.prompts, given=self.given)
        self.result = self.estimate.in_words(self.monitor.free)
        return lambda: self.monitor.end("done")

    def _pairs(self, host: Host) -> Callable[[], None]:
        config = self.config
        folder = self._pairs_folder(pairs_key(host, config, self.prompts))
        for done, newest in make_pairs(host, config, self.prompts, folder, self.monitor.warn):
            self._follow(PairsMade(done, config.pairs, "teacher pairs", newest))
        self.result = f"{config.pairs} teacher pairs in {folder}; Distil with the same prompts and settings takes them"
        return lambda: self.monitor.end("done")

    def _distill(self, host: Host) -> Callable[[], None]:
        config, folder, asked = self.config, self.folder, self.request
        key = pairs_key(host, config, self.prompts)
        before = runs.check_pairs(folder, key)
        # Whole, so that it can go on even where a default has changed.
        built_in = self.backend.suggestion().name if asked.built_in == AUTO else asked.built_in
        asked = replace(asked, built_in=built_in, width=self.size[0], height=self.size[1], settings=config.to_dict())
        with locked(folder):  # a run that another program has there keeps its record
            Record(asked, self.checkpoint, key, student=before.student if before else "").write(folder)
        if found := recognise(self.checkpoint):
            self.monitor.warn(f"{self.checkpoint} looks like {found.name}, which is distilled already: load its base")
        elif word := suspect(self.checkpoint):
            self.monitor.warn(f"{self.checkpoint} has {word!r} in its name: if it is a few-step model, load its base")
        place, control = self._pairs_folder(key), self.monitor.control
        finished = None
        events: Any = run.run(
            host,
            config,
            folder,
            self.prompts,
            asked.images or None,
            pairs_folder=place,
            control=control,
            given=self.given,
        )
        with closing(events):
            for event in events:
                if isinstance(event, Finished):
                    finished = event
                else:
                    self._follow(event)
        if finished is None:
            raise RuntimeError("the run ended without a student")
        return lambda: self._publish(finished)

    def _publish(self, finished: Finished) -> None:
        """Put the student where it is found by name; called when the model is as it was before."""
        record = runs.read_record(self.folder)
        path = runs.student_path(self.backend.students_folder(), self.request.name, record)
        try:
            write_whole(path, finished.path.read_bytes())
        except OSError as error:
            raise OSError(f"{error}; the student is kept: {finished.path}") from None
        self.backend.saved(path)
        self.result = f"student: {path}; {self.backend.usage.format(name=path.stem)}"
        self.monitor.follow(finished, 0.0)
        if record:
            record.ended(self.monitor.snapshot()["state"], student=str(path)).write(self.folder)


@contextmanager
def _cancellable(backbone: nn.Module, cancelled: Callable[[], bool]) -> Iterator[None]:
    """Within, every block of the network first looks whether the user has pressed Cancel."""

    def check(*_: Any) -> None:  # a plain function: a full copy of the network takes it along
        if cancelled():
            raise Interrupted

    try:
        found = blocks(backbone)
    except ValueError:
        found = {}
    handles = [module.register_forward_pre_hook(check) for module in (backbone, *found.values())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_lock = threading.Lock()
_current: Job | None = None


def current() -> Job | None:
    """The job that runs, or the last one that ran; None before the first."""
    return _current


def start(backend: Backend, request: Request) -> Job:
    """Begin what is asked for in the background.

    Raises Busy if something runs already; ConfigError, DataError or OSError for what cannot be.
    """
    global _current
    with _lock:
        if _current and _current.working and _current.monitor.snapshot()["state"] != "working":
            _current.wait(5)  # it is about to end
        if _current and _current.working:
            raise Busy(f"a distillation runs already ({_current.in_words()}): stop or cancel it first, or wait")
        job = Job(backend, request)
        job.begin()
        _current = job
    return job


def running() -> Job | None:
    """The job that has not ended; raises nothing."""
    return _current if _current and _current.working else None


def must_run() -> Job:
    """The job that has not ended; raises NothingRuns."""
    if job := running():
        return job
    raise NothingRuns("nothing runs now")
