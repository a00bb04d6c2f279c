"""Frames between pictures: ours, beside a cross-fade, the latents' line, and frames that do not know of each other.

    python benchmarks/frames.py                  # 20 pairs of the embedded model's pictures; a drawn clip
    python benchmarks/frames.py --strip docs/frames.webp

Pairs are one-step pictures of two prompts of held-out names. Flicker is the mean second difference of pixels x 1000;
sharpness the power in high frequencies of the middle third over that of the ends; KID x 1000 of the middle frames to
real pictures. The clip is a drawn shape that moves and turns, of which every fourth frame is given: error is the mean
difference from the frames that were left out, x 1000.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from turbodistill.core.interpolate import lerp
from turbodistill.demo.files import REFERENCE, STUDENT
from turbodistill.generate.few_step import few_step_model, open_file
from turbodistill.generate.frames import Motion, interpolate, shots_between
from turbodistill.generate.stream import Shot, Stream
from turbodistill.measure.evaluate import Evaluator, load_reference
from turbodistill.measure.temporal import temporal
from turbodistill.trainer.pipeline.load import load_model
from turbodistill.trainer.run.scores import kernel_distance

BETWEEN = 9
CLIP = 41  # frames of the drawn clip, of which every fourth is given
Made = Callable[[Stream, Tensor, Tensor, int, tuple[str, str]], Tensor]


def ours(stream: Stream, first: Tensor, second: Tensor, between: int, prompts: tuple[str, str]) -> Tensor:
    return torch.stack(list(interpolate(stream, [first, second], between, prompts)))


def cross_fade(_stream: Stream, first: Tensor, second: Tensor, between: int, _prompts: tuple[str, str]) -> Tensor:
    return torch.stack([lerp(first, second, i / (between + 1)) for i in range(between + 2)])


def latent_line(stream: Stream, first: Tensor, second: Tensor, between: int, _prompts: tuple[str, str]) -> Tensor:
    ends = [stream.encode(picture) for picture in (first, second)]
    line = torch.stack([lerp(*ends, i / (between + 1)) for i in range(1, between + 1)])
    return torch.cat([first[None], stream.host.decode(line).cpu(), second[None]])


def independent(stream: Stream, first: Tensor, second: Tensor, between: int, prompts: tuple[str, str]) -> Tensor:
    shots = shots_between(stream, first, second, between, prompts, Motion())
    apart = [replace(shot, seed=1000 + 2 * k, angle=0.0) for k, shot in enumerate(shots)]
    return torch.cat([first[None], stream.make(apart).pictures, second[None]])


METHODS: dict[str, Made] = {
    "cross-fade": cross_fade,
    "line of latents": latent_line,
    "frames by themselves": independent,
    "turbodistill frames": ours,
}


def drawn_clip() -> Tensor:
    """A square that moves and turns before a circle, (CLIP, 3, 64, 64)."""
    frames = []
    for k in range(CLIP):
        image = Image.new("RGB", (256, 256), "white")
        draw = ImageDraw.Draw(image)
        draw.ellipse((140, 120, 230, 210), fill=(70, 130, 220))
        x, angle = 50 + 130 * k / (CLIP - 1), 1.6 * k / (CLIP - 1)
        corners = [(math.cos(angle + q * math.pi / 2), math.sin(angle + q * math.pi / 2)) for q in range(4)]
        draw.polygon([(x + 46 * c, 100 + 46 * s) for c, s in corners], fill=(220, 90, 60))
        small = image.resize((64, 64), Image.Resampling.LANCZOS)
        frames.append(torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255)
    return torch.stack(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--strip", type=Path, help="also write a film strip of the first pair, a row a method")
    args = parser.parse_args()
    host = load_model()
    model, _ = few_step_model(host, open_file(STUDENT))
    evaluator = Evaluator(load_reference(REFERENCE))
    prompts = evaluator.real.captions[: 2 * args.pairs]
    real, _ = evaluator.of_real
    clip = drawn_clip()
    strip = []
    print(f"{args.pairs} pairs, {BETWEEN} frames between; mean over pairs")
    heads = ("flicker", "of features", "sharpness", "KID", "ends", "ms a frame", "error of the clip")
    print(f"{'':<22}" + "".join(f"{head:>18}" for head in heads))
    with model.merged():
        stream = Stream(host, model)
        pictures = stream.make([Shot(prompt, seed=k) for k, prompt in enumerate(prompts)]).pictures
        for name, make in METHODS.items():
            rows, middles, seconds = [], [], 0.0
            for k in range(args.pairs):
                first, second = pictures[2 * k], pictures[2 * k + 1]
                began = time.perf_counter()
                frames = make(stream, first, second, BETWEEN, (prompts[2 * k], prompts[2 * k + 1]))
                seconds += time.perf_counter() - began
                rows.append(temporal(frames, evaluator.network(frames)[0], first, second))
                middles.append(frames[BETWEEN // 2 : BETWEEN // 2 + 3])
                if k == 0:
                    strip.append(frames)
            kid = 1000 * kernel_distance(evaluator.network(torch.cat(middles))[0], real)
            means = [
                float(np.mean([getattr(row, field) for row in rows]))
                for field in ("flicker", "feature_flicker", "sharpness", "ends")
            ]
            values = (*means[:3], kid, means[3], 1000 * seconds / args.pairs / BETWEEN, error(stream, make, clip))
            print(f"{name:<22}" + "".join(f"{value:>18.2f}" for value in values), flush=True)
    if args.strip:
        write_strip(args.strip, strip)


def error(stream: Stream, make: Made, clip: Tensor) -> float:
    """The mean difference of what is made from every fourth frame of the clip to those left out, x 1000."""
    apart = [
        (make(stream, clip[k], clip[k + 4], 3, ("", ""))[1:-1] - clip[k + 1 : k + 4]).abs().mean()
        for k in range(0, CLIP - 4, 4)
    ]
    return 1000 * float(torch.stack(apart).mean())


def write_strip(path: Path, rows: list[Tensor]) -> None:
    """The films below each other, frame by frame to the right."""
    whole = torch.cat([torch.cat(list(frames), -1) for frames in rows], -2)
    pixels = whole.mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, quality=90)
    print(f"{path}: {', '.join(METHODS)}, from the top")


if __name__ == "__main__":
    main()
