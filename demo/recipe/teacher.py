"""Train the latent denoiser: Stable Diffusion 2's UNet in miniature, for as long as it is given.

    python -m turbodistill.demo.recipe.teacher              # until it is stopped; the same command goes on
    python -m turbodistill.demo.recipe.teacher --status     # how far it is
    python -m turbodistill.demo.recipe.teacher --decay 1500 # a usable model of what there is: teacher.safetensors

The learning rate stays constant; a model is a branch of it, in which the rate falls to zero (arXiv 2404.06395). The
branch leaves the training as it is, so that there can be many.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..text_encoder import WIDTH, TextEncoder
from . import averages, dataset, views
from .fit import Training, arguments, check_arguments, fit, low_precision, read_progress, read_state

CONFIG: dict[str, Any] = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    block_out_channels=(64, 128, 160),
    attention_head_dim=(2, 4, 5),  # heads of 32 channels; diffusers' name for their number
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=WIDTH,
    norm_num_groups=32,
    use_linear_projection=True,
)
DROP_TEXT = 0.1
MIN_SNR = 5.0
ALIGN_WIDTH = 512  # of the head that predicts the vision transformer's features
CHECKED = (150, 400, 650, 900)  # timesteps of the held-out loss
WIDTHS = (0.05, 0.10, 0.15, 0.20)  # of averages, among which the held-out loss chooses


@dataclass(frozen=True)
class Recipe:
    """What the teacher learns by. `benchmarks/teacher_recipes.py` compares them."""

    prediction: str = "v"  # what the network gives: v, or x0 (arXiv 2511.13720); the loss is v's in both
    weighting: str = "uniform"  # of noise levels in the loss: uniform, or min-snr (arXiv 2303.09556)
    timesteps: str = "uniform"  # or logit-normal (arXiv 2403.03206)
    captions: str = "fixed"  # three a picture, or drawn: names, keywords and paraphrases, anew each time
    augment: bool = False  # half of the pictures shifted and scaled by a little
    align: float = 0.0  # weight of alignment to a vision transformer's features (REPA, arXiv 2410.06940)


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's schedule: 1000 steps, sqrt(beta) linear from sqrt(.00085) to sqrt(.012)."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def load_text_encoder(folder: Path) -> TextEncoder:
    """The frozen text encoder of a folder."""
    with safe_open(folder / "text_encoder.safetensors", "pt") as file:
        encoder = TextEncoder(file.metadata()["tokenizer"])
    encoder.load_state_dict(load_file(folder / "text_encoder.safetensors"))
    return encoder.eval().requires_grad_(False)


def fixed_caption(record: dict, draw: random.Random) -> str:
    """The caption, the name alone, or three of its keywords, always the same."""
    style = dataset.STYLES[record["style"]]
    words = ", ".join(random.Random(record["caption"]).sample(record["keywords"], min(3, len(record["keywords"]))))
    texts = [record["caption"], f"{record['name']}, {style}", f"{words or record['name']}, {style}"]
    return draw.choices(texts, (0.5, 0.3, 0.2))[0]


def drawn_caption(record: dict, draw: random.Random) -> str:
    """The caption, or a paraphrase: any of its keywords, with the name or without, in any order."""
    if draw.random() < 0.5:
        return record["caption"]
    name, style = record["name"], dataset.STYLES[record["style"]]
    words = draw.sample(record["keywords"], min(len(record["keywords"]), draw.randint(1, 4)))
    if not words or draw.random() < 0.6:
        words.append(name)
    draw.shuffle(words)
    look = style.removeprefix("in ").removesuffix(" style")
    forms = (f"{', '.join(words)}, {style}", f"a {look} picture of {', '.join(words)}", f"{look}: {', '.join(words)}")
    return draw.choices(forms, (0.6, 0.2, 0.2))[0]


CAPTIONS = {"fixed": fixed_caption, "drawn": drawn_caption}
CHOICES = {
    "prediction": ("v", "x0"),
    "weighting": ("uniform", "min-snr"),
    "timesteps": ("uniform", "logit-normal"),
    "captions": tuple(CAPTIONS),
}


def build() -> Any:
    """A fresh UNet for latents of 4 x 16 x 16; Any, because diffusers mistypes its `to`."""
    unet = UNet2DConditionModel(**CONFIG)
    unet.set_attn_processor(AttnProcessor())  # on a CPU the fused backward in bf16 is slower
    return unet


class Learner(nn.Module):
    """The UNet, and a head that predicts a vision transformer's features from its middle (U-REPA, arXiv 2503.18414)."""

    def __init__(self, align: bool) -> None:
        super().__init__()
        self.unet = build()
        width = CONFIG["block_out_channels"][-1]
        layers = nn.Conv2d(width, ALIGN_WIDTH, 1), nn.SiLU(), nn.Conv2d(ALIGN_WIDTH, views.FEATURES, 1)
        self.head = nn.Sequential(*layers) if align else None
        self.middle = torch.empty(0)
        self.unet.mid_block.register_forward_hook(self._keep)

    def _keep(self, _module, _args, maps: Tensor) -> None:
        self.middle = maps

    def features(self) -> Tensor:
        """The head's features (B, F, 8, 8) of the last pass."""
        assert self.head is not None
        return F.interpolate(self.head(self.middle.float()), scale_factor=2, mode="bilinear")


