"""What every front end shares: pairs, training, checkpoints, previews, the choice of the best student.

`run(...)` yields events; the command line, the node and the tab each show them in their own way.
"""

from __future__ import annotations

import io
import logging
import random
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...core.card import read_student
from ...core.student import load_weights
from ..config import Config, ConfigError
from ..data.files import write_whole
from ..data.images import cache_images, load_images, read_image_folder
from ..data.pairs import load_pairs, make_pairs, pairs_key, pairs_size
from ..data.samples import Samples
from ..host import Host
from ..loop import health
from ..loop.distill import Diverged, distill
from ..loop.precision import autocast
from ..loop.start import begin, create, features
from ..loop.state import State
from .events import Begun, Control, Event, Finished, PairsMade, Preview, Selected, Warned
from .history import History
from .memory import Memory, OutOfMemory, advice, is_out_of_memory, measure_memory
from .scores import Score, latent_score
from .student_file import write_student

log = logging.getLogger(__name__)
STATE, HISTORY, BEST = "state.pt", "history.csv", "student.safetensors"
HELD_OUT = 96  # pairs, at most, that are kept from training to choose the best student by
FEWEST = 4  # of them, with which every score works
PREVIEWS = 8


def student_pictures(state: State, pairs: Samples, rows: Tensor, steps: int = 1) -> Tensor:
    """Latents (N, C, H, W), float32 on the CPU, that the averaged student makes from these pairs' noise."""
    device = state.student.device
    parts = []
    with state.averaged(), state.student.merged(), autocast(state.config, device):
        for chunk in rows.split(state.config.batch_size):
            cond = pairs.cond.rows(chunk).to(device)
            parts.append(state.student.generate(pairs.noise(chunk).to(device), cond, steps).float().cpu())
    return torch.cat(parts)


