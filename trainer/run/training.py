"""The training of a run: previews, the choice of the best student, saved states, and the end."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.card import CardError, read_card, read_student
from ...core.denoiser import Guided
from ...core.exclusive import exclusive
from ...core.rights import denied
from ...core.sampling import TEACHER_SAMPLERS
from ...core.student import load_weights
from ..config import ADAMW, Config, ConfigError, check_resumable
from ..data.files import reason
from ..data.found import Found
from ..data.pairs import changes, digest
from ..data.samples import Samples
from ..host import Host, HostSampling
from ..loop import health
from ..loop.batch import Group
from ..loop.distill import Diverged, Step, distill_groups
from ..loop.precision import autocast
from ..loop.state import State, check_state
from .events import Begun, Control, Event, Finished, Preview, Selected, Warned
from .history import History
from .memory import PREVIEWS, is_out_of_memory, measure_memory
from .scores import Score, kind_of
from .state_file import read_state, read_values, write_state
from .student_file import write_student

log = logging.getLogger(__name__)
STATE, HISTORY, BEST = "state.safetensors", "history.csv", "student.safetensors"


def student_pictures(
    state: State, pairs: Samples, rows: Tensor, steps: int | None = None, own: HostSampling | None = None
) -> Tensor:
    """Latents (N, C, H, W), float32 on the CPU, that the averaged student makes from these pairs' noise.

    In one step; one of guidance alone as the teacher made the pairs, by the host's `own` sampler if that did. Its LoRA
    is not merged: the copy of the weights that this takes may be more than the memory a training leaves free. Each
    process makes its share, and has all.
    """
    student, sampler, world = state.student, TEACHER_SAMPLERS[state.config.pair_sampler], state.world
    parts = []
    with state.averaged(), autocast(state.config, student), torch.no_grad():
        for batch in rows.split(state.config.batch_size):
            own_rows = batch[world.rows(len(batch))]
            chunk = own_rows if len(own_rows) else batch[:1]  # a sharded student makes its passes in all at once
            cond, noise = pairs.cond.rows(chunk).to(student.device), pairs.noise(chunk).to(student.device)
            if own and student.guidance_steps and pairs.seeds is not None:
                made = own(Guided(student, cond), noise, pairs.seeds[chunk].tolist())
            else:
                made = student.generate(noise, cond, steps, sampler)
            parts.append(world.gather(made[: len(own_rows)].float().cpu(), len(batch)))
    return torch.cat(parts)


def save_state(state: State, folder: Path) -> None:
    """Write the state into a run's folder, whole or not at all; raises OSError. Of several processes the first does."""
    if state.world.leads or state.world.shards:
        write_state(folder / STATE, state.state_dict(), state.world.leads)


def _saved(folder: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any] | None:
    """A folder's last state, if it has one; raises ConfigError for a file that is none."""
    path = folder / STATE
    if not path.exists():
        return None
    if words := denied(path):
        raise ConfigError(words)
    try:
        saved = read(path)
        check_state(saved)
        return saved
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _unusable(path, error) from None


def _unusable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} cannot be read ({reason(error):.200}): delete it to begin anew; the teacher pairs stay")


def pictures_recipe(found: Found | None) -> dict[str, str]:
    """What tells pictures of one's own, if there are any, from others, wherever their folder lies."""
    if found is None:
        return {}
    listed = sorted(f"{picture.stamp} {picture.text}" for picture in found.pictures)
    return {"pictures": digest(json.dumps(listed)), "their number": str(len(listed))}


def going_on(config: Config, folder: Path, given: Collection[str]) -> tuple[Config, tuple[str, ...]]:
    """The settings, and which of them no plan may change: the optimizer of the training in a folder, unless `given`."""
    saved = _saved(folder, read_values)
    if saved is None or "optimizer" in given:
        return config, ()
    return config.replace(optimizer=saved["config"].get("optimizer", ADAMW)), ("optimizer",)


