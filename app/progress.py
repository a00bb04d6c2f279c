"""A run on the command line: progress bars, previews, Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..trainer.config import Config


@contextmanager
def interruptible() -> Iterator[list[bool]]:
    """Within, the first Ctrl-C is only noted (the list gets an element); the second one breaks off."""
    noted: list[bool] = []

    def note(_signal, _frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(True)
        print("\nstopping after this update ...", file=sys.stderr)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def follow(events: Iterator, config: Config, folder: Path, host, title: str = "training") -> Any:
    """Show a run's events as progress bars, write its previews; returns Finished. Raises Interrupted."""
    from tqdm import tqdm

    from ..trainer.loop.distill import Step
    from ..trainer.run.events import Finished, Interrupted, PairsMade, Preview, Selected, Warned

    bar: Any = None
    with interruptible() as stop:
        try:
            for event in events:
                if isinstance(event, PairsMade):
                    if bar is None or bar.desc != event.what:
                        bar = _renew(bar, tqdm(total=event.total, desc=event.what, unit="", initial=0))
                    bar.update(event.done - bar.n)
                elif isinstance(event, Step):
                    if bar is None or bar.desc != title:
                        whole = round(config.minutes * 60) if config.minutes else config.updates
                        bar = _renew(bar, tqdm(total=whole, desc=title, unit="s" if config.minutes else "update"))
                    bar.update(min(round(event.spent), bar.total) - bar.n if config.minutes else event.update - bar.n)
                    losses = {k: f"{v:.3f}" for k, v in event.losses.items()}
                    bar.set_postfix(update=event.update, **losses, acc=f"{event.health.accuracy:.2f}", refresh=False)
                elif isinstance(event, Preview):
                    write_preview(host, event, folder / "previews")
                elif isinstance(event, Selected):
                    tqdm.write(
                        f"update {event.update}: score {event.score:.2f}{', the best so far' if event.best else ''}"
                    )
                elif isinstance(event, Warned):
                    tqdm.write(f"update {event.update}: {event.text}")
                elif isinstance(event, Finished):
                    return event
                if stop:
                    raise Interrupted
        finally:
            events.close()  # type: ignore[attr-defined]
            _renew(bar, None)


def _renew(old, new):
    if old is not None:
        old.close()
    return new


def write_preview(host, preview, folder: Path) -> None:
    """Teacher beside student for fixed prompts and noise, as one PNG."""
    from ..measure import report
    from ..trainer.data.files import write_whole

    columns = [
        report.Column("teacher", "many steps", list(host.decode(preview.teacher).cpu())),
        report.Column("student", f"update {preview.update}", list(host.decode(preview.student).cpu())),
    ]
    write_whole(folder / f"{preview.update:07d}.png", report.png(report.grid(columns, preview.prompts)))
