"""The runs that the page shows beside their nodes: `web/turbodistill.js` draws them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..trainer.run.events import Event
from ..trainer.run.memory import OutOfMemory, is_out_of_memory
from ..trainer.run.monitor import Monitor
from ..trainer.run.session import Session
from .host import page

EVENT = "turbodistill.run"
EVERY = 0.5  # seconds between messages
KEPT = 32  # runs that are known, the newest

_panels: dict[str, Panel] = {}  # by the node's id: the last run of each
_stopped: dict[str, float] = {}  # by a run's name: when it was ended early
_lock = threading.Lock()


def keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Put a value in as the newest of KEPT, and let the oldest go: a server runs for long."""
    known.pop(key, None)
    known[key] = value
    while len(known) > KEPT:
        del known[next(iter(known))]


def stopped_early(name: str) -> float:
    """Changes when the run of this name was ended early, so that ComfyUI runs its node again and it goes on."""
    return _stopped.get(name, 0.0)


def snapshot(node: str) -> dict[str, Any] | None:
    """All that a page shows beside a node; None where nothing has run, which is no error."""
    with _lock:
        panel = _panels.get(node)
    return panel.snapshot() if panel else None


def ask(node: str, wish: str) -> None:
    """`stop` or `preview`; raises KeyError where nothing has run, ValueError where no training runs now."""
    with _lock:
        if node not in _panels:
            raise KeyError(f"node {node} has no run")
        monitor = _panels[node].monitor
    if not monitor.running:
        raise ValueError("no training runs here now")
    setattr(monitor.control, wish, True)


def open_routes() -> None:
    """Let the page ask; called once, when ComfyUI loads our nodes."""
    base = "/turbodistill/runs/{node}"
    page.route("GET", base, snapshot)
    page.route("POST", f"{base}/stop", lambda node: ask(node, "stop"))
    page.route("POST", f"{base}/preview", lambda node: ask(node, "preview"))


class Panel:
    """One run, beside one node: tells the pages of it, not too often."""

    def __init__(self, node: str, workflow: str, session: Session):
        self.node, self.workflow, self.session, self.monitor = node, workflow, session, session.monitor
        self._told = 0.0
        self._progress = page.Progress()
        with _lock:
            keep(_panels, node, self)
        self.tell()

    def follow(self, event: Event) -> None:
        """Take in an event of the run; raises ComfyUI's exception if the user has cancelled."""
        self.session.take(event)
        if time.monotonic() - self._told >= EVERY:
            self.tell()
        page.check_cancel()

    def snapshot(self) -> dict[str, Any]:
        """The monitor's, with the node, and the workflow's id: node ids are the same in other workflows."""
        return {"node": self.node, "workflow": self.workflow} | self.monitor.snapshot()

    def tell(self) -> None:
        """Send all that the pages show."""
        shown = self.snapshot()
        if shown["total"]:
            self._progress.show(shown["what"], shown["done"], shown["total"])
        page.send(EVENT, shown)
        self._told = time.monotonic()


@contextmanager
def watched(hidden, monitor: Monitor, folder: Path | None = None) -> Iterator[Panel]:
    """A panel, beside the node whose `hidden` inputs these are, whose run ends with the context, well or not.

    `folder` is that of a training.
    """
    workflow = (hidden.extra_pnginfo or {}).get("workflow") or {}
    session = Session(monitor, folder)
    panel = Panel(hidden.unique_id, workflow.get("id", ""), session)
    full = ""
    try:
        yield panel
    except BaseException as error:
        if page.is_cancel(error):
            monitor.end("cancelled")
        else:
            words = session.failed(error)
            full = words if is_out_of_memory(error) else ""
        panel.tell()
        if not full:
            raise
    finally:
        session.close()
    if full:  # outside of the handler: the error's frames hold on to the tensors
        page.empty_cache()
        raise OutOfMemory(full)
    if monitor.control.stop:
        keep(_stopped, monitor.name, time.time())
    panel.tell()
