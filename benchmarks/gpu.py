"""What TurboDistill does on a GPU, as one table.

    python benchmarks/gpu.py                  # whatever is missing; or --part tests, sd15, sdxl, sample, compile

Each part takes less than eight minutes on a data centre's card. Every figure is written into `--out` as soon as it is
there, and what is there is not measured again. Networks have Stable Diffusion's shapes and random weights, in bfloat16.
Needs torch, diffusers, transformers and safetensors. `--dry-run` does the same with tiny networks on any machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import shapes
import torch
import turbodistill as td
from step_cost import measure, restart_peak, seconds
from training_step import MATCHING, ours, three_copies
from turbodistill.core.sampling import sample_one_step, trailing_sigmas
from turbodistill.trainer.data.files import write_whole
from turbodistill.trainer.run.memory import is_out_of_memory

CLONE = Path(__file__).parents[1]
QUICK = {"updates": 10**6, "regression_updates": 0, "discriminator_warmup": 0, "adversarial_ramp": 0}
Figures = dict[str, Any]
Measure = Callable[[], Figures]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tests(_dry: bool) -> Iterator[tuple[str, Measure]]:
    """The tests that are marked for a GPU."""

    def run() -> Figures:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
        done = subprocess.run(command, cwd=CLONE, capture_output=True, text=True, timeout=480)
        return {"exit": done.returncode, "said": (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]}

    yield "tests marked gpu", run


def trainings(kind: str, sizes: tuple[int, ...], dry: bool) -> Iterator[tuple[str, Measure]]:
    """Updates at each size and batch, as a LoRA and in full, with activations kept or computed again."""
    kind, sizes = ({"sd15": "small", "sdxl": "small-xl"}[kind], (64,)) if dry else (kind, sizes)

    def training(size: int, batch: int, rank: int, checkpointing: bool) -> Measure:
        def run() -> Figures:
            network = shapes.denoiser(kind, device(), torch.bfloat16)
            config = td.Config(
                rank=rank, batch_size=batch, gradient_checkpointing=checkpointing, precision="bfloat16", **QUICK
            )
            pairs, uncond = shapes.pairs(kind, size), shapes.condition(kind, 1, size)
            return measure(network, config, pairs, uncond, (size, size), 2 if dry else 5).row()

        return run

    batches, ways = ((1,), (True,)) if dry else ((1, 4), (True, False))
    for size, batch, rank, checkpointing in product(sizes, batches, (64, 0), ways):
        form = f"LoRA {rank}" if rank else "full"
        name = f"{kind} {size} px, batch {batch}, {form}{', checkpointing' if checkpointing else ''}"
        yield name, training(size, batch, rank, checkpointing)

    def copies() -> Figures:
        network = shapes.denoiser(kind, device())
        config = td.Config(rank=64, batch_size=1, precision="bfloat16", **QUICK | MATCHING)
        given = network, config, shapes.pairs(kind, sizes[0]), shapes.condition(kind, 1, sizes[0]), 2 if dry else 5
        (mine, least), (theirs, most) = ours(*given), three_copies(*given)
        return {
            "s/update": statistics.median(mine), "of three copies' time": statistics.median(mine) /
            statistics.median(theirs), "of their memory": least / most,
        }  # fmt: skip

    yield f"{kind} {sizes[0]} px, batch 1, matching against three copies in full", copies


def samples(dry: bool) -> Iterator[tuple[str, Measure]]:
    """One-step pictures: the network, the autoencoder, both; and diffusers' own pipeline with SD-Turbo's settings."""
    dtype = torch.bfloat16

    def picture(kind: str, size: int, compiled: bool) -> Measure:
        def run() -> Figures:
            network = shapes.denoiser(kind, device(), dtype)
            vae = shapes.autoencoder(kind, device(), dtype)
            if compiled:
                network.backbone.compile(mode="max-autotune-no-cudagraphs" if dry else "reduce-overhead")
                vae.decoder.compile()
            cond = shapes.condition(kind, 1, size).to(device())
            side = size // shapes.FACTOR
            sigmas = trailing_sigmas(network.schedule, 1).to(device())
            noise = torch.randn(1, shapes.CHANNELS, side, side, device=device()) * sigmas[0]

            def latents() -> torch.Tensor:
                return sample_one_step(lambda x, sigma: network(x, sigma, cond), noise, sigmas)

            def decode(x: torch.Tensor) -> torch.Tensor:
                return vae.decode(x.to(dtype)).sample

            with torch.no_grad():
                made = latents()
                times = {
                    "network ms": lambda: latents(), "decode ms": lambda: decode(made),
                    "whole ms": lambda: decode(latents()),
                }  # fmt: skip
                found = {}
                for name, work in times.items():
                    for _ in range(3):
                        seconds(work)
                    found[name] = 1000 * statistics.median(seconds(work) for _ in range(3 if dry else 20))
            return found | {"pictures/s": 1000 / found["whole ms"]}

        return run

    def plain(kind: str, size: int) -> Measure:
        def run() -> Figures:
            import diffusers

            library: Any = diffusers
            scheduler = library.EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
            )
            network, cond = shapes.denoiser(kind, device(), dtype).backbone, shapes.condition(kind, 1, size)
            parts = {"unet": network, "vae": shapes.autoencoder(kind, device(), dtype), "scheduler": scheduler}
            parts |= {"text_encoder": None, "tokenizer": None}
            if cond.pooled is None:
                more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
                pipe, texts = library.StableDiffusionPipeline(**parts, **more), {}
            else:
                pipe = library.StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
                texts = {"pooled_prompt_embeds": cond.pooled.to(device(), dtype)}
            pipe.set_progress_bar_config(disable=True)
            texts["prompt_embeds"] = cond.context.to(device(), dtype)
            told = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": size, "width": size, "output_type": "pt"}
            times = [seconds(lambda: pipe(**texts, **told)) for _ in range(6 if dry else 23)]
            whole = 1000 * statistics.median(times[3:])
            return {"whole ms": whole, "pictures/s": 1000 / whole}

        return run

    kinds = ("small",) if dry else ("sd15", "sdxl")
    for kind, size, compiled in product(kinds, (64,) if dry else (512, 1024), (False,) if dry else (False, True)):
        yield f"{kind} {size} px, one step{', compiled' if compiled else ''}", picture(kind, size, compiled)
        if not compiled:
            yield f"{kind} {size} px, one step, diffusers' pipeline", plain(kind, size)


PARTS: dict[str, Callable[[bool], Iterator[tuple[str, Measure]]]] = {
    "tests": tests,
    "sd15": lambda dry: trainings("sd15", (512,), dry),
    "sdxl": lambda dry: trainings("sdxl", (1024,), dry),
    "sample": samples,
}


def table(found: dict[str, Figures]) -> str:
    """The figures, a line each."""
    lines = []
    for name, figures in found.items():
        told = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        lines.append(f"{name:<60} {told}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), help="one part (default: all)")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the figures are kept")
    parser.add_argument("--dry-run", action="store_true", help="tiny networks, on whatever there is")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        parser.error("torch finds no GPU here: --dry-run shows that the benchmark runs")
    found: dict[str, Figures] = json.loads(args.out.read_text()) if args.out.exists() else {}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    found.setdefault("machine", {"card": card, "torch": torch.__version__})
    for name, part in PARTS.items():
        if args.part not in (None, name):
            continue
        for what, run in part(args.dry_run):
            if what in found:
                continue
            restart_peak()
            try:
                found[what] = run()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                found[what] = {"peak GB": "more than there are"}
            write_whole(args.out, json.dumps(found, indent=1).encode())
            print(table({what: found[what]}), flush=True)
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
