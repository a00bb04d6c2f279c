"""The runs that the page shows beside their nodes: `web/turbodistill.js` draws them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..trainer.run.events import Event, PairsMade
from ..trainer.run.memory import OutOfMemory, advice, is_out_of_memory
from ..trainer.run.monitor import Monitor
from . import host_page

EVENT = "turbodistill.run"
EVERY = 0.5  # seconds between messages
PICTURES_EVERY = 5.0  # seconds between looks at the pairs that are made

_panels: dict[str, Panel] = {}  # by the node's id: the last run of each
_stopped: dict[str, float] = {}  # by a run's name: when it was ended early
_lock = threading.Lock()


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
    host_page.route("GET", base, snapshot)
    host_page.route("POST", f"{base}/stop", lambda node: ask(node, "stop"))
    host_page.route("POST", f"{base}/preview", lambda node: ask(node, "preview"))


class Panel:
    """One run, beside one node: feeds its monitor and tells the pages, not too often."""

    def __init__(self, node: str, workflow: str, monitor: Monitor):
        self.node, self.workflow, self.monitor = node, workflow, monitor
        self._sent, self._told, self._shown = 0, 0.0, 0.0
        self._last = time.monotonic()
        self._bar = host_page.progress()
        with _lock:
            _panels[node] = self
        self.tell()

    def follow(self, event: Event) -> None:
        """Take in an event of the run; raises ComfyUI's exception if the user has cancelled."""
        now = time.monotonic()
        self.monitor.follow(event, now - self._last)
        if isinstance(event, PairsMade) and now - self._shown >= PICTURES_EVERY:
            self.monitor.newest(event.newest)
            self._shown = time.monotonic()
        self._last = time.monotonic()
        if self._last - self._told >= EVERY:
            self.tell()
        host_page.check_cancel()

    def snapshot(self, first: int = 0) -> dict[str, Any]:
        """The monitor's, with the node, and the workflow's id: node ids are the same in other workflows."""
        return {"node": self.node, "workflow": self.workflow} | self.monitor.snapshot(first)

    def tell(self) -> None:
        """Send what is new."""
        told = self.snapshot(self._sent)
        if told["total"]:
            self._bar(told["done"], told["total"])
        host_page.send(EVENT, told)
        self._sent, self._told = told["points"], time.monotonic()


@contextmanager
def watched(hidden, monitor: Monitor) -> Iterator[Panel]:
    """A panel, beside the node whose `hidden` inputs these are, whose run ends with the context, well or not."""
    workflow = (hidden.extra_pnginfo or {}).get("workflow") or {}
    panel = Panel(hidden.unique_id, workflow.get("id", ""), monitor)
    full = ""
    try:
        yield panel
    except BaseException as error:
        if host_page.is_cancel(error):
            monitor.end("cancelled")
        else:
            if is_out_of_memory(error):
                doing = "making teacher pairs" if monitor.kind == "pairs" else "showing pictures"
                full = str(error) if isinstance(error, OutOfMemory) else advice(doing)
            monitor.end("failed", full or str(error))
        panel.tell()
        if not full:
            raise
    finally:
        monitor.show = lambda latents: []  # the page may ask as long as the server runs, and that one holds the MODEL
    if full:
        host_page.empty_cache()
        raise OutOfMemory(full)
    if monitor.control.stop:
        _stopped[monitor.name] = time.time()
    panel.tell()
