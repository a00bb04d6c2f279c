"""Run by ComfyUI's own Python, without its server: its VAEs as decoders with gradients, its CLIP_VISION as an eye.

    python pixels.py COMFYUI CLONE FOLDER

FOLDER holds files.json, {name: checkpoint}; it gets told.json, {name: what was found}.
"""

import json
from pathlib import Path

from inside import arguments

# isort: split

import comfy.clip_vision
import comfy.sd
import torch
from turbodistill.core.decoder import BLOCKS, Decoder
from turbodistill.core.gradient_checkpointing import checkpointed
from turbodistill.core.vision import VisionFeatures
from turbodistill.nodes.host import embedded
from turbodistill.nodes.host.training import ComfyUIHost, trainable
from turbodistill.nodes.host.vision import eye_of

(folder,) = arguments
CLIP = {
    "model_type": "clip_vision_model", "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2,
    "intermediate_size": 64, "hidden_act": "quick_gelu", "num_channels": 3, "patch_size": 14, "image_size": 56,
    "projection_dim": 16,
}  # fmt: skip
DINO = {
    "model_type": "dinov2", "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "image_size": 518,
    "patch_size": 14, "use_swiglu_ffn": False, "layer_norm_eps": 1e-6,
}  # fmt: skip


def parts(file):
    """MODEL, CLIP and VAE of a checkpoint as its loader node gives them, or of the demo."""
    with torch.inference_mode():
        if file is None:
            return embedded.load()[:3]
        return comfy.sd.load_checkpoint_guess_config(file)[:3]


def decoder(file):
    model, clip, vae = parts(file)
    network = vae.first_stage_model
    before, flags = bits_of(network), [p.requires_grad for p in network.parameters()]
    frozen = [p.is_inference() for p in network.parameters()]
    with torch.inference_mode(), trainable(model) as trained:
        host = ComfyUIHost(model, clip, vae, "x", 64, 64, trained)
        torch.manual_seed(0)
        x = torch.randn(2, *host.latent_shape).mul(0.5).requires_grad_(True)
        own, made = host.decode(x.detach()), host.decoder(x)
        told = {"gap": float((made.detach().clamp(0, 1) - own).abs().max())}
        weights = torch.randn_like(made)
        (slope,) = torch.autograd.grad((made * weights).sum(), x)
        with checkpointed(host.decoder.network, known=BLOCKS):
            (again,) = torch.autograd.grad((host.decoder(x) * weights).sum(), x)
        step = 1e-2 * slope / slope.norm()
        with torch.no_grad():
            up, down = (float((host.decoder(y) * weights).double().sum()) for y in (x + step, x - step))
        told |= {"slope": float(slope.norm()), "difference": (up - down) / 2e-2}
        told["again"] = float((again - slope).abs().max() / slope.abs().max())
        told["blocks"] = sum(bool(BLOCKS.search(n)) for n, _ in host.decoder.network.named_modules())
    told["same"] = all(torch.equal(a, b) for a, b in zip(before, bits_of(network), strict=True))
    told["flags"] = [p.requires_grad for p in network.parameters()] == flags
    return told | {"frozen": [p.is_inference() for p in network.parameters()] == frozen}


def bits_of(network):
    return [p.detach().cpu().clone() for p in network.state_dict().values()]


def eye(config):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(config))
    with torch.inference_mode():
        vision = comfy.clip_vision.ClipVisionModel(str(path))
        torch.manual_seed(1)
        for p in vision.model.parameters():
            p.normal_(0, 0.05)
    before, frozen = bits_of(vision.model), [p.is_inference() for p in vision.model.parameters()]
    seen = eye_of(vision, torch.device("cpu"))
    features = VisionFeatures(seen, Decoder(1, torch.nn.Identity, lambda _, x: x))
    x = torch.rand(2, 3, 40, 64, requires_grad=True)
    maps = features(x, torch.zeros(2), None)
    sum(m.square().sum() for m in maps).backward()
    return {
        "maps": [list(m.shape) for m in maps],
        "reached": float((x.grad != 0).float().mean()),
        "same": all(torch.equal(a, b) for a, b in zip(before, bits_of(vision.model), strict=True)),
        "frozen": [p.is_inference() for p in vision.model.parameters()] == frozen,
    }


def refused():
    """Of a network without patches."""

    class Other:
        model, image_size = torch.nn.Linear(2, 2), 224

    try:
        eye_of(Other(), torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return ""


files = {**json.loads(Path(folder, "files.json").read_text()), "demo": None}
told = {name: decoder(file) for name, file in files.items()}
told |= {"clip": eye(CLIP), "dino": eye(DINO), "no patches": refused()}
Path(folder, "told.json").write_text(json.dumps(told))
