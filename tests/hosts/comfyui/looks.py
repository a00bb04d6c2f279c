"""What scripts in ComfyUI's own Python look at in a denoiser: its students, features, gradients and files."""

from dataclasses import replace

import comfy.lora
import comfy.model_management
import torch
from turbodistill.core.features import TeacherFeatures
from turbodistill.core.gradient_checkpointing import blocks, checkpointed
from turbodistill.core.lora import TARGETS, LoRA
from turbodistill.core.student import Student
from turbodistill.nodes.host.denoiser import ModelDenoiser


def bits(model):
    """The weights as bytes, which float8 and nan can be compared by."""
    return {k: v.detach().clone().view(torch.uint8) for k, v in model.model.state_dict().items() if v.ndim}


def same(before, model):
    """Whether the weights are what they were."""
    after = bits(model)
    return before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())


def far(found, expected):
    """The largest difference, in standard deviations of what was expected."""
    return float((found - expected).abs().max() / expected.std())


def nudged(denoiser, targets="all"):
    """A student whose LoRA does something."""
    torch.manual_seed(1)
    student = Student(denoiser, rank=2, targets=targets)
    with torch.no_grad():
        for branch in student.lora.each():
            branch.up.normal_(std=0.02)
    return student


def learn(student, features, x, sigma, cond):
    """A training pass in small: the student's picture, noised, through the teacher's features; the loss."""
    student.lora.zero_grad(set_to_none=True)
    x0 = student(x, sigma, cond).float()
    noisy = student.schedule.add_noise(x0, torch.ones_like(x0), sigma)
    loss = x0.square().mean() + sum(m.square().mean() for m in features(noisy, sigma, cond))
    loss.backward()
    return loss.detach()


def gradients(student):
    return [p.grad.clone() for b in student.lora.each() for p in (b.down, b.up) if p.grad is not None]


def reached(student):
    """How many branches learn, which do not, and whether all their gradients are numbers."""
    found, each = gradients(student), dict(zip(student.lora.names, student.lora.each(), strict=True))
    untaught = [n for n, b in each.items() if b.up.grad is None or not b.up.grad.any()]
    finite = all(g.isfinite().all() for g in found)
    return {"branches": len(each), "taught": len(each) - len(untaught), "untaught": untaught, "finite": finite}


def look_at_features(denoiser, x, sigma, cond):
    """Default taps: their maps, what they depend on, and where the gradient goes."""
    features, x = TeacherFeatures(denoiser), x.clone().requires_grad_(True)
    maps = features(x, sigma, cond)
    sum(m.square().mean() for m in maps).backward()
    with torch.no_grad():
        alone = [TeacherFeatures(denoiser, [tap])(x, sigma, cond)[0] for tap in features.taps]
        others = features(x.flip(-1), sigma, cond)
        maps = [m.detach() for m in maps]
    return {
        "taps": features.taps,
        "shapes": [list(m.shape) for m in maps],
        "finite": all(m.isfinite().all() for m in maps),
        "alone": all(torch.equal(a, b) for a, b in zip(maps, alone, strict=True)),
        "moved": min(far(a, b) for a, b in zip(others, maps, strict=True)),
        "to_x": float(x.grad.abs().min()),
        "to_weights": sum(p.grad is not None for p in denoiser.backbone.parameters()),
    }


def look_at_checkpointing(denoiser, x, sigma, cond):
    """A training pass and the features' gradient, with and without."""
    student, features = nudged(denoiser), TeacherFeatures(denoiser)

    def passes():
        x_in = x.clone().requires_grad_(True)
        sum(m.square().mean() for m in features(x_in, sigma, cond)).backward()
        return [learn(student, features, x, sigma, cond), x_in.grad, *gradients(student)]

    with student.training():
        plain = passes()
        with checkpointed(denoiser.backbone, [student.lora]):
            changed = sum("forward" in m.__dict__ for m in denoiser.backbone.modules())
            again = passes()
    student.release()
    return {
        "blocks": len(blocks(denoiser.backbone)),
        "changed": changed,
        "left": sum("forward" in m.__dict__ for m in denoiser.backbone.modules()),
        "gradients": len(again) == len(plain),
        "gap": max(
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in zip(again, plain, strict=True)
        ),
    }


def look_at_conditions(denoiser, x, sigma, cond):
    """How far x0 moves when one part of the conditions is another's."""
    parts = {"context": cond.context, "pooled": cond.pooled} | cond.extra
    with torch.no_grad():
        x0, heard = denoiser(x, sigma, cond), {}
        for name, value in parts.items():
            if value is not None:
                moved = value.roll(1, -1) if value.ndim > 1 else 2 * value  # a norm would take away a factor
                other = parts | {name: moved}
                extra = {n: other[n] for n in cond.extra}
                moved = replace(cond, context=other["context"], pooled=other["pooled"], extra=extra)
                heard[name] = far(denoiser(x, sigma, moved), x0)
    return heard


def look_at_lora(denoiser, x, sigma, cond):
    """Layers by targets; gradients of a fresh student."""
    targets = {}
    for name in TARGETS:
        lora = LoRA(denoiser.backbone, 1, targets=name)
        lora.remove()
        targets[name] = len(lora.names)
    student = Student(denoiser, rank=2)
    with student.training():
        student(x, sigma, cond).square().mean().backward()
    student.release()
    return reached(student) | {"targets": targets}


def look_at_export(model, denoiser, x, sigma, cond):
    """A student's file through ComfyUI's own LoRA loader, key by key and picture by picture."""
    student = nudged(denoiser)
    tensors = student.lora.export(denoiser.backbone, "kohya", torch.float32)
    with torch.no_grad():
        teacher, expected = denoiser(x, sigma, cond), student(x, sigma, cond)
    student.release()
    loaded = comfy.lora.load_lora(dict(tensors), comfy.lora.model_lora_keys_unet(model.model, {}))
    patched = model.clone()
    taken = patched.add_patches(loaded, 1.0)
    with torch.no_grad():
        comfy.model_management.load_models_gpu([patched], force_full_load=True)
        found = ModelDenoiser(patched)(x, sigma, cond)
        comfy.model_management.load_models_gpu([model], force_full_load=True)
    names = len(student.lora.names)
    return {"names": names, "taken": len(taken), "gap": far(found, expected), "teacher": far(teacher, expected)}
