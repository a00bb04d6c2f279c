"""The memory that a training takes, simulated without a GPU, beside what is estimated before it starts.

    python benchmarks/simulated_memory.py                                     # a table
    python benchmarks/simulated_memory.py --model sdxl --size 1024 --rank 0 --checkpointing
    python benchmarks/simulated_memory.py --pixels                            # judged by pictures: ADD
    python benchmarks/simulated_memory.py --plans                             # what a card's memory is planned to be
    python benchmarks/simulated_memory.py --model sdxl --size 1024 --vram 12

The real update runs twice on tensors without numbers, and every storage that it makes counts as long as it lives. What
a GPU takes for itself comes on top: its context, about half a GB, and what its allocator cannot use.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import shapes
import torch
import turbodistill as td
from diffusers import AutoencoderKL
from live import Live
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import Dinov2Config, Dinov2Model
from turbodistill.core import eight_bits, vision
from turbodistill.core import student as student_of
from turbodistill.core.decoder import Decoder
from turbodistill.core.features import TeacherFeatures
from turbodistill.core.student import Student
from turbodistill.trainer.data.samples import Samples
from turbodistill.trainer.loop import batch, distill
from turbodistill.trainer.loop.feature_cache import FeatureCache
from turbodistill.trainer.loop.state import State
from turbodistill.trainer.run import memory as memory_of
from turbodistill.trainer.run.memory import Measured, Memory, measure
from turbodistill.trainer.run.plan import plan

GB = 1024**3
CPU = torch.device("cpu")
# Kind, pixels of a side, batch, rank (0: in full), checkpointing.
RANKS = {"sd15": 64, "sdxl": 64, "flux": 16}
TABLE = [
    *((kind, size, 1, rank, again) for kind, most in RANKS.items() for size in (512, 1024) for rank in (most, 0)
      for again in (False, True)),
    ("sd15", 512, 4, 64, False), ("sd15", 512, 4, 64, True), ("sdxl", 1024, 4, 64, False), ("sdxl", 1024, 4, 64, True),
]  # fmt: skip
# Kind, pixels of a side, batch, rank, checkpointing, pixels of a crop, share of the pixel discriminator.
PIXELS = [
    ("sd15", 256, 1, 64, False, 0, 1.0), ("sd15", 512, 1, 64, False, 0, 1.0), ("sd15", 512, 4, 64, True, 0, 1.0),
    ("sd15", 512, 1, 64, True, 256, 0.5), ("sdxl", 1024, 1, 64, True, 0, 1.0), ("sdxl", 1024, 4, 64, True, 512, 1.0),
    ("sdxl", 1024, 1, 64, True, 512, 0.5),
]  # fmt: skip
# Kind, pixels of a side, GB of the card.
PLANS = [
    ("sd15", 512, 6), ("sd15", 512, 8), ("sdxl", 1024, 8), ("sdxl", 1024, 12), ("sdxl", 1024, 16), ("sdxl", 1024, 24),
    ("flux", 1024, 16), ("flux", 1024, 24), ("flux", 1024, 48),
]  # fmt: skip
# Numbers of the weights of text encoders and autoencoder, in half precision: CLIP-L; that and bigG; that and T5-XXL.
BESIDE = {"sd15": (123e6, 84e6), "sdxl": (818e6, 84e6), "flux": (4885e6, 84e6)}


def without_numbers(mode: FakeTensorMode, value: Any) -> Any:
    """A tensor or condition of the same shape."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, batch.Some):
        return dataclasses.replace(value, rows=mode.from_tensor(value.rows))
    return value.map(mode.from_tensor) if isinstance(value, td.core.denoiser.Cond) else value


