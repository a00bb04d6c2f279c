"""Measure students against their teacher: distances to real pictures, style, diversity, time."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.denoiser import Cond, Guidance, Guided
from ..core.exclusive import exclusive
from ..core.sampling import sample_euler, seeded_noise, trailing_sigmas
from ..core.student import Student
from ..trainer.data.affixes import NO_AFFIXES, Affixes
from ..trainer.data.choices import check_texts
from ..trainer.data.files import DataError, check_file, write_whole
from ..trainer.host import Host
from ..trainer.run.scores import kernel_distance
from .metrics import (
    FeatureNetwork,
    Interval,
    StyleClassifier,
    frechet_distance,
    high_frequencies,
    kid,
    precision_recall,
)

BATCH = 32
FEWEST = 8  # pictures of a split, with which every measure is defined
Context = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Arm:
    """One way of making latents (B, C, H, W) from unit noise (B, C, H, W) and conditions.

    `ready` gives the context in which it is called, entered once for many calls; `prompt` makes the prompt that it is
    given of a reference's.
    """

    make: Callable[[Tensor, Cond], Tensor]
    ready: Context = nullcontext
    prompt: Callable[[str], str] = str


@dataclass(frozen=True)
class Reference:
    """Real pictures (N, 3, H, W) in [0, 1], with captions, style words and splits.

    What is chosen (the best student) or fitted (the classifier) is so by the pictures of split
    "train"; what is reported is measured against those of split "heldout" alone.
    """

    images: Tensor
    captions: list[str]
    styles: list[str]
    splits: list[str]

    def split(self, name: str) -> Reference:
        return self.take([i for i, s in enumerate(self.splits) if s == name])

    def take(self, rows: Sequence[int]) -> Reference:
        images = self.images[list(rows)]
        return Reference(images, *([column[i] for i in rows] for column in (self.captions, self.styles, self.splits)))


def load_reference(path: str | Path) -> Reference:
    """A zip of pictures with `metadata.jsonl` rows of {file_name, text, style, split}; raises DataError."""
    check_file("reference set", Path(path))
    try:
        with zipfile.ZipFile(path) as archive:
            rows = _rows(archive)
            pictures = []
            for row in rows:
                with archive.open(row["file_name"]) as file:
                    pictures.append(np.asarray(Image.open(file).convert("RGB")))
        check_texts([row["text"] for row in rows])
        splits = [row["split"] for row in rows]
        for name in ("train", "heldout"):
            if splits.count(name) < FEWEST:
                raise ValueError(f"{splits.count(name)} pictures of split {name!r}, at least {FEWEST} are needed")
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        return Reference(images, [row["text"] for row in rows], [row["style"] for row in rows], splits)
    except Exception as error:  # zip files, pictures and rows can each be broken in ways of their own
        raise DataError(
            f"reference set {path} cannot be read ({type(error).__name__}: {error!s:.300}): give a zip of pictures "
            "with a metadata.jsonl"
        ) from None


def unpack_reference(path: str | Path, split: str, folder: Path) -> None:
    """Write the pictures of one split of a reference zip as a captioned folder, as `read_pictures` takes it."""
    with zipfile.ZipFile(path) as archive:
        rows = [row for row in _rows(archive) if row["split"] == split]
        archive.extractall(folder, [row["file_name"] for row in rows])
    write_whole(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def _rows(archive: zipfile.ZipFile) -> list[dict[str, str]]:
    return [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]


def teacher_arm(host: Host, steps: int, guidance: Guidance, negative: str = "", affixes: Affixes = NO_AFFIXES) -> Arm:
    """The teacher with `steps` Euler (DDIM) steps on trailing timesteps."""
    schedule = host.denoiser.schedule
    sigmas = trailing_sigmas(schedule, steps)
    uncond = host.encode_text([negative])

    def make(noise: Tensor, cond: Cond) -> Tensor:
        model = Guided(host.denoiser, cond, uncond.to(noise.device), guidance)
        x = schedule.add_noise(torch.zeros_like(noise), noise, sigmas[:1].to(noise))
        return sample_euler(model, x, sigmas)

    return Arm(make, lambda: exclusive(host.denoiser.backbone), affixes.teacher)


def student_arm(student: Student, steps: int | None = None, affixes: Affixes = NO_AFFIXES) -> Arm:
    """The student in `steps` (by default one, or with guidance alone its own number), merged, as hosts sample it."""

    @contextmanager
    def ready() -> Iterator[None]:
        with exclusive(student.teacher.backbone), student.merged():
            yield

    return Arm(lambda noise, cond: student.generate(noise, cond, steps), ready, affixes.student)


@torch.no_grad()
def make_pictures(
    host: Host, arm: Arm, prompts: Sequence[str], seed: int, context: Context = nullcontext
) -> Iterator[Tensor]:
    """Pictures (B, 3, H, W) in [0, 1], batch by batch; picture k has noise seed `seed * 100_000 + k`.

    `context` is a callable that gives a context manager for the passes, such as autocast.
    """
    device = host.denoiser.device
    with arm.ready():
        for first in range(0, len(prompts), BATCH):
            texts = list(prompts[first : first + BATCH])
            seeds = [seed * 100_000 + first + i for i in range(len(texts))]
            noise = seeded_noise(seeds, host.latent_shape, device)
            cond = host.encode_text([arm.prompt(text) for text in texts]).to(device)
            with context():
                latents = arm.make(noise, cond)
            yield host.decode(latents.float()).cpu()


@dataclass(frozen=True)
class Score:
    """The measures of one arm against held-out pictures; distances are on features of EfficientNet-Lite0."""

    kid: Interval  # x 1000
    fd: float
    precision: float
    recall: float
    style: float  # share whose style word a classifier trained on real pictures tells right
    diversity: float  # mean distance of features between samples of one prompt, over the teacher's
    sharpness: float  # power in high frequencies, over the real pictures'
    to_teacher: float  # mean distance of features to the teacher's picture of the same noise


@dataclass(frozen=True)
class Floor:
    """What real pictures score: the best that a model can be expected to reach."""

    kid: Interval  # x 1000, training pictures against held-out ones, which have other names
    style: float  # share of held-out pictures whose style the classifier tells right


class Evaluator:
    """Features and classifier of a reference set, made once, when first needed; scores any number of arms."""

    def __init__(self, reference: Reference):
        self.network = FeatureNetwork()
        self.known, self.real = reference.split("train"), reference.split("heldout")

    @cached_property
    def of_known(self) -> tuple[Tensor, Tensor]:
        """Features (N, F) and textures (N, T) of the training pictures, as FeatureNetwork gives them."""
        return self.network(self.known.images)

    @cached_property
    def of_real(self) -> tuple[Tensor, Tensor]:
        """The same of the held-out pictures."""
        return self.network(self.real.images)

    @cached_property
    def classifier(self) -> StyleClassifier:
        """Tells style words, fitted to the training pictures."""
        return StyleClassifier(self.of_known[1], self.known.styles)

    def floor(self) -> Floor:
        features, textures = self.of_real
        return Floor(kid(self.of_known[0], features), self.classifier.accuracy(textures, self.real.styles))

    def score(
        self, images: Tensor, styles: Sequence[str], alike: Tensor, teacher: Tensor, teacher_alike: Tensor
    ) -> Score:
        """Score `images` (N, 3, H, W); `alike` (P, S, 3, H, W) are S samples of each of P prompts."""
        features, textures = self.network(images)
        of_teacher, _ = self.network(teacher)
        of_real, _ = self.of_real
        precision, recall = precision_recall(of_real, features)
        return Score(
            kid(features, of_real),
            frechet_distance(features, of_real),
            precision,
            recall,
            self.classifier.accuracy(textures, styles),
            self.spread(alike) / max(self.spread(teacher_alike), 1e-9),
            high_frequencies(images) / high_frequencies(self.real.images),
            float((features - of_teacher).norm(dim=1).mean()),
        )

    def spread(self, alike: Tensor) -> float:
        """Mean pairwise distance of features among the samples of one prompt, (P, S, 3, H, W)."""
        features = self.network(alike.flatten(0, 1))[0].reshape(*alike.shape[:2], -1)
        return float(torch.stack([torch.pdist(f).mean() for f in features]).mean())

    def kid_score(self, host: Host) -> Callable[[Tensor, Tensor], float]:
        """A score for choosing the best student: KID x 1000 of its pictures to the training pictures."""

        def kid_score(student: Tensor, _teacher: Tensor) -> float:
            return 1000 * kernel_distance(self.network(host.decode(student).cpu())[0], self.of_known[0])

        return kid_score


@dataclass(frozen=True)
class Timing:
    """Seconds a picture, batch 1, warm: the median of a few runs; and denoiser passes."""

    seconds: float
    passes: int


@torch.no_grad()
def measure_time(host: Host, arm: Arm, prompt: str, repeats: int = 5, context: Context = nullcontext) -> Timing:
    """Time one prompt to its picture, and count the rows that go through the denoiser."""

    def once() -> float:
        begun = time.perf_counter()
        for _ in make_pictures(host, Arm(arm.make, prompt=arm.prompt), [prompt], 0, context):
            pass
        return time.perf_counter() - begun

    rows: list[int] = []  # guidance puts two rows into one call: rows are what costs
    with arm.ready():
        once()
        hook = host.denoiser.backbone.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
        try:
            times = [once() for _ in range(repeats)]
        finally:
            hook.remove()
    return Timing(float(np.median(times)), sum(rows) // repeats)


def table(scores: dict[str, Score], floor: Floor) -> str:
    """The scores as text, a line an arm."""
    heads = f"{'FD':>7} {'prec':>5} {'rec':>5} {'style':>6} {'div':>5} {'sharp':>6} {'to teacher':>10}"
    lines = [f"{'arm':<28} {'KID x1000 [95 %]':>26} {heads}"]
    for name, s in scores.items():
        lines.append(
            f"{name:<28} {s.kid!s:>26} {s.fd:>7.1f} {s.precision:>5.2f} {s.recall:>5.2f} {s.style:>6.2f} "
            f"{s.diversity:>5.2f} {s.sharpness:>6.2f} {s.to_teacher:>10.2f}"
        )
    lines.append(f"{'real, train vs held-out':<28} {floor.kid!s:>26} {floor.style:>28.2f}")
    return "\n".join(lines)


def to_json(scores: dict[str, Score], floor: Floor, timings: dict[str, Timing]) -> str:
    """Scores, the floor of real pictures and timings as JSON."""
    return json.dumps(
        {
            "scores": {k: asdict(v) for k, v in scores.items()},
            "floor": asdict(floor),
            "timings": {k: asdict(v) for k, v in timings.items()},
        },
        indent=1,
    )
