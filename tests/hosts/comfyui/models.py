"""Run by ComfyUI's own Python, without its server: our adapter on a narrow model of every family.

    python models.py COMFYUI CLONE

Prints a line of JSON, {family: what was found, or null if this ComfyUI does not know it}.
"""

import json
import math

from inside import arguments  # noqa: F401 - it brings ComfyUI and the clone

# isort: split

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import families
import looks
import torch
from comfy.ldm.wan.vae import WanVAE
from turbodistill.core.features import TeacherFeatures
from turbodistill.core.layouts import layout_of
from turbodistill.core.rotary import ROTATIONS, give_gradients
from turbodistill.nodes.host.patcher import architecture
from turbodistill.nodes.host.training import ComfyUIHost, trainable

PROMPTS = ("a red fox", "an owl in a very dark forest at night", "a blue fox")  # the second is of another length
HEIGHT, WIDTH = 8, 12  # of the latents


def own_x0(model, text, x, sigma):
    """x0 (1, C, H, W) of one row by ComfyUI's own way from conditioning to the network."""
    frames = model.get_model_object("latent_format").latent_dimensions == 3
    x = x.unsqueeze(2) if frames else x
    with torch.inference_mode():
        conds = {"positive": comfy.sampler_helpers.convert_cond(text)}
        conds = comfy.samplers.process_conds(model.model, x, conds, x.device)
        model.pre_run()
        (x0,) = comfy.samplers.calc_cond_batch(model.model, [conds["positive"]], x, sigma, model.model_options)
        model.cleanup()
    return (x0.squeeze(2) if frames else x0).clone()


def look_at_lengths(model, clip, denoiser, x, sigma, cond):
    """How far rows of a batch of texts of different lengths are from ComfyUI's own, one by one; and their maps."""
    texts = [clip.encode_from_tokens_scheduled(prompt) for prompt in PROMPTS]
    features = TeacherFeatures(denoiser)
    with torch.no_grad():
        x0, maps = denoiser(x, sigma, cond), features(x, sigma, cond)
        rows = [slice(k, k + 1) for k in range(len(x))]
        own = torch.cat([own_x0(model, text, x[k], sigma[k]) for text, k in zip(texts, rows, strict=True)])
        alone = [features(x[k], sigma[k], cond.rows(k)) for k in rows]
    gaps = [looks.far(m, torch.cat(each)) for m, each in zip(maps, zip(*alone, strict=True), strict=True)]
    lengths = {name: tokens.tolist() for name, tokens in cond.lengths.items()}
    return {"own": looks.far(x0, own), "maps": max(gaps), "lengths": lengths}


def look_at_place(denoiser, x, sigma, cond):
    """Where the square at (1, 2) of a latent comes from in what the last block puts out: places in its map."""
    kind = list(layout_of(denoiser.backbone).blocks)[-1]
    block = getattr(denoiser.backbone, kind)[-1]
    found = []
    hook = block.register_forward_hook(lambda _module, _args, output: found.append(output))
    x = x[:1].clone().requires_grad_(True)
    cond = cond.rows(slice(0, 1))
    try:
        x0 = denoiser(x, sigma[:1], cond)
    finally:
        hook.remove()
    parts = found[0] if isinstance(found[0], tuple) else (found[0],)
    side = getattr(denoiser.backbone, layout_of(denoiser.backbone).patch)
    square = x0[:, :, side : 2 * side, 2 * side : 3 * side].sum()
    known = [p for p in parts if p is not None]
    gradients = torch.autograd.grad(square, known, allow_unused=True)
    filled = iter(torch.zeros_like(p) if g is None else g for p, g in zip(known, gradients, strict=True))
    filled = tuple(None if p is None else next(filled) for p in parts)
    tokens = denoiser.picture_part(f"{kind}.0", filled if len(parts) > 1 else filled[0], x, cond)
    columns = math.ceil(x.shape[-1] / side)
    return [divmod(int(token), columns) for token in tokens[0].abs().amax(-1).nonzero()]


def look_at_slope(denoiser, x, sigma, cond):
    """The gradient of a loss along a change of every LoRA, beside the difference that the change makes."""
    student = looks.nudged(denoiser)
    torch.manual_seed(3)
    weight = torch.randn_like(x)
    changes = [torch.randn_like(b.up) * 0.02 for b in student.lora.each()]

    def loss():
        return (student(x, sigma, cond).float() * weight).mean()

    def moved(by):
        with torch.no_grad():
            for branch, change in zip(student.lora.each(), changes, strict=True):
                branch.up += by * change
            return float(loss())

    with student.training():
        loss().backward()
    found = [b.up.grad for b in student.lora.each()]
    slope = sum(float((g * c).sum()) for g, c in zip(found, changes, strict=True) if g is not None)
    step = 0.05
    ahead = moved(step)
    behind = moved(-2 * step)
    student.release()
    return [slope, (ahead - behind) / (2 * step)]


