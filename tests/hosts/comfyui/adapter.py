"""Run by ComfyUI's own Python, without its server: our adapter on what its loader gives, and gradients through it.

    python adapter.py COMFYUI CLONE FOLDER

FOLDER holds jobs.json, {name: {"checkpoint": path, "dtype": null or that of the weights, "native": whether it is
computed in, too, as an accelerator does, "look": a key of LOOKS}}, and for each name NAME.safetensors of x
(2, C, H, W), sigma (2,), states (1, T, D) and pooled (1, P). It gets NAME.out.safetensors, and told.json,
{name: what was found}.
"""

import json
import re
from contextlib import nullcontext
from pathlib import Path

from inside import arguments

# isort: split

import comfy.model_management
import comfy.ops
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import narrow  # noqa: F401 - ComfyUI then takes a narrow Flux
import torch
from looks import (
    bits,
    far,
    learn,
    look_at_checkpointing,
    look_at_conditions,
    look_at_export,
    look_at_features,
    look_at_lora,
    nudged,
    reached,
    same,
)
from safetensors.torch import load_file, save_file
from torch import amp
from turbodistill.core.features import TeacherFeatures
from turbodistill.core.gradient_checkpointing import checkpointed
from turbodistill.core.student import Student
from turbodistill.nodes.host.denoiser import ModelDenoiser, conditions, differentiable
from turbodistill.nodes.host.training import trainable

(folder,) = arguments


def load(checkpoint, dtype, native, **_):
    """A MODEL as a loader node gives it."""
    options = {"dtype": getattr(torch, dtype)} if dtype else {}
    options |= {"custom_operations": comfy.ops.disable_weight_init} if native else {}
    with torch.inference_mode():
        model, *_ = comfy.sd.load_checkpoint_guess_config(
            checkpoint, output_vae=False, output_clip=False, model_options=options
        )
    if native:
        model.model.manual_cast_dtype = None
    return model


def inputs_of(backbone, names, run):
    """What modules are given first in a run, by name."""
    seen, modules = {}, dict(backbone.named_modules())

    def see(name):
        return lambda _module, args: seen.__setitem__(name, args[0].clone())

    hooks = [modules[n].register_forward_pre_hook(see(n)) for n in names]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def picture_tokens(denoiser, x, sigma, cond):
    """How far taps of transformer blocks are from the picture tokens that the next module is given."""
    names = [n for n, _ in denoiser.backbone.named_modules()]
    readers = {"joint_blocks": "final_layer", "double_blocks": "single_blocks.0", "single_blocks": "final_layer"}
    blocks_of = {kind: [n for n in names if re.fullmatch(rf"{kind}\.\d+", n)] for kind in readers}
    read = [(found[-1], readers[kind]) for kind, found in blocks_of.items() if found]
    with torch.no_grad():
        seen = inputs_of(denoiser.backbone, {reader for _, reader in read}, lambda: denoiser(x, sigma, cond))
        found = {}
        for tap, reader in read:
            (tapped,) = TeacherFeatures(denoiser, [tap])(x, sigma, cond)
            tokens = tapped.flatten(2).transpose(1, 2)
            found[tap] = float((tokens - seen[reader][:, -tokens.shape[1] :]).abs().max())
    return found


def ready(model, given):
    """What a pass needs."""
    denoiser, x, sigma = ModelDenoiser(model), given["x"].clone(), given["sigma"].clone()
    cond = conditions(model, [[given["states"], {"pooled_output": given["pooled"]}]], x)
    return denoiser, x, sigma, cond.map(torch.clone)


def own_x0(model, given):
    """x0 by ComfyUI's own way from conditioning to the network."""
    x, sigma = given["x"].clone(), given["sigma"].clone()
    text = comfy.sampler_helpers.convert_cond([[given["states"], {"pooled_output": given["pooled"]}]])
    conds = comfy.samplers.process_conds(model.model, x, {"positive": text}, x.device)
    model.pre_run()
    (x0,) = comfy.samplers.calc_cond_batch(model.model, [conds["positive"]], x, sigma, model.model_options)
    model.cleanup()
    return x0


