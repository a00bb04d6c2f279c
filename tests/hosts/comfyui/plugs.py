"""What users plug in between a loader and our nodes, by the rows of a table: ComfyUI's own nodes, LoRAs and patches.

Each is a function of a plugins.Base, whose MODEL it patches; `Missing` where this ComfyUI has no such node.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import comfy.lora
import comfy.sd
import torch
from comfy.ldm.modules.attention import optimized_attention
from packed import Missing
from turbodistill.nodes.host import patcher

Plug = Callable[[Any], Any]


def node(module, name, **values) -> Plug:
    """A node of ComfyUI's own with values for its widgets."""

    def plug(base):
        try:
            found = getattr(import_module(f"comfy_extras.nodes_{module}"), name)
        except (ImportError, AttributeError):
            raise Missing(name) from None
        if hasattr(found, "define_schema"):
            return found.execute(model=base.model, **values)[0]
        return getattr(found(), found.FUNCTION)(base.model, **values)[0]

    return plug


def adapter(kind):
    """Tensors of a LoRA or LyCORIS file for the attention's outputs."""

    def parts(out, into, weight):
        r = 4
        lora = {"lora_up.weight": (out, r), "lora_down.weight": (r, into)}
        shapes = {
            "LoRA": lora,
            "DoRA": lora,
            "LoHa": {"hada_w1_a": (out, r), "hada_w1_b": (r, into), "hada_w2_a": (out, r), "hada_w2_b": (r, into)},
            "LoKr": {"lokr_w1": (4, 4), "lokr_w2": (out // 4, into // 4)},
        }[kind]
        tensors = {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
        tensors |= {"alpha": torch.tensor(2.0)}
        return tensors | ({"dora_scale": 1.2 * weight.norm(dim=1, keepdim=True)} if kind == "DoRA" else {})

    def make(model):
        torch.manual_seed(5)
        weights = patcher.base_weights(model)
        table = comfy.lora.model_lora_keys_unet(model.model, {})
        # A layer may have several names.
        names = {v.removeprefix(patcher.PREFIX): k for k, v in table.items() if k.startswith("lora_unet_")}
        chosen = {k: weights[v].float() for v, k in names.items() if v.endswith("to_out.0.weight")}
        made = {k: parts(*weight.shape, weight) for k, weight in chosen.items()}
        return {f"{k}.{part}": value for k, tensors in made.items() for part, value in tensors.items()}

    return make


def lora(kind):
    return lambda base: comfy.sd.load_lora_for_models(base.model, None, adapter(kind)(base.model), 1.0, 0.0)[0]


def bypass(base):
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        raise Missing("LoraLoaderBypass")
    return comfy.sd.load_bypass_lora_for_models(base.model, None, adapter("LoRA")(base.model), 1.0, 0.0)[0]


def merge(base):
    """With the same model under a LoRA, so that what the other model has patched on counts as well."""
    other = lora("LoRA")(base)
    return import_module("comfy_extras.nodes_model_merging").ModelMergeSimple().merge(base.model, other, 0.5)[0]


class ImageTokens:
    """As IPAdapter's: attention to tokens of a picture beside the text's, in the rows of the condition alone."""

    def __init__(self, channels):
        torch.manual_seed(6)
        self.tokens = torch.randn(1, 4, channels)

    def __call__(self, q, k, v, options):
        out = optimized_attention(q, k, v, options["n_heads"])
        parts = []
        for rows, told in zip(q.chunk(len(options["cond_or_uncond"])), options["cond_or_uncond"], strict=True):
            tokens = self.tokens.to(q).expand(len(rows), -1, -1)
            parts.append(optimized_attention(rows, tokens, tokens, options["n_heads"]) * (told == 0))
        return out + torch.cat(parts)


def replaced_attention(base):
    model = base.model.clone()
    for place in (("input", 3), ("middle", 0)):
        weight = (
            model.model.diffusion_model.get_submodule("middle_block.1" if place[0] == "middle" else "input_blocks.3.1")
            .transformer_blocks[0]
            .attn2.to_k.weight
        )
        model.set_model_attn2_replace(ImageTokens(len(weight)), *place)
    return model


def patched_attention(base):
    model = base.model.clone()
    model.set_model_attn2_patch(lambda n, context, value, options: (n, context * 1.5, value * 0.5))
    return model


CALLS: list[int] = []


def compiled(base):
    """As TorchCompileModel, by the function that it calls; of the last layers, by a backend that counts its calls."""

    def backend(module, _inputs):
        def counted(*inputs):
            CALLS.append(1)
            return module.forward(*inputs)

        return counted

    model = base.model.clone()
    compile_model = import_module("comfy_api.torch_helpers").set_torch_compile_wrapper
    compile_model(model, backend=backend, keys=["diffusion_model.out"])  # the whole takes half a minute
    return model


def perpendicular(base):
    return node("perpneg", "PerpNeg", empty_conditioning=base.text(""), neg_scale=1.0)(base)


CACHE = {"reuse_threshold": 0.2, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
SHRINK = {"block_number": 3, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.35}
SHRINK |= {"downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic"}
EDM = {"sampling": "v_prediction", "sigma_max": 120.0, "sigma_min": 0.002}
FLUX = {"max_shift": 1.5, "base_shift": 0.5, "width": 2048, "height": 2048}
FREE_U = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}

ROWS: dict[str, tuple[str, Plug]] = {
    "torch.compile (TorchCompileModel)": ("demo", compiled),
    "LoRA": ("demo", lora("LoRA")),
    "DoRA": ("demo", lora("DoRA")),
    "LyCORIS: LoHa": ("demo", lora("LoHa")),
    "LyCORIS: LoKr": ("demo", lora("LoKr")),
    "LoraLoaderBypass": ("demo", bypass),
    "ModelMergeSimple": ("demo", merge),
    "UNetCrossAttentionMultiply": (
        "demo",
        node("attention_multiply", "UNetCrossAttentionMultiply", q=1.2, k=1.0, v=1.2, out=1.0),
    ),
    "IPAdapter-kind: attn2_replace": ("demo", replaced_attention),
    "IPAdapter-kind: attn2_patch": ("demo", patched_attention),
    "FreeU": ("demo", node("freelunch", "FreeU", **FREE_U)),
    "FreeU_V2": ("demo", node("freelunch", "FreeU_V2", **FREE_U)),
    "NAGuidance": ("demo", node("nag", "NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5)),
    "PerturbedAttentionGuidance": ("demo", node("pag", "PerturbedAttentionGuidance", scale=3.0)),
    "SelfAttentionGuidance": ("demo", node("sag", "SelfAttentionGuidance", scale=0.5, blur_sigma=2.0)),
    "RescaleCFG": ("demo", node("model_advanced", "RescaleCFG", multiplier=0.7)),
    "CFGZeroStar": ("demo", node("cfg", "CFGZeroStar")),
    "CFGNorm": ("demo", node("cfg", "CFGNorm", strength=0.9)),
    "APG": ("demo", node("apg", "APG", eta=1.0, norm_threshold=5.0, momentum=0.0)),
    "TCFG": ("demo", node("tcfg", "TCFG")),
    "FreSca": ("demo", node("fresca", "FreSca", scale_low=1.0, scale_high=1.25, freq_cutoff=4)),
    "Mahiro": ("demo", node("mahiro", "Mahiro")),
    "PerpNeg": ("demo", perpendicular),
    "EpsilonScaling": ("demo", node("eps", "EpsilonScaling", scaling_factor=1.05)),
    "TemporalScoreRescaling": ("demo", node("eps", "TemporalScoreRescaling", tsr_k=0.9, tsr_sigma=1.0)),
    "EasyCache": ("demo", node("easycache", "EasyCacheNode", **CACHE)),
    "LazyCache": ("demo", node("easycache", "LazyCacheNode", **CACHE)),
    "HyperTile": (
        "demo",
        node("hypertile", "HyperTile", tile_size=32, swap_size=2, max_depth=2, scale_depth=False),
    ),
    "TomePatchModel": ("sd15", node("tomesd", "TomePatchModel", ratio=0.3)),
    "PatchModelAddDownscale": ("demo", node("model_downscale", "PatchModelAddDownscale", **SHRINK)),
    "ModelSamplingDiscrete": (
        "demo",
        node("model_advanced", "ModelSamplingDiscrete", sampling="v_prediction", zsnr=True),
    ),
    "ModelSamplingContinuousEDM": ("demo", node("model_advanced", "ModelSamplingContinuousEDM", **EDM)),
    "ModelSamplingAuraFlow": ("flux", node("model_advanced", "ModelSamplingAuraFlow", shift=5.0)),
    "ModelSamplingFlux": ("flux", node("model_advanced", "ModelSamplingFlux", **FLUX)),
}