def look(name, family):
    """Everything of one family."""
    model, clip = families.model_of(family), families.Text(family)
    before = looks.bits(model)
    with torch.inference_mode(), trainable(model) as trained:
        vae = families.Pictures(trained)
        factor = vae.factor
        host = ComfyUIHost(model, clip, vae, name, WIDTH * factor, HEIGHT * factor, trained)
        denoiser, cond = host.denoiser, host.encode_text(PROMPTS)
        torch.manual_seed(7)
        sigma = torch.tensor([0.99, 0.3, 0.6])
        x = torch.randn(3, *host.latent_shape)
        told = {
            "architecture": architecture(model),
            "lengths": look_at_lengths(trained, clip, denoiser, x, sigma, cond),
        }
        told["conditions"] = looks.look_at_conditions(denoiser, x, sigma, cond)
        told["lora"] = looks.look_at_lora(denoiser, x, sigma, cond)
        told["features"] = looks.look_at_features(denoiser, x, sigma, cond)
        told["place"] = look_at_place(denoiser, x, sigma, cond)
        told["slope"] = look_at_slope(denoiser, x, sigma, cond)
        told["gradient_checkpointing"] = looks.look_at_checkpointing(denoiser, x, sigma, cond)
        pictures = host.decode(x)
        told["pictures"] = list(pictures.shape)
        there = denoiser.latent_in(denoiser.latent_out(x))
        told["there_and_back"] = looks.far(there, x)
    given = (denoiser, x, sigma, cond)
    told["export"] = looks.look_at_export(model, *given)
    told["key"] = next(iter(looks.nudged(denoiser, "attention").lora.file_names(denoiser.backbone)))
    return told | {"same": looks.same(before, model)}


def look_at_rotations():
    """How far the gradients of this ComfyUI's fused operations are from those of its plain ones."""
    if not hasattr(torch.ops.comfy_kitchen, "apply_rope"):
        return {}
    from comfy_kitchen.backends.eager import rope

    give_gradients()
    found = {}
    torch.manual_seed(0)
    angles = torch.randn(1, 5, 1, 3)
    table = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))
    for name in [*ROTATIONS, *(f"{name}1" for name in ROTATIONS)]:
        count = 1 if name.endswith("1") else 2
        tensors = [torch.randn(2, 5, 2, 6, requires_grad=True) for _ in range(count)]
        scales = [1 + torch.rand(6) for _ in range(count)] if "rms" in name else []
        weight, gradients = torch.randn(2, 5, 2, 6), []
        for operation in (getattr(torch.ops.comfy_kitchen, name), getattr(rope, name)):
            output = operation(*tensors, table, *scales)
            loss = sum((o * weight).square().sum() for o in (output if count == 2 else [output]))
            gradients.append(torch.cat(torch.autograd.grad(loss, tensors)))
        found[name] = looks.far(*gradients)
    return found


def look_at_video_vae():
    """How far pictures and latents of a batch are from those that the real autoencoder of videos makes one by one."""
    if not hasattr(comfy.model_management, "in_training"):
        return None  # older ones take its width for granted
    torch.manual_seed(6)
    network = WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    weights = {k: torch.randn(v.shape) * max(v[0].numel(), 1) ** -0.5 for k, v in network.state_dict().items()}
    family = families.FAMILIES["Qwen-Image"]
    with torch.inference_mode():
        vae = comfy.sd.VAE(sd=weights)
        host = ComfyUIHost(families.model_of(family), families.Text(family), vae, "Qwen-Image", 8 * WIDTH, 8 * HEIGHT)
        x = torch.randn(2, *host.latent_shape)
        pictures, latents = host.decode(x), host.denoiser.latent_out(x)
        alone = torch.cat([vae.decode(z[None, :, None])[:, 0] for z in latents]).movedim(-1, 1)
        back = host.encode_images(pictures)
        own = torch.cat([vae.encode(p[None].movedim(1, -1))[:, :, 0] for p in pictures])
        return [looks.far(pictures, alone), looks.far(back, host.denoiser.latent_in(own)), list(back.shape)]


told = {name: look(name, family) if families.settings(family) else None for name, family in families.FAMILIES.items()}
print(json.dumps({"families": told, "rotations": look_at_rotations(), "video_vae": look_at_video_vae()}))