def shallow(model, given):
    """What is denoised."""
    denoiser, x, sigma, cond = ready(model, given)
    with torch.no_grad():
        x0, output, own = denoiser(x, sigma, cond), denoiser.output(x, sigma, cond), own_x0(model, given)
    levels = denoiser.schedule.sigma(torch.arange(1000.0))
    return {"own": far(x0, own)}, {"x0": x0, "output": output, "levels": levels}


def whole(model, given):
    """Everything of one architecture."""
    told, tensors = shallow(model, given)
    looked = ready(model, given)
    looks = {
        "conditions": look_at_conditions,
        "lora": look_at_lora,
        "features": look_at_features,
        "gradient_checkpointing": look_at_checkpointing,
    }
    told |= {name: look(*looked) for name, look in looks.items()}
    told["features"]["picture_tokens"] = picture_tokens(*looked)
    denoiser, *given = looked
    with torch.no_grad():
        told["again"] = torch.equal(denoiser(*given), tensors["x0"])
    return told, tensors


def low(model, given):
    """Training over weights of a lower precision: plain, checkpointed in bfloat16 arithmetic, and of a full copy."""
    denoiser, x, sigma, cond = ready(model, given)
    told = {"weights": sorted({str(p.dtype) for p in denoiser.backbone.parameters()})}
    features = TeacherFeatures(denoiser)
    for name in ("plain", "autocast"):
        student = nudged(denoiser)
        fast = name == "autocast"
        again = checkpointed(denoiser.backbone, [student.lora]) if fast else nullcontext()
        with student.training(), amp.autocast("cpu", torch.bfloat16, enabled=fast), again:
            loss = learn(student, features, x, sigma, cond)
        told[name] = reached(student) | {"loss": float(loss)}
        student.release()
    student = Student(denoiser, rank=0)
    with student.training():
        x0 = student(x, sigma, cond)
        x0.square().mean().backward()
    grads = [p.grad for p in student.backbone.parameters() if p.grad is not None]
    told["copy"] = {
        "gap": far(x0.detach(), denoiser(x, sigma, cond).detach()),
        "types": sorted({str(g.dtype) for g in grads}),
        "taught": len(grads) / len(list(student.backbone.parameters())),
        "finite": all(g.isfinite().all().item() for g in grads),
    }
    return told, {}


def gradient(model, given):
    """The gradient of a small loss at the noisy picture, through features."""
    denoiser, x, sigma, cond = ready(model, given)
    x.requires_grad_(True)
    maps = TeacherFeatures(denoiser)(x, sigma, cond)
    (1e-3 * sum(m.mean(1).tanh().mean() for m in maps)).backward()
    return {}, {"gradient": x.grad}


LOOKS = {"whole": whole, "shallow": shallow, "low": low, "gradient": gradient}
told = {}
for name, job in json.loads(Path(folder, "jobs.json").read_text()).items():
    model = load(**job)
    before, flags = bits(model), [p.requires_grad for p in model.model.diffusion_model.parameters()]
    frozen = all(p.is_inference() for p in model.model.diffusion_model.parameters())
    given, tensors = load_file(f"{folder}/{name}.safetensors"), {}
    try:
        with torch.inference_mode(), trainable(model), differentiable(model):
            found, tensors = LOOKS[job["look"]](model, given)
    except ValueError as error:
        found = {"refused": str(error)}
    found["flags"] = [p.requires_grad for p in model.model.diffusion_model.parameters()] == flags
    if job["look"] == "whole":
        found["export"] = look_at_export(model, *ready(model, given))
    told[name] = found | {"frozen": frozen, "same": same(before, model)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{folder}/{name}.out.safetensors")
    comfy.model_management.unload_all_models()
Path(folder, "told.json").write_text(json.dumps(told))