def check_saved(folder: Path, config: Config, recipe: Mapping[str, str], found: Found | None = None) -> None:
    """Raise ConfigError if the training in a folder cannot go on with these settings, pairs and pictures."""
    if (folder / BEST).is_dir():
        raise ConfigError(f"{folder / BEST} is a folder, and the student is written there: move it, or use another one")
    saved = _saved(folder, read_values)
    if saved is None:
        return
    check_resumable(saved["config"], config)
    known = saved["extra"]
    now = {"pairs": recipe, "images": pictures_recipe(found) if "images" in known else {}}
    for kind, what in (("pairs", "pairs"), ("images", "pictures of your own")):
        if changed := changes(known.get(kind, {}), now[kind]):
            raise ConfigError(
                f"{folder} holds a training with other {what} ({changed}): change that back, or use another name or "
                "folder"
            )


def resume(state: State, folder: Path) -> bool:
    """Load the folder's last state, if it has one; raises ConfigError for one of other settings or another shape."""
    saved = _saved(folder, read_state)
    if saved is None:
        return False
    try:
        state.load_state_dict(saved)
    except ConfigError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _unusable(folder / STATE, error) from None
    return True


@dataclass(frozen=True)
class Part:
    """What is trained on of one size; `held` are the pairs by which the best student is chosen."""

    host: Host
    train: Samples
    held: Samples
    reals: Samples | None = None