def split(pairs: Samples) -> tuple[Tensor, Tensor]:
    """Rows to train on and held-out rows: those of every tenth prompt, or of every tenth pair if prompts are few.

    At least FEWEST are held out; of fewer than twice as many pairs, all are both.
    """
    unique = sorted(set(pairs.prompts))
    random.Random(0).shuffle(unique)
    if len(unique) >= 20:
        held = set(unique[: max(FEWEST, len(unique) // 10)])
        mask = torch.tensor([p in held for p in pairs.prompts])
    else:
        every = max(2, min(10, len(pairs) // FEWEST))
        mask = torch.arange(len(pairs)) % every == every - 1
    if mask.sum() < FEWEST:
        rows = torch.arange(len(pairs))
        return rows, rows[:PREVIEWS]
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()[:HELD_OUT]


def check_name(name: str) -> str:
    """The name of a run, which is its folder's; raises ConfigError for one that cannot be."""
    if not re.fullmatch(r"[^\s./\\<>:\"|?*][^/\\<>:\"|?*]*", name) or name.endswith((".", " ")):
        raise ConfigError(f"name is {name!r}: give one that can be a folder's, such as my-turbo")
    return name


def save_state(state: State, folder: Path) -> None:
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    write_whole(folder / STATE, buffer.getvalue())


def resume(state: State, folder: Path) -> bool:
    """Load the folder's last state, if it has one; raises ConfigError if it was made with other settings."""
    path = folder / STATE
    if not path.exists():
        return False
    try:
        saved = torch.serialization.load(path, weights_only=True, map_location=state.student.device)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete it to begin anew; the teacher pairs stay") from None
    now = state.extra.get("data")
    state.load_state_dict(saved)
    before = state.extra.setdefault("data", now)
    if before != now:
        raise ConfigError(
            f"{folder} holds a training of another model, or with other prompts or pairs: give this one another name"
        )
    return True


def estimate(host: Host, config: Config, prompts: Sequence[str]) -> Memory:
    """What a training will take; raises ConfigError for settings that do not fit this model."""
    sample = Samples(torch.zeros(1, *host.latent_shape), host.encode_text([""]), [""])
    state = begin(host, config, sample)
    try:
        size = pairs_size(host.latent_shape, sample.cond, config.pairs, len(set(prompts[: config.pairs])))
        return replace(measure_memory(state, sample), on_disk=size)
    finally:
        state.release()


def run(
    host: Host,
    config: Config,
    folder: str | Path,
    prompts: Sequence[str],
    images: str | Path | None = None,
    score: Score = latent_score,
    pairs_folder: str | Path | None = None,
    control: Control | None = None,
) -> Iterator[Event]:
    """Distil `host`'s model into a one-step student, in `folder`; an earlier run there goes on.

    Makes what is missing of the teacher pairs (in `pairs_folder`, by default inside `folder`), then
    trains; yields events as it goes. Closing the generator, or an error in a host's pass, saves the
    state and stops; `control` asks for a preview, or for an early end. `images` is a captioned folder
    of real pictures for the discriminator. Ends with Finished. Raises DataError, ConfigError,
    OutOfMemory, or Diverged (after writing the last good student).
    """
    out_of_memory = ""
    doing = _Doing()
    try:
        yield from _run(host, config, Path(folder), prompts, images, score, pairs_folder, control or Control(), doing)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        trains = doing.what == "training"
        out_of_memory = advice(doing.what, config, host.latent_shape) if trains else advice(doing.what)
    if out_of_memory:  # outside of the handler: the old error's frames would hold on to what is to be freed
        raise OutOfMemory(out_of_memory)


@dataclass
class _Doing:
    """What a run is at, for its errors."""

    what: str = "making teacher pairs"


def _run(
    host: Host,
    config: Config,
    folder: Path,
    prompts: Sequence[str],
    images: str | Path | None,
    score: Score,
    pairs_folder: str | Path | None,
    control: Control,
    doing: _Doing,
) -> Iterator[Event]:
    if images is None and config.sees_pictures:
        raise ConfigError(f"positives is {config.positives!r} but there are no images: give a folder, or use 'teacher'")
    _writable(folder)
    pairs_folder = Path(pairs_folder or folder / "pairs")
    total = 0 if images is None else len(read_image_folder(images))
    seen = features(host, config)  # a setting that does not fit this model is told before hours of pairs
    if config.rank:
        create(host, config).release()
    for done, newest in make_pairs(host, config, prompts, pairs_folder):
        yield PairsMade(done, config.pairs, "teacher pairs", newest)
    pairs = load_pairs(pairs_folder, config.pairs)
    reals = None
    if images is not None:
        doing.what = "encoding pictures"
        for done, newest in cache_images(host, images, folder / "images"):
            yield PairsMade(done, total, "pictures", newest)
        reals = load_images(folder / "images", total)
    train_rows, held_rows = split(pairs)
    train, held = pairs.select(train_rows), pairs.select(held_rows)
    doing.what = "training"
    state = begin(host, config, pairs, seen)
    state.extra["data"] = pairs_key(host, config, prompts)
    try:
        yield from _train(host, state, folder, train, held, reals, score, control)
    finally:
        state.release()


def _train(
    host: Host,
    state: State,
    folder: Path,
    train: Samples,
    held: Samples,
    reals: Samples | None,
    score: Score,
    control: Control,
) -> Iterator[Event]:
    config = state.config
    if resume(state, folder):
        log.info("going on from update %d", state.update)
    uncond = host.encode_text([""])
    yield Begun(state.update, measure_memory(state, train))
    history = History(folder / HISTORY, state.update)
    recent: deque[health.Health] = deque(maxlen=100)
    shown = torch.arange(min(PREVIEWS, len(held)))
    saved = True

    def preview() -> Preview:
        pictures = student_pictures(state, held, shown)
        seeds = [] if held.seeds is None else held.seeds[shown].tolist()
        return Preview(state.update, pictures, held.latents[shown], [held.prompts[i] for i in shown], seeds)

    def select() -> Selected:
        value = score(student_pictures(state, held, torch.arange(len(held))), held.latents[:])
        state.extra["measured"] = state.update
        best = value <= state.extra.get("best", float("inf"))
        if best:
            write_student(host, state, folder / BEST, {"score on held-out prompts": round(value, 4)})
            state.extra["best"] = value  # now that it is kept
        return Selected(state.update, value, best)

    if state.update == 0:
        yield preview()
    due = config.evaluate_every and state.update and state.update % config.evaluate_every == 0
    if due and state.update < config.updates and state.extra.get("measured") != state.update:
        yield select()  # it was broken off just before
    try:
        with closing(distill(state, train, uncond, reals)) as steps:
            for step in steps:
                saved = False
                history.add(step)
                if step.update > config.regression_updates:
                    recent.append(step.health)
                yield step
                if config.evaluate_every and step.update % config.evaluate_every == 0:
                    yield select()
                if control.preview or (config.preview_every and step.update % config.preview_every == 0):
                    control.preview = False
                    yield preview()
                if step.update % config.save_every == 0:
                    save_state(state, folder)
                    saved = True
                if step.update % 100 == 0 and recent:
                    for text in health.warnings(health.average(recent), config.adversarial_weight > 0):
                        yield Warned(step.update, text)
                if control.stop:
                    break
    except Diverged as error:
        if not (folder / BEST).exists():
            write_student(host, state, folder / BEST, {})
        raise Diverged(f"{error}: {folder / BEST}") from None
    except BaseException:  # closed, cancelled or failed: nothing of it is lost, unless in the middle of an update
        if not saved and state.whole:
            save_state(state, folder)
        raise
    if not saved:
        save_state(state, folder)
    if config.evaluate_every and state.update % config.evaluate_every:
        last = select()
        save_state(state, folder)  # with the best score, or a longer run would begin to choose anew
        yield last
    if not config.evaluate_every or not (folder / BEST).exists():
        write_student(host, state, folder / BEST, {})
    tensors, card = read_student(folder / BEST)
    load_weights(state.student, state.average, tensors)  # the last preview is of what is kept
    yield preview()
    yield Finished(folder / BEST, card, state.extra.get("best"))


def _writable(folder: Path) -> None:
    """Raise OSError now, not after an hour, if nothing can be written there."""
    probe = folder / ".writable"
    write_whole(probe, b"")
    probe.unlink()
