"""How well a teacher of the recipe draws what it is asked: recognition, style, distance to real pictures, memory.

    python benchmarks/teacher.py                         # the embedded model
    python benchmarks/teacher.py --denoiser FILE         # a teacher of the recipe (teacher.safetensors)
    python benchmarks/teacher.py --trace                 # the training so far, by the averages that it kept

Recognition is the share of prompts whose nearest real picture, by features that no training sees, bears the prompt's
name (among the first one, the first five); the picture that the prompt describes is passed over. It is told for
trained pictures, for combinations of name and style that were held out, and for names that were; with what real
pictures reach in the teacher's place. Needs the recipe's folder (`demo/recipe/dataset.py`, `unpack.py`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from turbodistill.core.denoiser import Guidance
from turbodistill.demo.recipe import averages, dataset, pack, teacher
from turbodistill.demo.recipe.fit import read_progress
from turbodistill.measure import metrics
from turbodistill.measure.evaluate import make_pictures, teacher_arm
from turbodistill.trainer.pipeline.host import PipelineHost
from turbodistill.trainer.pipeline.load import load_model
from turbodistill.trainer.run.scores import kernel_distance

SPLITS = {"train": "trained", "combination": "new combination", "heldout": "new name"}


class Gallery:
    """The reference's real pictures, their features, and the prompts of each split."""

    def __init__(self, folder: Path) -> None:
        images, records = dataset.load(folder)
        rows = pack.reference_rows(records)
        self.network = metrics.FeatureNetwork()
        self.records = [records[i] for i in rows]
        self.names = [r["name"] for r in self.records]
        self.features, textures = self.network(images[rows].float() / 255)
        known = [i for i, r in enumerate(self.records) if r["split"] == "train"]
        self.classifier = metrics.StyleClassifier(textures[known], [self.records[i]["style"] for i in known])
        self.textures = textures
        # Of trained names those that have a combination held out: both are then of the same names.
        kin = {r["name"] for r in self.records if r["split"] == "combination"}
        self.prompts = {
            split: [
                i for i, r in enumerate(self.records) if r["split"] == split and (split != "train" or r["name"] in kin)
            ]
            for split in SPLITS
        }
        cache = folder / "training_features.pt"
        if not cache.exists():
            train = [i for i, r in enumerate(records) if r["split"] == "train"]
            torch.save(self.network(images[train].float() / 255)[0], cache)
        # Features (N, 1280) of all pictures that a teacher trains on.
        self.training = torch.load(cache, weights_only=True)

    def measure(self, split: str, features: Tensor, textures: Tensor) -> dict[str, Tensor | float]:
        """Features (S, N, d) of S seeds of a split's prompts: outcomes (S, N), and plain numbers."""
        rows = self.prompts[split]
        own, wanted = torch.tensor(rows), [self.names[i] for i in rows]
        styles = [self.records[i]["style"] for i in rows]
        first, five = (
            torch.stack([metrics.recognised(f, wanted, self.features, self.names, own, k) for f in features])
            for k in (1, 5)
        )
        real = self.features[rows]
        return {
            "first": first,
            "first_five": five,
            "style": sum(self.classifier.accuracy(t, styles) for t in textures) / len(textures),
            "kid": sum(1000 * kernel_distance(f, real) for f in features) / len(features),
            "nearest": float(metrics.nearest(features.flatten(0, 1), self.training)[0].median()),
        }

    def real(self, split: str) -> dict[str, Tensor | float]:
        rows = self.prompts[split]
        return self.measure(split, self.features[rows].unsqueeze(0), self.textures[rows].unsqueeze(0))


def pictures(host: PipelineHost, prompts: list[str], args, seed: int) -> Iterator[Tensor]:
    with tqdm(total=len(prompts), desc=f"seed {seed}", unit="picture", leave=False) as bar:
        for batch in make_pictures(host, teacher_arm(host, args.steps, Guidance(args.guidance)), prompts, seed):
            bar.update(len(batch))
            yield batch


def measure(gallery: Gallery, path: Path, args, splits=tuple(SPLITS)) -> dict[str, dict[str, Tensor | float]]:
    host = load_model(path)
    found = {}
    for split in splits:
        captions = [gallery.records[i]["caption"] for i in gallery.prompts[split]]
        made = [gallery.network(torch.cat(list(pictures(host, captions, args, s)))) for s in range(args.seeds)]
        found[split] = gallery.measure(split, *(torch.stack(part) for part in zip(*made, strict=True)))
    return found


def line(title: str, m: dict[str, Tensor | float]) -> str:
    first, five = (metrics.share(m[k]) for k in ("first", "first_five"))
    shown = (f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]" for i in (first, five))
    return f"{title:<26} {' '.join(f'{s:>22}' for s in shown)} {m['style']:>7.2f} {m['kid']:>8.0f} {m['nearest']:>9.3f}"


HEAD = f"{'':<26} {'recognised first':>22} {'in the first five':>22} {'style':>7} {'KID':>8} {'nearest':>9}"


def packed(folder: Path, denoiser: Path | None, target: Path) -> Path | None:
    if denoiser is None:
        return None
    try:
        pack.pack_model(folder, target, denoiser)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"--denoiser is {denoiser}, which is no teacher of the recipe ({error!s:.200})") from None
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=dataset.BUILD)
    parser.add_argument("--denoiser", type=Path, help="a teacher.safetensors (default: the embedded model)")
    parser.add_argument("--trace", action="store_true", help="measure each average that the training kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    args = parser.parse_args()
    gallery = Gallery(args.folder)
    counts = ", ".join(f"{len(rows)} {SPLITS[split]}" for split, rows in gallery.prompts.items())
    print(f"prompts: {counts}; {len(gallery.names)} real pictures; {args.steps} steps, guidance {args.guidance}")
    print(f"KID x 1000 to the split's real pictures; nearest: median cosine distance to a training picture\n{HEAD}")
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model.safetensors"
        if args.trace:
            trace(gallery, args, target)
            return
        found = measure(gallery, packed(args.folder, args.denoiser, target), args)
    for split, title in SPLITS.items():
        print(line(title, found[split]))
    for split, title in SPLITS.items():
        print(line(f"real pictures, {title}", gallery.real(split)))


def trace(gallery: Gallery, args, target: Path) -> None:
    """A line for each kept average of the narrower width; what is measured is kept beside them."""
    state, kept, _, _ = teacher.paths(args.folder)
    hours = {row["step"]: row["hours"] for row in read_progress(state)}
    for (step, std), path in averages.saved_files([kept], max(hours, default=0)).items():
        if std != averages.TRACKED[0] or step not in hours:
            continue
        note = path.with_suffix(".json")
        if not note.exists():
            weights = {k.removeprefix("unet."): v for k, v in averages.load_file(path).items() if k.startswith("unet.")}
            denoiser = target.with_name("denoiser.safetensors")
            save_file(weights, denoiser)
            pack.pack_model(args.folder, target, denoiser)
            found = measure(gallery, target, args, ("train", "combination"))
            plain = {s: {k: v.tolist() if isinstance(v, Tensor) else v for k, v in m.items()} for s, m in found.items()}
            note.write_text(json.dumps(plain))
        for split, m in json.loads(note.read_text()).items():
            outcomes = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in m.items()}
            print(line(f"{step:>6} {hours[step]:5.2f} h {SPLITS[split][:12]}", outcomes))


if __name__ == "__main__":
    main()
