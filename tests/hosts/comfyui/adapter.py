"""Run by ComfyUI's own Python, without its server: our adapter on what its loader gives, and gradients through it.

    python adapter.py COMFYUI CLONE CHECKPOINT INPUTS OUTPUTS

INPUTS is a safetensors file of x (B, C, H, W), sigma (B,), states (1, T, D) and pooled (1, P); OUTPUTS
becomes one of x0, the network's output, the context, and what became of gradients and weights.
"""

import importlib.util
import sys

comfyui, clone, checkpoint, inputs, outputs = sys.argv[1:]
sys.argv = sys.argv[:1]  # ComfyUI reads it
sys.path.insert(0, comfyui)

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "turbodistill", f"{clone}/__init__.py", submodule_search_locations=[clone]
)
sys.modules["turbodistill"] = importlib.util.module_from_spec(spec)

from turbodistill.core.student import Student  # noqa: E402
from turbodistill.nodes.host_denoiser import ModelDenoiser, conditions  # noqa: E402
from turbodistill.nodes.host_training import trainable  # noqa: E402

with torch.inference_mode():  # as nodes run
    model, *_ = comfy.sd.load_checkpoint_guess_config(checkpoint, output_vae=False, output_clip=False)
before = {k: v.clone() for k, v in model.model.state_dict().items()}
frozen = all(p.is_inference() for p in model.model.diffusion_model.parameters())

with torch.inference_mode(), trainable(model):
    given = {k: v.clone() for k, v in load_file(inputs).items()}
    x, sigma = given["x"], given["sigma"]
    denoiser = ModelDenoiser(model)
    cond = conditions(model, [[given["states"], {"pooled_output": given["pooled"]}]], x).map(torch.clone)
    with torch.no_grad():
        x0, output = denoiser(x, sigma, cond), denoiser.output(x, sigma, cond)
    student = Student(denoiser, rank=2)
    with student.training():
        student(x, sigma, cond).square().mean().backward()
    taught = [bool(branch.up.grad is not None and branch.up.grad.any()) for branch in student.lora.each()]
    student.release()
    with torch.no_grad():
        again = denoiser(x, sigma, cond)

after = model.model.state_dict()
same = all(torch.equal(before[k], after[k]) for k in before) and all(p.requires_grad for p in model.model.parameters())
told = {"frozen": frozen, "branches": len(taught), "taught": sum(taught), "same": same, "again": torch.equal(again, x0)}
found = {k: torch.tensor(int(v)) for k, v in told.items()}
save_file(found | {"x0": x0, "output": output, "levels": denoiser.schedule.sigma(torch.arange(1000.0))}, outputs)
