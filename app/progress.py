"""A run on the command line: progress bars, previews, and its end when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..trainer.config import Config
from ..trainer.world import ALONE, World
from .interrupt import interruptible

if TYPE_CHECKING:
    from ..trainer.loop.distill import Step
    from ..trainer.run.events import Event


def follow(
    events: Generator[Event, None, None],
    config: Config,
    folder: Path,
    host,
    title: str = "training",
    world: World = ALONE,
) -> Any:
    """Show a run's events as progress bars, write its previews; returns Finished. Raises Interrupted.

    Of several processes the first alone shows and writes, and a signal to one ends all.
    """
    from ..trainer.run.events import Finished, Interrupted, Preview

    bars = Bars(config, title)
    with interruptible() as signals:
        try:
            for event in events:
                if isinstance(event, Finished):
                    return event
                if isinstance(event, Preview) and world.leads:
                    write_preview(host, event, folder / "previews")
                if world.leads:
                    bars.show(event)
                if stop := world.largest(signals[0] if signals else 0):
                    raise Interrupted(stop)
        finally:
            events.close()
            bars.close()


class Bars:
    """One progress bar at a time: pairs, then the training, which is called `title`."""

    def __init__(self, config: Config, title: str):
        self.config, self.title = config, title
        self._bar: Any = None

    def show(self, event: Event) -> None:
        """Move the bar, or print what the event says in words."""
        from ..trainer.loop.distill import Step
        from ..trainer.run import words
        from ..trainer.run.events import PairsMade, Planned, Selected, Warned

        if isinstance(event, PairsMade):
            self._renew(event.what, event.total, "")
            self._bar.update(event.done - self._bar.n)
        elif isinstance(event, Step):
            self._step(event)
        elif isinstance(event, Selected):
            _say(f"update {event.update}: score {event.score:.2f}{', the best so far' if event.best else ''}")
        elif isinstance(event, Planned):
            _say(event.text)
        elif isinstance(event, Warned):
            _say(words.warning(event.update, event.text))

    def _step(self, step: Step) -> None:
        minutes = self.config.minutes
        self._renew(self.title, round(minutes * 60) if minutes else self.config.updates, "s" if minutes else "update")
        done = min(round(step.spent), self._bar.total) if minutes else step.update
        self._bar.update(done - self._bar.n)
        if step.health:
            losses = {name: f"{value:.3f}" for name, value in step.losses.items()}
            self._bar.set_postfix(update=step.update, **losses, acc=f"{step.health.accuracy:.2f}", refresh=False)

    def _renew(self, title: str, total: int, unit: str) -> None:
        """A bar of this title, in place of another's."""
        from tqdm import tqdm

        if self._bar is None or self._bar.desc != title:
            self.close()
            self._bar = tqdm(total=total, desc=title, unit=unit)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _say(text: str) -> None:
    """A line above the bars, on stderr as they are."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def write_preview(host, preview, folder: Path) -> None:
    """Teacher beside student for fixed prompts and noise, as one PNG."""
    from ..measure import report
    from ..trainer.data.files import write_whole

    columns = [
        report.Column("teacher", "many steps", list(host.decode(preview.teacher).cpu())),
        report.Column("student", f"update {preview.update}", list(host.decode(preview.student).cpu())),
    ]
    write_whole(folder / f"{preview.update:07d}.png", report.png(report.grid(columns, preview.prompts)))