@dataclass
class Training:
    """A state with the data that it trains on, in a run's folder: a part of each size, of which the first is shown."""

    host: Host
    state: State
    folder: Path
    parts: Sequence[Part]
    score: Score
    control: Control
    saved: bool = True  # whether the folder has the state as it is now
    recent: deque[health.Health] = field(default_factory=lambda: deque(maxlen=100))

    @property
    def best(self) -> Path:
        """The best student's file."""
        return self.folder / BEST

    @property
    def kept(self) -> bool:
        """Whether there is a best student: one that was deleted or broken meanwhile is written anew."""
        try:
            found = bool(read_card(self.best))
        except (CardError, OSError):
            found = False
        return self.state.world.told(found)

    def events(self) -> Iterator[Event]:
        """Train to the end, from the folder's last state if it has one; raises as `run`."""
        state = self.state
        if resume(state, self.folder):
            log.info("going on from update %d", state.update)
        yield from self._begin()
        negative = [state.config.negative_prompt]
        groups = [
            Group.of(part.train, part.host.encode_text(negative), part.reals, number)
            for number, part in enumerate(self.parts)
        ]
        history = History(self.folder / HISTORY, state.update) if state.world.leads else None
        try:
            with closing(distill_groups(state, groups)) as steps:
                for step in steps:
                    self.saved = False
                    if step.health and history:
                        history.add(step, step.health)
                    yield from self._after(step)
                    if state.world.told(self.control.stop):
                        break
        except Diverged as error:
            if not self.kept:
                self.write({})
            raise Diverged(f"{error}: {self.best}") from None
        except (
            BaseException
        ) as error:  # closed, cancelled or failed: nothing of it is lost but in the middle of an update
            alone = state.world.shards and not isinstance(error, GeneratorExit)  # without the others' parts
            if not self.saved and state.whole and not alone:
                self.save()
            raise
        yield from self._end()

    def _begin(self) -> Iterator[Event]:
        """What comes before the first update."""
        state, config = self.state, self.state.config
        with exclusive(self.host.denoiser.backbone):
            largest = max(self.parts, key=lambda part: math.prod(part.host.resolution))
            memory = measure_memory(state, largest.train, largest.host.resolution, largest.host.beside)
        yield Begun(state.update, memory)
        if not state.finished and (words := self._choose_anew()):
            yield Warned(0, words)
        judged = (config.adversarial_weight or config.distillation_weight) and not config.guidance_only
        if config.updates <= config.regression_updates and judged:
            yield Warned(
                0,
                f"regression_updates is {config.regression_updates} and updates {config.updates}: this is regression "
                "alone, the discriminator never trains. Lower regression_updates",
            )
        if state.finished:
            yield Warned(0, f"this training is finished, at update {state.update}: raise updates or minutes to go on")
        if state.update and not state.finished:  # it may have been broken off just before
            if self._evaluates() and state.extra.get("measured") != state.update:
                yield self.select()
            if self._previews() and state.extra.get("previewed") != state.update:
                yield self.preview()
        elif not state.update:
            yield self.preview()

    def _after(self, step: Step) -> Iterator[Event]:
        """What follows an update."""
        config = self.state.config
        if step.health and step.update > config.regression_updates and not config.guidance_only:
            self.recent.append(step.health)
        yield step
        if self._evaluates():
            yield self.select()
        if self.state.world.told(self.control.preview) or self._previews():
            self.control.preview = False
            yield self.preview()
        if step.update % config.save_every == 0:
            self.save()
        if step.update % 100 == 0 and self.recent:
            for text in health.warnings(health.average(self.recent), config.adversarial_weight > 0):
                yield Warned(step.update, text)

    def _end(self) -> Iterator[Event]:
        """Save, choose the best student, and show it."""
        state, config = self.state, self.state.config
        if not self.saved:
            self.save()
        if config.evaluate_every and (state.extra.get("measured") != state.update or not self.kept):
            last = self.select()
            self.save()  # with the best score, or a longer run would begin to choose anew
            yield last
        if not config.evaluate_every or not self.kept:
            self.write({})
        tensors, card = read_student(self.best)
        load_weights(state.student, state.average, tensors)  # the last preview is of what is kept
        yield self.preview()
        yield Finished(self.best, card, state.extra.get("best"))

    def _choose_anew(self) -> str:
        """Forget a best score that cannot be compared with those to come; why, in words, or ""."""
        extra, now = self.state.extra, kind_of(self.score)
        before = extra.get("score", now)
        extra["score"] = now
        if before == now or "best" not in extra:
            return ""
        extra.pop("measured", None)
        return (
            f"the best student so far, of score {extra.pop('best'):.3g}, was chosen by {before!s:.80}, which is not "
            f"comparable with {now}: the choice begins anew"
        )

    def _evaluates(self) -> bool:
        """Whether the held-out pairs are measured at this update."""
        every = self.state.config.evaluate_every
        return bool(every) and self.state.update % every == 0

    def _previews(self) -> bool:
        """Whether a preview is made after this update."""
        every = self.state.config.preview_every
        return bool(every) and self.state.update % every == 0

    def preview(self) -> Preview:
        """The student's pictures of the first held-out pairs, beside the teacher's."""
        held, own = self.parts[0].held, self.parts[0].host.sampling
        rows = torch.arange(min(PREVIEWS, len(held)))
        pictures = student_pictures(self.state, held, rows, own=own)
        seeds = [] if held.seeds is None else held.seeds[rows].tolist()
        self.state.extra["previewed"] = self.state.update
        return Preview(self.state.update, pictures, held.latents[rows], [held.prompts[i] for i in rows], seeds)

    def select(self) -> Selected:
        """Measure the student on the held-out pairs, and keep it if it is the best so far."""
        state = self.state
        values = [
            self.score(
                student_pictures(state, part.held, torch.arange(len(part.held)), own=part.host.sampling),
                part.held.latents[:],
            )
            for part in self.parts
        ]
        value = state.world.told(sum(values) / len(values))
        state.extra["measured"] = state.update
        best = value <= state.extra.get("best", float("inf")) or not self.kept
        if best:
            self.write({"score on held-out prompts": round(value, 4)})
            state.extra["best"] = value  # now that it is kept
        return Selected(state.update, value, best)

    def save(self) -> None:
        """Save the state, from which the run goes on."""
        save_state(self.state, self.folder)
        self.saved = True

    def write(self, metrics: dict[str, float]) -> None:
        """Write the student as the best one."""
        write_student(self.host, self.state, self.best, metrics)
        self.state.world.wait_for_first()  # it is there
