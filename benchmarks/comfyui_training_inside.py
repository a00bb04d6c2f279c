"""The part of `comfyui_training.py` that ComfyUI's own Python runs."""

import importlib.util
import sys

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

from step_cost import GB, measure, peak, restart_peak  # noqa: E402
from turbodistill.nodes.host.denoiser import ModelDenoiser, conditions  # noqa: E402
from turbodistill.nodes.host.training import trainable  # noqa: E402
from turbodistill.trainer.config import Config  # noqa: E402
from turbodistill.trainer.data.samples import Samples  # noqa: E402
from turbodistill.trainer.loop.precision import autocast  # noqa: E402

with torch.inference_mode():  # as nodes run
    model, *_ = comfy.sd.load_checkpoint_guess_config(checkpoint, output_vae=False, output_clip=False)

with torch.inference_mode(), trainable(model):
    denoiser = ModelDenoiser(model)
    device = denoiser.device
    config = Config(
        rank=rank, batch_size=batch, gradient_checkpointing=bool(checkpointing), precision=precision, updates=10**6,
        regression_updates=0, discriminator_warmup=0, adversarial_ramp=0,
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

    cost = measure(denoiser, config, pairs, uncond.to("cpu"), (size, size), repeats)

print(f"{type(model.model).__name__}, {size} x {size}, batch {batch}, rank {rank}, checkpointing {bool(checkpointing)}")
print("\n".join(cost.lines()))
trained = cost.estimate.trained / GB
print(f"weights {weights / GB:.2f} GB; peak of weights + one forward and backward {floor_peak / GB:.2f} GB")
print(f"peak of the training {cost.peak / GB:.2f} GB = {cost.peak / floor_peak:.3f} x that; student {trained:.2f} GB")
print(f"a second copy of the weights would have made it {(cost.peak + weights) / floor_peak:.3f} x")
