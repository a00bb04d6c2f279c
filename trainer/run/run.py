"""What every front end shares: a whole run, from the teacher pairs to the best student.

`run(...)` yields events; the command line, the node and the tab each show them in their own way.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...core.exclusive import exclusive
from ...core.header import no_file
from ..config import Config, ConfigError
from ..data.affixes import Affixes
from ..data.choices import check_texts
from ..data.found import BROKEN, Found
from ..data.images import cache_images, check_pictures, load_images, with_pictures
from ..data.lock import locked
from ..data.pairs import load_pairs, make_pairs, pairs_recipe
from ..data.pictures import check_place, read_pictures
from ..data.samples import Samples
from ..data.sizes import by_size, pictures_by_size, with_buckets
from ..host import Host
from ..loop.start import begin, check, features
from ..prediction_check import check_prediction
from ..world import ALONE, World
from .estimate import planned
from .events import Control, Event, PairsMade, Planned, Warned
from .memory import PREVIEWS, OutOfMemory, advice, is_out_of_memory
from .placed import placed
from .plan import set_by_hand
from .scores import Score, latent_score
from .training import Part, Training, check_saved, going_on, pictures_recipe

HELD_OUT = 96  # pairs, at most, that are kept from training to choose the best student by
ALONE_PLANNED = "vram plans for one process: run it there with --estimate first, and give its settings to them all"
FEWEST = 4  # of them, with which every score works
IMAGES = "images"  # the folder of encoded pictures, in that of a run


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


def check_inputs(config: Config, images: str | Path | None) -> None:
    """Raise ConfigError, DataError or CardError for settings or files that cannot be, whatever the model."""
    if images is None and config.sees_pictures:
        raise ConfigError(f"positives is {config.positives!r} but there are no images: give a folder, or use 'teacher'")
    if images is not None and not config.sees_pictures:
        raise ConfigError("positives is 'teacher', which takes no images: leave them out, or set positives to 'both'")
    if images is not None:
        check_place(images)
    if config.init_student and (wrong := no_file(config.init_student)):
        raise ConfigError(f"init_student: {config.init_student:.300} {wrong}")


def run(
    host: Host,
    config: Config,
    folder: str | Path,
    prompts: Iterable[str],
    images: str | Path | None = None,
    score: Score = latent_score,
    pairs_folder: str | Path | None = None,
    control: Control | None = None,
    world: World = ALONE,
    given: Collection[str] | None = None,
) -> Generator[Event, None, None]:
    """Distil `host`'s model into a one-step student, in `folder`; an earlier run there goes on.

    Makes what is missing of the teacher pairs (in `pairs_folder`, by default inside `folder`), then
    trains; yields events as it goes. Closing the generator, or an error in a host's pass, saves the
    state and stops; `control` asks for a preview, or for an early end. `images` are captioned
    pictures for the discriminator, as `read_pictures` takes them. The processes of a `world` each run this with the
    same arguments. Of the settings that `vram` would choose those that are `given` stay (None: those that are not at
    their defaults). Ends with Finished. Raises DataError, ConfigError, OutOfMemory, Diverged (after writing the last
    good student), InUse (while another run has the folder), or Apart (another process has ended).
    """
    out_of_memory = ""
    doing = _Doing()
    texts = prompts if isinstance(prompts, str) else list(prompts)
    try:
        yield from _run(
            host, config, Path(folder), texts, images, score, pairs_folder, control or Control(), doing, world, given
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        trains = doing.what == "training"
        out_of_memory = advice(doing.what, config, host.latent_shape) if trains else advice(doing.what)
    if out_of_memory:  # outside of the handler: the old error's frames would hold on to what is to be freed
        raise OutOfMemory(out_of_memory)


def _check_shared(world: World, folder: Path) -> None:
    """Raise ConfigError if not every process sees the same folder: on several machines it must be a shared one."""
    if world.size == 1:
        return
    name = world.told(f".together-{secrets.token_hex(8)}")
    mark = folder / name
    try:
        if world.leads:
            mark.touch()
        world.wait_for_first()
        seen = world.average(torch.tensor(float(mark.exists())))
    finally:
        if world.leads:
            mark.unlink(missing_ok=True)
    if seen < 1:
        raise ConfigError(f"{folder} is not the same folder for every process: choose one that all machines share")


def _with_pictures(
    parts: Sequence[Part], config: Config, found: Found, folder: Path, world: World
) -> Generator[Event, None, list[Part]]:
    """Encode pictures, each at the size that fits its shape; the parts with them. Yields what is done."""
    with_them, done = [], 0
    of_sizes = pictures_by_size(found, [part.host.resolution for part in parts])
    for part, own in zip(parts, of_sizes, strict=True):
        width, height = part.host.resolution
        place = folder if len(parts) == 1 else folder / f"{width}x{height}"
        if own.pictures:
            for made, newest in cache_images(part.host, own, place, config.broken_pictures, Affixes.of(config), world):
                yield PairsMade(done + made, len(found.pictures), "pictures", newest)
            reals = load_images(place, own.usable)
            reals = with_pictures(reals, place, own, part.host.resolution)
            if config.raw_pictures and reals.pictures is None:
                yield Warned(
                    0, f"raw_pictures is left out: {place} was encoded before it was known; delete it for that"
                )
            part = replace(part, reals=reals)
        done += len(own.pictures)
        if left := own.left.get(BROKEN):
            found.leave(BROKEN, left.first, left.words, left.count)
        with_them.append(part)
    if BROKEN in found.left:
        yield Warned(0, found.in_words())
    return with_them


def _fitted(
    host: Host, config: Config, prompts: Sequence[str], given: Collection[str] | None, world: World, folder: Path
) -> tuple[Config, str]:
    """The settings chosen for a card of `vram` GB, and what to say of them; raises ConfigError where none fit."""
    if world.size > 1:
        raise ConfigError(ALONE_PLANNED)
    given = set_by_hand(config, {}) if given is None else given
    config, settled = going_on(config, folder, given)
    with exclusive(host.denoiser.backbone):
        found, *_ = planned(host, config, prompts, given=given, settled=settled)
    words = found.in_a_sentence(config)
    if not found.fits:
        raise ConfigError(words)
    return found.config, words


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
    world: World,
    given: Collection[str] | None,
) -> Generator[Event, None, None]:
    check_inputs(config, images)
    check_texts(prompts)
    if config.batch_size % world.size:
        raise ConfigError(
            f"batch_size is {config.batch_size}, which {world.size} processes cannot share evenly: it counts the "
            f"pictures of all of them; make it a multiple of {world.size}"
        )
    with ExitStack() as stack:
        if world.leads:
            stack.enter_context(locked(folder))
        _check_shared(world, folder)
        pairs_folder = Path(pairs_folder or folder / "pairs")
        found = None if images is None else read_pictures(images, config.broken_pictures)
        config = with_buckets(config, found, host.resolution)
        seen = features(host, config)  # a setting that does not fit this model is reported before hours of pairs
        if config.vram:
            config, words = _fitted(host, config, prompts, given, world, folder)
            yield Planned(words)
        check(host, config)
        recipe = pairs_recipe(host, config, prompts)
        check_saved(folder, config, recipe, found)
        if found:
            if config.broken_pictures == "stop" and not (folder / IMAGES).exists():
                check_pictures(found.pictures)  # before hours of pairs
            if words := found.in_words():
                yield Warned(0, words)
        new = world.told(not pairs_folder.exists())  # of a model that is read wrongly every pair would be noise
        if new:
            with exclusive(host.denoiser.backbone):
                words = check_prediction(host.denoiser, host.latent_shape, host.encode_text([""]))
            if words:
                yield Warned(0, words)
        warnings: list[str] = []
        for done, newest in make_pairs(host, config, prompts, pairs_folder, warnings.append, world):
            yield from (Warned(0, words) for words in warnings)
            warnings.clear()
            yield PairsMade(done, config.pairs, "teacher pairs", newest)
        parts = []
        for share in by_size(host, config, prompts, pairs_folder):
            pairs = load_pairs(share.folder, share.config.pairs)
            train_rows, held_rows = split(pairs)
            parts.append(Part(share.host, pairs.select(train_rows), pairs.select(held_rows)))
        if found:
            doing.what = "encoding pictures"
            parts = yield from _with_pictures(parts, config, found, folder / IMAGES, world)
        doing.what = "training"
        with placed(host, config):
            with exclusive(host.denoiser.backbone):
                state = begin(parts[0].host, config, parts[0].train, seen, world)
            state.extra |= {"pairs": recipe, "images": pictures_recipe(found)}
            try:
                yield from Training(parts[0].host, state, folder, parts, score, control).events()
            finally:
                state.release()
