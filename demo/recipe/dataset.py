"""Build the three-style emoji set with captions from the npm packages that hold the pictures.

    python -m turbodistill.demo.recipe.dataset

Writes `dataset.safetensors` into the recipe's folder (in the user's cache; `--folder` for
another): `images` uint8 (N, 3, 64, 64) RGB on white, and in its header the list of
`{name, caption, style, split, keywords}`. Flags and skin tones are left out.

Two splits are never trained on. `heldout` is five per cent of the names, in all their styles.
`combination` is one of the three styles of a tenth of the other names: a known thing in a style in
which it was never shown. Hashes of the names choose both, so that the choice never moves.

    python -m turbodistill.demo.recipe.dataset --pictures pictures/

writes the training pictures as a captioned folder instead, as `turbodistill distill --images` takes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

SIZE = 64
BUILD = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "turbodistill" / "recipe"
PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "keywords": "@emoji-mart/data@1.2.1",
}
STYLES = {
    "noto": "in flat noto style",
    "twemoji": "in flat twemoji style",
    "fluent": "in glossy 3d fluent style",
}
LEFT_OUT = ("Flags", "Component")


def fetch(package: str, folder: Path) -> Path:
    """Download one npm package with the `npm` client and unpack it; returns its root."""
    target = folder / package.replace("/", "-").replace("@", "")
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=True
        )
        with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as archive:
            archive.extractall(target, filter="data")
    return target / "package"


def on_white(path: Path) -> np.ndarray:
    """RGBA picture -> uint8 (3, 64, 64) composited on white."""
    picture = Image.open(path).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB")).transpose(2, 0, 1)


def split_of(name: str, style: str) -> str:
    """`train`, `heldout` or `combination`."""
    digest = hashlib.sha256(name.encode()).digest()
    if digest[0] < 13:
        return "heldout"
    return "combination" if digest[1] < 26 and list(STYLES)[digest[2] % len(STYLES)] == style else "train"


def bare(code: str) -> str:
    """An emoji's code points without the presentation selector, which the sets write differently."""
    return code.lower().replace("-fe0f", "")


def keywords(root: Path) -> dict[str, list[str]]:
    """Code points -> everyday words for the emoji (emoji-mart)."""
    sets = json.loads((root / "sets" / "15" / "native.json").read_text())
    return {bare(e["skins"][0]["unified"]): e["keywords"] for e in sets["emojis"].values()}


def build(folder: Path = BUILD) -> Path:
    """Render every emoji of the packages and write pictures with their records; returns the file."""
    roots = {key: fetch(package, folder / "packages") for key, package in PACKAGES.items()}
    words = keywords(roots["keywords"])
    fluent = {bare(p.stem): p for p in (roots["fluent"] / "assets").glob("*.webp")}
    images, records = [], []
    entries = json.loads((roots["noto"] / "emoji.json").read_text())
    for entry in tqdm(entries, desc="pictures", unit="emoji"):
        if entry["category"] in LEFT_OUT:
            continue
        code = bare(entry["unified"])
        paths = {
            "noto": roots["noto"] / "img" / "google" / "64" / entry["image"],
            "twemoji": roots["twemoji"] / "img" / "twitter" / "64" / entry["image"],
            "fluent": fluent.get(code),
        }
        name = entry["name"].lower()
        for style, path in paths.items():
            if path is None or not path.exists():
                continue
            images.append(on_white(path))
            records.append(
                {
                    "name": name,
                    "caption": f"{name}, {entry['subcategory']}, {STYLES[style]}",
                    "style": style,
                    "split": split_of(name, style),
                    "keywords": words.get(code, []),
                }
            )
    path = folder / "dataset.safetensors"
    stacked = torch.from_numpy(np.stack(images)).contiguous()
    save_file({"images": stacked}, path, metadata={"records": json.dumps(records)})
    counts = ", ".join(f"{n} {split}" for split, n in sorted(Counter(r["split"] for r in records).items()))
    print(f"{len(records)} pictures of {len({r['name'] for r in records})} names ({counts}): {path}")
    return path


def load(folder: Path = BUILD) -> tuple[torch.Tensor, list[dict]]:
    """Images uint8 (N, 3, 64, 64) and their N records, as `build` wrote them."""
    from safetensors import safe_open

    with safe_open(folder / "dataset.safetensors", "pt") as file:
        return file.get_tensor("images"), json.loads(file.metadata()["records"])


def export(folder: Path, pictures: Path) -> None:
    """Write the training pictures as PNG files with a `metadata.jsonl` of their captions."""
    images, records = load(folder)
    pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (image, record) in enumerate(zip(tqdm(images, desc="pictures"), records, strict=True)):
        if record["split"] == "train":
            rows.append({"file_name": f"{i:05d}.png", "text": record["caption"]})
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(pictures / rows[-1]["file_name"])
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUILD)
    parser.add_argument("--pictures", type=Path, help="write the training pictures here, for a distillation")
    args = parser.parse_args()
    export(args.folder, args.pictures) if args.pictures else build(args.folder)