def in_float32(module: nn.Module) -> nn.Module:
    """`module.float()`, which tensors without numbers do not let torch do."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
    return module


def each_alone(keys: Tensor, make: Callable[[int], list[Tensor]]) -> list[Tensor]:
    """What a feature cache gives that keeps nothing."""
    return [torch.cat(maps) for maps in zip(*map(make, range(len(keys))), strict=True)]


def corner(x: Tensor, side: int, _view: Any = None) -> Tensor:
    """As large a crop as another."""
    return x[..., :side, :side] if side else x


@contextmanager
def simulated(mode: FakeTensorMode) -> Iterator[None]:
    """Within, batches are drawn with numbers and given without, and nothing asks a tensor for its number."""
    own = batch.draw_batch

    def draw(config: Any, student: Any, *data: Any, **more: Any) -> batch.Batch:
        with unset_fake_temporarily():
            stand_in = SimpleNamespace(schedule=student.schedule, device=CPU, start_timestep=student.start_timestep)
            pairs, reals, _draws, *fresh = data
            made = own(config, stand_in, pairs, reals, torch.Generator().manual_seed(0), *fresh, **more)
        fields = {f.name: without_numbers(mode, getattr(made, f.name)) for f in dataclasses.fields(made)}
        return dataclasses.replace(made, **fields)

    with ExitStack() as stack:
        for target, name, value in (
            (batch, "draw_batch", draw),
            (distill, "generator", lambda *_: None),
            # They take tensors of any class for quantised ones.
            (student_of, "check_copyable", lambda _: None),
            (eight_bits, "quantised", lambda weight: not weight.is_floating_point()),
            (nn.Module, "to", lambda module, *_, **__: module),
            (nn.Module, "float", in_float32),
            # Which picture it is, and where a crop lies, are numbers.
            (FeatureCache, "of", lambda _cache, keys, make, _device: each_alone(keys, make)),
            *((place, "cropped", corner) for place in (vision, memory_of)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


@contextmanager
def trained(kind: str, size: int, config: td.Config) -> Iterator[tuple[State, Samples, Iterator[Any]]]:
    """A state without numbers, a sample, and the updates of its training."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    pairs, uncond = shapes.pairs(kind, size), shapes.condition(kind, 1, size)
    with mode:
        network = shapes.network(kind, CPU, torch.bfloat16)
    denoiser = shapes.around(kind, network)  # its schedule has numbers
    with mode, simulated(mode):
        sample = dataclasses.replace(
            pairs, latents=without_numbers(mode, pairs.latents), cond=without_numbers(mode, pairs.cond)
        )
        with mock.patch.object(torch, "randint", lambda *_: 0):  # the seed of its beginning
            student = Student(denoiser, config.rank)
        state = State.create(student, config, sample, seen_by(mode, denoiser, config) if config.pixel_backbone else ())
        for critic in state.critics:
            critic.discriminator._calibrated = True
        updates = distill.distill_groups(state, [batch.Group(pairs, uncond)])
        try:
            yield state, sample, updates
        finally:
            updates.close()
            state.release()


def peak(kind: str, size: int, config: td.Config) -> tuple[int, Measured]:
    """Bytes at the most in two updates, and what was measured before them."""
    packs = eight_bits.in_eight_bits if config.base_precision == "int8" else nullcontext
    with trained(kind, size, config) as (state, sample, updates):
        measured = measure(state, sample, (size, size), tuple(round(2 * n) for n in BESIDE.get(kind, (0, 0))))
        network = state.student.teacher.backbone
        with packs(network):
            modules = [network, state.student.trained, state.average]
            modules += [m for c in state.critics for m in (c.discriminator, *c.features.networks)]
            live = Live(t for module in modules for t in (*module.parameters(), *module.buffers()))
            with live:
                for _ in range(2):
                    next(updates)
            updates.close()
    return live.most, measured


def settings(rank: int, batch_size: int, **changes: Any) -> td.Config:
    """Every part of the default losses, from the first update on."""
    return td.Config(
        rank=rank, batch_size=batch_size, precision="bfloat16", updates=100, regression_updates=0,
        discriminator_warmup=0, adversarial_ramp=0, log_every=100, **changes,
    )  # fmt: skip


def update_of(memory: Memory) -> int:
    """What is estimated of an update, with nothing beside it and no preview."""
    return memory.weights + memory.seeing + memory.trained + memory.activations


