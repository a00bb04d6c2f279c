"""Run by ComfyUI's own Python, without its server: our adapter on quantised weights, in formats of three kinds.

    python quantised.py COMFYUI CLONE CHECKPOINT

CHECKPOINT is a narrow Flux; its layers are quantised into files beside it, and so goes the same model with the
numbers that the quantised ones stand for. Prints a line of JSON, {format: what was found}.
"""

import json

from inside import arguments

# isort: split

import comfy.quant_ops
import comfy.sd
import narrow  # noqa: F401 - ComfyUI then takes a narrow Flux
import torch
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import load_file, save_file
from turbodistill.core.card import StudentCard, fingerprint
from turbodistill.core.features import TeacherFeatures
from turbodistill.core.student import Student
from turbodistill.nodes.host.denoiser import ModelDenoiser, conditions
from turbodistill.nodes.host.patcher import base_weights, model_hash, with_student
from turbodistill.nodes.host.training import trainable

(checkpoint,) = arguments
FORMATS = ("float8_e4m3fn", "nvfp4", "int8_tensorwise")


def write(kind):
    """The files of the quantised and the plain model."""
    packed, plain = {}, {}
    layout = comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
    for name, weight in load_file(checkpoint).items():
        if "_blocks." in name and name.endswith(".weight") and weight.ndim == 2:
            whole = QuantizedTensor.from_float(weight.bfloat16(), layout)
            packed |= whole.state_dict(name)
            about = json.dumps({"format": kind}).encode()
            packed[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(about), dtype=torch.uint8)
            plain[name] = whole.dequantize().float()
        else:
            packed[name] = plain[name] = weight
    paths = [f"{checkpoint}.{kind}.safetensors", f"{checkpoint}.{kind}.plain.safetensors"]
    for path, tensors in zip(paths, (packed, plain), strict=True):
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return paths


def look(path):
    """A training pass on a model, and what its student's file becomes on it."""
    with torch.inference_mode():
        model, *_ = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)
    with torch.inference_mode(), trainable(model) as trained:
        denoiser = ModelDenoiser(trained)
        torch.manual_seed(0)
        x, sigma = torch.randn(2, 16, 8, 8), torch.tensor([0.9, 0.3])
        text = [[torch.randn(1, 7, 48), {"pooled_output": torch.randn(1, 32)}]]
        cond = conditions(trained, text, x).map(torch.clone)
        torch.manual_seed(1)
        student, features = Student(denoiser, rank=2), TeacherFeatures(denoiser)
        with torch.no_grad():
            for branch in student.lora.each():
                branch.up.normal_(std=0.02)
        with student.training():
            x0 = student(x, sigma, cond)
            (x0.square().mean() + sum(m.square().mean() for m in features(x0, sigma, cond))).backward()
        gradients = torch.cat([branch.up.grad.flatten() for branch in student.lora.each()])
        with torch.no_grad(), student.merged():
            merged = student(x, sigma, cond)
        tensors = student.lora.export(denoiser.backbone, dtype=torch.float32)
        student.release()
        try:
            Student(denoiser, rank=0)
            refused = ""
        except ValueError as error:
            refused = str(error)
    about = {"base_model": "flux", "architecture": "tests", "guidance": 4.0, "resolution": (64, 64)}
    about |= {"kind": "lora", "rank": 2, "alpha": 2.0, "timesteps": (999,), "base_hash": model_hash(model)}
    card = StudentCard(prediction=denoiser.prediction, base_prediction=denoiser.prediction, **about)
    patched, warning = with_student(model, tensors, card, 1.0, "student.safetensors")
    layers = len({name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name})
    told = {"patches": len(patched.patches) / layers, "warning": warning, "refused": refused}
    return x0.detach(), gradients, merged, told | {"weights": fingerprint(base_weights(model))}


def gap(found, expected):
    """The largest difference, in standard deviations of what was expected."""
    return float((found - expected).abs().max() / expected.std())


told = {}
for kind in FORMATS:
    (x0, gradients, merged, about), (plain, expected, _, _) = map(look, write(kind))
    likeness = float(torch.cosine_similarity(gradients, expected, 0))
    told[kind] = about | {"gap": gap(x0, plain), "gradients": likeness, "merged": gap(merged, x0)}
print(json.dumps(told))
