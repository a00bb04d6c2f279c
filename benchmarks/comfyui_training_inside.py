"""The part of `comfyui_training.py` that ComfyUI's own Python runs."""

import ctypes
import gc
import importlib.util
import statistics
import sys
import time
from pathlib import Path

comfyui, clone, checkpoint, *numbers, precision = sys.argv[1:]
size, batch, rank, repeats, checkpointing = map(int, numbers)
sys.argv = sys.argv[:1]  # ComfyUI reads it
sys.path.insert(0, comfyui)

import torch  # noqa: E402

if not torch.cuda.is_available():
    import comfy.cli_args

    comfy.cli_args.args.cpu = True

import comfy.sd  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "turbodistill", f"{clone}/__init__.py", submodule_search_locations=[clone]
)
sys.modules["turbodistill"] = importlib.util.module_from_spec(spec)

from turbodistill.core.denoiser import Guidance, guided  # noqa: E402
from turbodistill.core.student import Student  # noqa: E402
from turbodistill.nodes.host.denoiser import ModelDenoiser, conditions  # noqa: E402
from turbodistill.nodes.host.training import trainable  # noqa: E402
from turbodistill.trainer.config import Config  # noqa: E402
from turbodistill.trainer.data.samples import Samples  # noqa: E402
from turbodistill.trainer.loop.distill import distill  # noqa: E402
from turbodistill.trainer.loop.precision import autocast  # noqa: E402
from turbodistill.trainer.loop.state import State  # noqa: E402
from turbodistill.trainer.run.memory import measure_memory  # noqa: E402

GB = 1024**3
CUDA = torch.cuda.is_available()


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def restart_peak() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept is no need of what comes
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes at the most since `restart_peak`: on the accelerator, else of this process (Linux)."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def seconds(work) -> float:
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


with torch.inference_mode():  # as nodes run
    model, *_ = comfy.sd.load_checkpoint_guess_config(checkpoint, output_vae=False, output_clip=False)

with torch.inference_mode(), trainable(model):
    denoiser = ModelDenoiser(model)
    device = denoiser.device
    config = Config(
        rank=rank, batch=batch, checkpointing=bool(checkpointing), precision=precision, updates=10**6,
        warmup=0, ramp=0, distillation_weight=1.0, select_every=0,
    )  # fmt: skip
    channels = model.get_model_object("latent_format").latent_channels
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(8, channels, size // 8, size // 8, generator=draws)
    width = model.model.model_config.unet_config["context_dim"]
    pooled = {"pooled_output": torch.randn(1, 1280, generator=draws)}
    cond = conditions(model, [[torch.randn(1, 77, width, generator=draws), pooled]], latents)
    pairs = Samples(latents, cond, ["a prompt"] * 8, torch.arange(8))
    uncond = cond.rows(slice(1)).to(device)
    one = cond.rows(slice(batch)).to(device)
    x = latents[:batch].to(device)
    sigma = denoiser.schedule.sigma(torch.full((batch,), 500.0)).to(device)
    weights = sum(p.numel() * p.element_size() for p in denoiser.backbone.parameters())

    # Memory: weights and one pass forward and backward through them, before there is any student.
    restart_peak()
    given = x.clone().requires_grad_(True)
    with autocast(config, denoiser):
        denoiser(given, sigma, one).square().mean().backward()
    floor_peak = peak()
    del given

    student = Student(denoiser, rank)
    state = State.create(student, config, pairs)
    estimate = measure_memory(state, pairs, (size, size))
    restart_peak()
    steps = distill(state, pairs, uncond.to("cpu"))
    for _ in range(2):
        next(steps)
    run_peak = peak()

    def learn():
        with state.checkpointed(), autocast(config, denoiser):
            loss = student(x, sigma, one).float().square().mean()
        loss.backward()
        student.trained.zero_grad(set_to_none=True)

    def judge():
        given = x.clone().requires_grad_(True)
        with state.checkpointed(), autocast(config, denoiser):
            loss = sum(f.square().mean() for f in state.features(given, sigma, one))
        loss.backward()

    @torch.no_grad()
    def look():
        with autocast(config, denoiser):
            state.features(x, sigma, one)

    @torch.no_grad()
    def teach():
        with autocast(config, denoiser):
            guided(denoiser, x, sigma, one, uncond, Guidance(4.0))

    works = {
        "student, forward and backward": learn,
        "features of the student's picture, forward and backward": judge,
        "features of the positive, forward": look,
        "teacher with guidance, forward": teach,
        "a whole step": lambda: next(steps),
    }
    # In turn, so that whatever else the machine does falls on all alike.
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            taken = seconds(work)
            if turn:  # the first is to warm up
                times[name].append(taken)
    steps.close()
    state.release()

print(f"{type(model.model).__name__}, {size} x {size}, batch {batch}, rank {rank}, checkpointing {bool(checkpointing)}")
for name, values in times.items():
    told = f"median {statistics.median(values):7.3f} s, least {min(values):.3f}, most {max(values):.3f}"
    print(f"{name:<58} {told}")
whole = times.pop("a whole step")
sums = [sum(row) for row in zip(*times.values(), strict=True)]
ratios = sorted(step / floor for step, floor in zip(whole, sums, strict=True))
least = min(whole) / sum(min(values) for values in times.values())
print(
    f"step / sum of its passes: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}), "
    f"of the least {least:.3f}"
)
trained = estimate.trained / GB
print(f"weights {weights / GB:.2f} GB; peak of weights + one forward and backward {floor_peak / GB:.2f} GB")
print(f"peak of the training {run_peak / GB:.2f} GB = {run_peak / floor_peak:.3f} x that; student {trained:.2f} GB")
print(f"a second copy of the weights would have made it {(run_peak + weights) / floor_peak:.3f} x")
print(f"estimate beforehand: {estimate.in_words()}")