def seen_by(mode: FakeTensorMode, denoiser: Any, config: td.Config) -> list[Any]:
    """What the discriminators see: a DINOv2 small of 224 pixels, behind Stable Diffusion's autoencoder in bfloat16."""
    with unset_fake_temporarily():  # their beginning looks at numbers
        vae = AutoencoderKL(**shapes.VAE).bfloat16()
        network = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6))
    vae.encoder = vae.quant_conv = None
    for part in (*vae.modules(), *network.modules()):
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()), False)
    decoder = Decoder(8, lambda: vae, lambda vae, z: vae.decode(z.to(torch.bfloat16), return_dict=False)[0])
    own = {"crop": config.pixel_crop, "again": config.gradient_checkpointing}
    pixels = vision.VisionFeatures(vision.Eye(network, 14), decoder, 224, **own)
    return [pixels] if config.pixel_share == 1 else [TeacherFeatures(denoiser), pixels]


def compare(
    kind: str, size: int, count: int, rank: int, checkpointing: bool, crop: int | None = None, share: float = 1.0
) -> None:
    """A row of the table; with a `crop`, which may be 0, of a training that is judged by pictures."""
    seen = {} if crop is None else {"pixel_backbone": "embedded", "pixel_crop": crop, "pixel_share": share}
    config = settings(rank, count, gradient_checkpointing=checkpointing, **seen)
    most, measured = peak(kind, size, config)
    memory = measured.memory(config)
    told = update_of(memory)
    form = f"LoRA {rank}" if rank else "full"
    name = f"{kind} {size} px, batch {count}, {form}{', checkpointing' if checkpointing else ''}"
    rest = f"{memory.decoding / GB:.2f} GB"
    name += "" if crop is None else f", {'pictures' if share == 1 else 'both'}{f' of {crop} px' if crop else ''}"
    print(f"{name:<60}{most / GB:>7.2f} GB{told / GB:>7.2f} GB{told / most - 1:>+7.1%}    {rest}", flush=True)


def show_plan(kind: str, size: int, card: float, rank: int, batch_size: int) -> None:
    """The plan for a card, and the simulated peak of what it chose."""
    config = settings(rank, batch_size)
    with trained(kind, size, config) as (state, sample, _):
        measured = measure(state, sample, (size, size), tuple(round(2 * n) for n in BESIDE.get(kind, (0, 0))))
    found = plan(measured, config, int(card * GB), {"rank"}, eight_bit_moments=True)
    print(f"{kind} {size} px, {f'LoRA {rank}' if rank else 'full'}, batch {batch_size}, a card of {card:g} GB")
    print(found.in_words(), flush=True)
    if found.config.optimizer == "adamw":
        again = min(found.config.gradient_accumulation, 2)  # further batches are as the second
        most, _ = peak(kind, size, found.config.replace(gradient_accumulation=again))
        told = update_of(found.memory)
        print(
            f"  an update: simulated {most / GB:.2f} GB, planned {told / GB:.2f} GB, {told / most - 1:+.1%}", flush=True
        )
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(shapes.SHAPES), help="one training in place of the table")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA; 0 trains in full")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--vram", type=float, help="GB of a card to plan for, in place of a row")
    parser.add_argument("--pixels", action="store_true", help="trainings that are judged by pictures")
    parser.add_argument("--plans", action="store_true", help="plans for several cards, in place of the table")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    if args.plans:
        for kind, size, card in PLANS:
            show_plan(kind, size, card, RANKS[kind], 16)
    elif args.vram:
        show_plan(args.model, args.size, args.vram, args.rank, args.batch_size)
    else:
        one = (args.model, args.size, args.batch_size, args.rank, args.checkpointing)
        print(f"{'':<60}{'simulated':>10}{'estimated':>10}{'off':>7}    a preview besides")
        for row in [one] if args.model else PIXELS if args.pixels else TABLE:
            compare(*row)


if __name__ == "__main__":
    main()
