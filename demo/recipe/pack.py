"""Pack autoencoder, text encoder and denoiser into one float16 checkpoint in the single-file layout.

    python -m turbodistill.demo.recipe.pack

Also packs the reference pictures that the metrics compare with, and the lists of prompts.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...core.naming import to_single_file
from .. import files
from . import autoencoder, dataset, teacher

REFERENCE = 400  # training pictures in the reference set, beside all held-out ones
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def autoencoder_name(name: str, levels: int) -> str:
    """The name that diffusers gives an autoencoder parameter -> the single-file one."""
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return name
    rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    rest = re.sub(r"^mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", rest)
    rest = rest.replace("mid_block.attentions.0", "mid.attn_1")
    if rest.startswith("mid.attn_1"):
        for ours, theirs in ATTENTION.items():
            rest = rest.replace(f".{ours}.", f".{theirs}.")
    rest = re.sub(r"^down_blocks\.(\d)\.resnets", r"down.\1.block", rest)
    rest = re.sub(r"^down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", rest)
    rest = re.sub(r"^up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", rest)
    rest = re.sub(r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", rest)
    return f"{side}.{rest}"


def autoencoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by diffusers' names -> by single-file names; attention becomes 1x1 convolutions."""
    levels = len(autoencoder.CONFIG["block_out_channels"])
    packed = {}
    for name, value in weights.items():
        target = autoencoder_name(name, levels)
        if ".attn_1." in target and value.ndim == 2:
            value = value[:, :, None, None]
        packed[target] = value
    return packed


def describe(scale: float, tokenizer: str, prediction: str) -> dict[str, str]:
    """The checkpoint's header: everything that is needed to build its networks, as JSON."""
    unet, vae = teacher.CONFIG, autoencoder.CONFIG
    model = {
        "unet": unet,
        "vae": {**vae, "scaling_factor": scale},
        "text_encoder": {"kind": "minilm", "tokenizer": json.loads(tokenizer)},
        "prediction": prediction,
        "schedule": {"kind": "scaled_linear", "start": 0.00085, "end": 0.012, "steps": 1000},
        "resolution": [64, 64],
    }
    return {
        files.HEADER: json.dumps(model),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "turbodistill-demo",
        "modelspec.title": "TurboDistill demo: emoji in three styles",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": prediction,
        "modelspec.license": "Apache-2.0; trained on Noto (Apache-2.0), Twemoji (CC-BY 4.0), Fluent (MIT)",
    }


def pack_model(folder: Path, target: Path, denoiser: Path | None = None) -> None:
    """Write one checkpoint of the three networks; `denoiser` is another file than the recipe's teacher."""
    denoiser = denoiser or folder / "teacher.safetensors"
    with safe_open(denoiser, "pt") as file:
        prediction = (file.metadata() or {}).get("prediction", "v")
    with safe_open(folder / "autoencoder.safetensors", "pt") as file:
        scale = float(file.metadata()["scale_factor"])
    with safe_open(folder / "text_encoder.safetensors", "pt") as file:
        tokenizer = file.metadata()["tokenizer"]
    unet = load_file(denoiser)
    names = to_single_file(unet)
    parts = {
        "model.diffusion_model.": {names[k]: v for k, v in unet.items()},
        "first_stage_model.": autoencoder_weights(load_file(folder / "autoencoder.safetensors")),
        "cond_stage_model.": load_file(folder / "text_encoder.safetensors"),
    }
    tensors = {p + k: v.half().contiguous() for p, weights in parts.items() for k, v in weights.items()}
    save_file(tensors, target, describe(scale, tokenizer, prediction))
    count = sum(v.numel() for v in tensors.values())
    print(f"{target}: {count / 1e6:.2f} M parameters, {target.stat().st_size / 1e6:.1f} MB")


def reference_rows(records: list[dict]) -> list[int]:
    """The reference's pictures: all held-out ones, the other styles of a combination's name, and some training ones."""
    held = [i for i, r in enumerate(records) if r["split"] != "train"]
    kin = {records[i]["name"] for i in held}
    seen = [i for i, r in enumerate(records) if r["split"] == "train"]
    beside = [i for i in seen if records[i]["name"] in kin]
    others = random.Random(0).sample([i for i in seen if records[i]["name"] not in kin], REFERENCE - len(beside))
    return held + sorted(beside + others)


def pack_reference(folder: Path, target: Path) -> None:
    """The reference's pictures as lossless WebP with a table of captions."""
    images, records = dataset.load(folder)
    chosen = reference_rows(records)
    table = []
    with zipfile.ZipFile(target, "w") as archive:
        for number, i in enumerate(chosen):
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(images[i].permute(1, 2, 0).numpy())).save(
                buffer, "webp", lossless=True, quality=100, method=6
            )
            name = f"{number:04d}.webp"
            archive.writestr(zipfile.ZipInfo(name), buffer.getvalue())
            row = {"file_name": name, "text": records[i]["caption"]}
            table.append(row | {key: records[i][key] for key in ("name", "style", "split")})
        lines = "".join(json.dumps(row) + "\n" for row in table)
        archive.writestr(zipfile.ZipInfo("metadata.jsonl"), lines, zipfile.ZIP_DEFLATED)
    print(f"{target}: {len(chosen)} pictures, {target.stat().st_size / 1e6:.1f} MB")


def pack_prompts(folder: Path, target: Path) -> None:
    """Captions of the training pictures that are not in the reference set, shuffled: the students' prompts.

    One line a name; of its styles one is drawn.
    """
    _, records = dataset.load(folder)
    reference = set(reference_rows(records))
    train = [r for i, r in enumerate(records) if r["split"] == "train" and i not in reference]
    random.Random(0).shuffle(train)
    styles: dict[str, list[str]] = {}
    for record in train:
        style = dataset.STYLES[record["style"]].removeprefix("in ").removesuffix(" style")
        styles.setdefault(record["caption"].replace(style, "STYLE"), []).append(style)
    lines = [
        caption.replace("STYLE", "{" + "|".join(drawn) + "}" if len(drawn) > 1 else drawn[0])
        for caption, drawn in styles.items()
    ]
    target.write_text("\n".join(lines) + "\n")
    print(f"{target}: {len(lines)} lines for {len(train)} prompts")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=dataset.BUILD)
    args = parser.parse_args()
    pack_model(args.folder, files.MODEL)
    pack_reference(args.folder, files.REFERENCE)
    pack_prompts(args.folder, files.PROMPTS)
