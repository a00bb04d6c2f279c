"""What an update costs beside the passes that it is made of, and beside a trainer that holds three copies of the model.

    python benchmarks/training_step.py --model embedded --batch-size 16
    python benchmarks/training_step.py --model sd15 --size 128 --batch-size 1      # Stable Diffusion's shape, random

The last lines train by distribution matching: ours with LoRAs on one copy of the weights, and three networks in full,
teacher, student and fake score, as FastGen and DMD2 have them, by the same losses on the same batches.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import psutil
import shapes
import torch
import turbodistill as td
from step_cost import GB, Cost, measure, peak, restart_peak, seconds
from turbodistill.core import losses
from turbodistill.core.denoiser import Cond, Denoiser
from turbodistill.core.student import Student
from turbodistill.trainer.data.samples import Samples
from turbodistill.trainer.loop.batch import draw_batch, generator
from turbodistill.trainer.loop.distill import distill
from turbodistill.trainer.loop.precision import autocast
from turbodistill.trainer.loop.state import State

MATCHING = {"distillation": "matching", "distillation_weight": 1.0, "adversarial_weight": 0.0, "regression_weight": 0.0}


def of_model(name: str, size: int, device: torch.device) -> tuple[Denoiser, Samples, Cond, tuple[int, int]]:
    """A denoiser with pairs of random latents, the empty text, and the pixels of a picture."""
    if name != "embedded":
        return (
            shapes.denoiser(name, device),
            shapes.pairs(name, size),
            shapes.condition(name, 1, size),
            (size, size),
        )
    host = td.load_model(device=str(device))
    prompts = [f"a fox {i}" for i in range(shapes.PAIRS)]
    latents = torch.randn(shapes.PAIRS, *host.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = host.encode_text(prompts).to("cpu")
    return host.denoiser, Samples(latents, cond, prompts, torch.arange(shapes.PAIRS)), host.encode_text([""]), (64, 64)


def ours(denoiser: Denoiser, config: td.Config, pairs: Samples, uncond: Cond, repeats: int) -> tuple[list[float], int]:
    """Seconds of updates of distribution matching by LoRAs, and bytes at the most."""
    restart_peak()
    state = State.create(Student(denoiser, config.rank), config, pairs)
    updates = distill(state, pairs, uncond)
    next(updates)
    times = [seconds(lambda: next(updates)) for _ in range(repeats)]
    updates.close()
    state.release()
    return times, peak()


def three_copies(
    denoiser: Denoiser, config: td.Config, pairs: Samples, uncond: Cond, repeats: int
) -> tuple[list[float], int]:
    """The same with a copy of the network for each role, the student's and the fake score's trained in full."""
    restart_peak()
    made = [denoiser.with_backbone(copy.deepcopy(denoiser.backbone).requires_grad_(True)) for _ in range(2)]
    networks = [made[0].backbone, made[1].backbone]
    optimizers = [torch.optim.AdamW(n.parameters(), lr=1e-6, fused=True) for n in networks]
    student, fake = made
    plain = Student(denoiser, 1)  # for its schedule and start alone
    uncond = uncond.to(denoiser.device)

    def update(number: int) -> None:
        draws = generator(0, number)
        batch = draw_batch(config, plain, pairs, None, draws, 1.0)
        with autocast(config, denoiser, *made):
            output = student(batch.x, batch.sigma, batch.cond)
            noisy = denoiser.schedule.add_noise(output.detach(), batch.distill_noise, batch.distill_sigma)
            target = losses.matching_target(
                denoiser, fake, noisy, output.detach(), batch.distill_sigma, batch.cond, uncond,
                config.distillation_guidance,
            )  # fmt: skip
            losses.distillation(output, target.float(), torch.ones_like(batch.sigma)).backward()
            loss = losses.denoising(fake, output.detach(), batch.noise, batch.renoise, batch.cond)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    update(0)
    times = [seconds(lambda: update(1)) for _ in range(repeats)]
    plain.release()
    return times, peak()


def lacking(denoiser: Denoiser) -> float:
    """GB that three copies in full take, two with gradients and Adam's moments, where this machine has less; or 0."""
    needed = 4 * (1 + 2 * 4) * sum(p.numel() for p in denoiser.backbone.parameters())
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return needed / GB if needed > free else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("embedded", *shapes.SHAPES), default="embedded")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side (the embedded model's are 64)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser, pairs, uncond, resolution = of_model(args.model, args.size, device)
    common = {
        "rank": args.rank, "batch_size": args.batch_size, "precision": args.precision, "updates": 10**6,
        "gradient_checkpointing": args.checkpointing, "regression_updates": 0, "discriminator_warmup": 0,
        "adversarial_ramp": 0,
    }  # fmt: skip
    cost: Cost = measure(denoiser, td.Config(**common), pairs, uncond, resolution, args.repeats)
    print(f"{args.model}, {resolution[0]} px, batch {args.batch_size}, rank {args.rank}, {device}", flush=True)
    print("\n".join(cost.lines()), flush=True)
    if needed := lacking(denoiser):
        print(f"distribution matching with three copies in full takes {needed:.0f} GB: not compared on this machine")
        return
    matching = td.Config(**common | MATCHING)
    (mine, least), (theirs, most) = (
        way(denoiser, matching, pairs, uncond, args.repeats) for way in (ours, three_copies)
    )
    ratios = sorted(a / b for a, b in zip(mine, theirs, strict=True))
    print(
        f"distribution matching: LoRAs on one copy {statistics.median(mine):.3f} s, {least / GB:.2f} GB; three copies "
        f"in full {statistics.median(theirs):.3f} s, {most / GB:.2f} GB: {statistics.median(ratios):.2f} of the time "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}), {least / most:.2f} of the memory"
    )


if __name__ == "__main__":
    main()