class Teacher:
    """The pictures, their captions, and the loss of a recipe on them."""

    def __init__(self, folder: Path, recipe: Recipe, device: str, batch_size: int, seed: int = 0) -> None:
        self.recipe, self.batch_size, self.seed = recipe, batch_size, seed
        self.device = torch.device(device)
        _, records = dataset.load(folder)
        self.records = records
        self.train = [i for i, r in enumerate(records) if r["split"] == "train"]
        self.checked = [i for i, r in enumerate(records) if r["split"] == "combination"]
        self.latents = views.latents(folder, self.device)  # (N, V, 4, 16, 16), scaled; the first view is the picture
        self.features = views.features(folder) if recipe.align else None
        self.encoder = load_text_encoder(folder).to(self.device)
        cumulative = alphas_cumprod().to(self.device)
        self.alpha, self.sigma = cumulative.sqrt().float(), (1 - cumulative).sqrt().float()
        torch.manual_seed(seed)
        self.learner = Learner(bool(recipe.align)).to(self.device)

    def identity(self) -> dict[str, object]:
        """What a saved training must agree in; learning rate and batch size may change on the way."""
        captions = "\n".join(f"{r['caption']}|{r['split']}" for r in self.records)
        pictures = hashlib.sha256(captions.encode()).hexdigest()[:16]
        return asdict(self.recipe) | {"seed": self.seed, "pictures": pictures}

    def passed(self, unet: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The squared error of v (B,), and the share min-SNR gives it (B,), of latents and noise (B, 4, 16, 16)."""
        a, s = (table[t].view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        x = a * x0 + s * noise
        context = self.encoder.encode(texts)
        with low_precision(self.device.type):
            output = unet(x, t, context).sample.float()
        v = a * noise - s * x0
        # v = (alpha x - x0) / sigma; where there is hardly any noise, an error of x0 would count without bounds.
        found = (a * x - output) / s.clamp(min=0.1) if self.recipe.prediction == "x0" else output
        wanted = (a * x - x0) / s.clamp(min=0.1) if self.recipe.prediction == "x0" else v
        snr = (a / s).square().flatten()
        return (found - wanted).square().mean((1, 2, 3)), snr.clamp(max=MIN_SNR) / (snr + 1)

    def loss(self, learner: Learner, step: int) -> Tensor:
        """The loss of update `step`, which decides all that is drawn."""
        drawn = step + self.seed * 1_000_000_000
        tensors, words = torch.Generator().manual_seed(drawn), random.Random(drawn)
        size = self.batch_size
        index = torch.tensor(self.train)[torch.randint(len(self.train), (size,), generator=tensors)]
        caption = CAPTIONS[self.recipe.captions]
        texts = ["" if words.random() < DROP_TEXT else caption(self.records[i], words) for i in index.tolist()]
        if self.recipe.timesteps == "logit-normal":
            t = (torch.sigmoid(torch.randn(size, generator=tensors)) * 1000).long().clamp(max=999)
        else:
            t = torch.randint(1000, (size,), generator=tensors)
        view = torch.zeros(size, dtype=torch.long)
        if self.recipe.augment:
            some = torch.randint(1, self.latents.shape[1], (size,), generator=tensors)
            view = torch.where(torch.rand(size, generator=tensors) < 0.5, some, view)
        x0 = self.latents[index, view].to(self.device).float()
        noise = torch.randn(x0.shape, generator=tensors).to(self.device)
        errors, weight = self.passed(learner.unet, x0, noise, t.to(self.device), texts)
        loss = (errors * weight if self.recipe.weighting == "min-snr" else errors).mean()
        if self.features is not None:
            wanted = self.features[index].to(self.device).float()
            # An aligned feature is that of the picture as it is: a shifted one has none.
            same = (view == 0).float().to(self.device)
            apart = 1 - F.cosine_similarity(learner.features(), wanted, dim=1).mean((1, 2))
            loss = loss + self.recipe.align * (apart * same).mean()
        return loss

    def averaged(self, training: Training) -> UNet2DConditionModel:
        """A UNet with the narrower of the averages."""
        return self.filled(training.averages[averages.TRACKED[0]])

    def filled(self, weights: dict[str, Tensor]) -> UNet2DConditionModel:
        prefix, unet = "unet.", build().to(self.device)
        unet.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        return unet.eval()

    @torch.no_grad()
    def held_out_loss(self, unet: nn.Module) -> float:
        """The mean squared error of v over the held-out combinations, always with the same noise."""
        total = 0.0
        for t in CHECKED:
            for first in range(0, len(self.checked), 49):
                index = torch.tensor(self.checked[first : first + 49])
                draw = torch.Generator().manual_seed(1000 * first + t)
                x0 = self.latents[index, 0].to(self.device).float()
                noise = torch.randn(x0.shape, generator=draw).to(self.device)
                texts = [self.records[i]["caption"] for i in index.tolist()]
                times = torch.full((len(index),), t, device=self.device)
                total += float(self.passed(unet, x0, noise, times, texts)[0].sum())
        return total / len(CHECKED) / len(self.checked)

    def check(self, training: Training) -> dict[str, float]:
        return {"held_out_loss": self.held_out_loss(self.averaged(training))}


def paths(folder: Path) -> tuple[Path, Path, Path, Path]:
    """The training's state and its averages' folder; the same of its branch."""
    return folder / "teacher.pt", folder / "teacher", folder / "branch.pt", folder / "branch"


def run(
    teacher: Teacher, training: Training, state: Path, kept: Path, args, updates: int | None, decay: int = 0
) -> None:
    """`fit` for a teacher: averages go to `kept`, progress has the held-out loss."""
    fit(
        training,
        teacher.loss,
        state,
        args.lr,
        args.batch_size,
        updates,
        decay,
        args.save_every,
        kept,
        teacher.check,
    )


def train(args) -> None:
    """Go on with the training from its last state, or begin it."""
    teacher = Teacher(args.folder, args.recipe, args.device, args.batch_size)
    training = Training(teacher.learner, teacher.identity())
    state, kept, _, _ = paths(args.folder)
    run(teacher, training, state, kept, args, args.updates)


def branch(args) -> None:
    """Let the rate fall to zero over `--decay` updates from where the training is, and write the best average.

    The recipe is the training's. A branch of as many updates that was broken off goes on.
    """
    state, kept, copied, kept_too = paths(args.folder)
    saved = read_state(state)["settings"]
    args.recipe = Recipe(**{f.name: saved[f.name] for f in fields(Recipe) if f.name in saved})
    teacher = Teacher(args.folder, args.recipe, args.device, args.batch_size)
    training = Training(teacher.learner, teacher.identity())
    note = copied.with_suffix(
        ".txt"
    )  # of what length and at which update the branch began: there while it is under way
    under_way = note.read_text().split() if note.exists() else []
    if len(under_way) != 2 or under_way[0] != str(args.decay):
        training.load_file(state)
        for old in (kept_too, copied.with_suffix(".jsonl")):
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
        shutil.copyfile(state, copied)
        under_way = [str(args.decay), str(training.step)]
        note.write_text(" ".join(under_way))
    begun = int(under_way[1])
    last = begun + args.decay
    run(teacher, training, copied, kept_too, args, last, args.decay)
    files = averages.saved_files([kept], begun) | averages.saved_files([kept_too], last)
    candidates = {f"average .{round(100 * std):02d}": averages.average(files, last, std) for std in WIDTHS}
    candidates["last weights"] = {n: p.detach().clone() for n, p in training.trainable.items()}
    losses = {name: teacher.held_out_loss(teacher.filled(weights)) for name, weights in candidates.items()}
    best = min(losses, key=lambda name: losses[name])
    print("held-out loss: " + ", ".join(f"{name} {value:.5f}" for name, value in losses.items()) + f"; kept {best}")
    weights = {k: v.contiguous().cpu() for k, v in teacher.filled(candidates[best]).state_dict().items()}
    about = {"updates": str(last), "average": best, "prediction": args.recipe.prediction}
    part = args.folder / "teacher.part"
    save_file(weights, part, about)
    part.replace(args.folder / "teacher.safetensors")
    note.unlink()


def status(folder: Path) -> None:
    """Print how far the training is: a line for each doubling, and the last ones."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    rows = read_progress(paths(folder)[0])
    if not rows:
        print(f"no training in {folder} has saved yet")
        return
    shown = {row["step"]: row for i, row in enumerate(rows, 1) if i & (i - 1) == 0 or i > len(rows) - 5}
    print(f"{'updates':>9} {'pictures':>10} {'hours':>7} {'loss':>8} {'held-out loss':>14}")
    for row in shown.values():
        row = {"images": 0, "hours": 0.0, "loss": float("nan"), "held_out_loss": float("nan")} | row
        counts = f"{row['step']:>9} {row['images']:>10} {row['hours']:>7.2f}"
        print(f"{counts} {row['loss']:>8.4f} {row['held_out_loss']:>14.5f}")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe's settings as options."""
    for field in fields(Recipe):
        flag = f"--{field.name}"
        if field.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            choices = CHOICES.get(field.name)
            parser.add_argument(flag, type=type(field.default), default=field.default, choices=choices)


def main() -> None:
    """The command line."""
    parser = arguments(__doc__ or "", updates=None)
    parser.add_argument("--decay", type=int, help="make a model: branch off, with the rate falling over these updates")
    parser.add_argument("--status", action="store_true", help="print how far the training is")
    add_recipe(parser)
    args = parser.parse_args()
    check_arguments(parser, args)
    if not 0 <= args.align < 100:
        parser.error(f"--align is {args.align}: give 0 to 100")
    args.recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    try:
        if args.status:
            status(args.folder)
        else:
            branch(args) if args.decay else train(args)
    except FileNotFoundError as error:
        how = "python -m turbodistill.demo.recipe.dataset, and then .unpack, make what it learns from"
        raise SystemExit(f"teacher: {error} ({how})") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"teacher: {error}") from None
    except KeyboardInterrupt as stop:
        raise SystemExit(f"{stop or 'stopped'}; the same command goes on from the last saved state") from None


if __name__ == "__main__":
    main()
