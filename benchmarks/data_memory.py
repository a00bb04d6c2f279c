"""How much of the computer's memory many teacher pairs take while they are made, loaded and trained on.

    python benchmarks/data_memory.py                               # 20,000 prompts, 8,192 pairs of SDXL's shape
    python benchmarks/data_memory.py --prompts 100 --pairs 256

Latents (4 x 128 x 128) and conditioning (77 x 2048 token states, 1280 pooled) are random numbers in the shapes of
SDXL, the network is one convolution, so that nothing but the data takes memory. Printed is the largest RssAnon (the
memory that cannot be given back) of each phase, beyond that of the process before any pair was made.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from turbodistill.core.denoiser import Cond, Denoiser
from turbodistill.core.schedule import DiscreteSchedule
from turbodistill.trainer.config import Config
from turbodistill.trainer.data.pairs import load_pairs, make_pairs
from turbodistill.trainer.loop.batch import draw_batch, generator
from turbodistill.trainer.run.run import split

TOKENS, STATES, POOLED = 77, 2048, 1280


class Network(Denoiser):
    prediction = "eps"

    def __init__(self):
        self.backbone, self.schedule = nn.Conv2d(4, 4, 1), DiscreteSchedule()

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self.backbone(x) * 0.01


class SDXLShaped:
    """A model of SDXL's shapes without its weights."""

    name, architecture, base_hash, text_hash = "shape", "stable-diffusion-xl-v1-base", "0" * 16, ""
    clip_skip, sampling = 0, None
    latent_shape, resolution = (4, 128, 128), (1024, 1024)

    def __init__(self):
        self.denoiser = Network()

    def encode_text(self, prompts: list[str]) -> Cond:
        draws = torch.Generator().manual_seed(len(prompts[0]))
        count = len(prompts)
        return Cond(
            torch.randn(count, TOKENS, STATES, generator=draws), torch.randn(count, POOLED, generator=draws), {}
        )


def anonymous() -> int:
    """This process's RssAnon in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def watched(phase: str, before: int) -> Iterator[None]:
    """Print the largest RssAnon within, beyond `before`."""
    most, over, began = [0], threading.Event(), time.monotonic()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    most[0] = max(most[0], anonymous())
    print(f"{phase:<24}{(most[0] - before) / 2**20:8.0f} MiB {time.monotonic() - began:8.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=8192)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    host = SDXLShaped()
    config = Config(pairs=args.pairs, pair_steps=1, pair_sampler="euler", guidance=1.0, batch_size=args.batch_size)
    prompts = [f"prompt {i}" for i in range(args.prompts)]
    with tempfile.TemporaryDirectory() as folder:
        for _ in make_pairs(host, config.replace(pairs=args.batch_size), prompts, Path(folder) / "first"):
            pass  # the libraries' own memory comes before
        before = anonymous()
        print(f"{args.pairs} pairs, {args.prompts} prompts; RssAnon beyond the {before / 2**20:.0f} MiB before")
        with watched("pairs made", before):
            for _ in make_pairs(host, config, prompts, Path(folder) / "pairs"):
                pass
        size = sum(path.stat().st_size for path in (Path(folder) / "pairs").iterdir())
        with watched("pairs loaded", before):
            pairs = load_pairs(Path(folder) / "pairs")
        with watched("batches drawn", before):
            train, held = split(pairs)
            train, held = pairs.select(train), pairs.select(held)
            about = {"schedule": host.denoiser.schedule, "device": torch.device("cpu"), "start_timestep": 999}
            student: Any = SimpleNamespace(**about)
            for update in range(args.updates):
                draw_batch(config, student, train, None, generator(0, update))
            held.latents[:]
        print(f"on disk {size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
