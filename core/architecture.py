"""Which architecture a network has, told by its weights' names and shapes, in ModelSpec's words.

Neither the prediction type nor a host's class says it: Stable Diffusion 2's 512-pixel model predicts eps, and there are
v-predicting models of Stable Diffusion 1 and XL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .naming import of_an_adapter, without_adapter

SD1, SD2, SDXL = "stable-diffusion-v1", "stable-diffusion-v2", "stable-diffusion-xl-v1-base"
SDXL_REFINER = "stable-diffusion-xl-v1-refiner"
SD3, SD35_MEDIUM, SD35_LARGE = (
    "stable-diffusion-v3-medium",
    "stable-diffusion-v3.5-medium",
    "stable-diffusion-v3.5-large",
)
FLUX_DEV, FLUX_SCHNELL, FLUX2 = "flux-1-dev", "flux-1-schnell", "flux-2"
CHROMA, Z_IMAGE, QWEN_IMAGE, WAN = "chroma", "z-image", "qwen-image", "wan"
LUMINA2, SANA = "lumina-2", "sana"

# Width of the text that a Stable Diffusion UNet attends to -> what it is.
UNETS = {768: SD1, 1024: SD2, 2048: SDXL, 1280: SDXL_REFINER}
KNOWN = {
    *UNETS.values(),
    *(SD3, SD35_MEDIUM, SD35_LARGE),
    *(FLUX_DEV, FLUX_SCHNELL, FLUX2),
    *(CHROMA, Z_IMAGE, QWEN_IMAGE, WAN, LUMINA2, SANA),
}
# The width of the text that these two of the same blocks embed -> which it is.
CAPTIONS = {3840: Z_IMAGE, 2304: LUMINA2}


def architecture_of(shapes: Mapping[str, Sequence[int]]) -> str:
    """Names and true shapes of a network's weights, in single-file or diffusers layout -> its architecture.

    "" where it is none of those that are known.
    """
    shapes = {without_adapter(n): s for n, s in shapes.items() if not of_an_adapter(n)}
    if any(n.startswith(("input_blocks.", "down_blocks.")) for n in shapes):
        if any("time_stack" in n or "temporal" in n for n in shapes):
            return ""  # a video model
        return UNETS.get(next((s[1] for n, s in shapes.items() if n.endswith("attn2.to_k.weight")), 0), "")
    if "joint_blocks.0.context_block.attn.qkv.weight" in shapes:
        if any(".attn2." in n for n in shapes):
            return SD35_MEDIUM
        return SD35_LARGE if "joint_blocks.37.x_block.attn.qkv.weight" in shapes else SD3
    if "double_blocks.0.img_attn.qkv.weight" in shapes:
        return _of_double_blocks(shapes)
    if "blocks.0.cross_attn.kv_linear.weight" in shapes and "blocks.0.mlp.inverted_conv.conv.weight" in shapes:
        return SANA
    if any(n.startswith("transformer_blocks.") for n in shapes) and (found := _of_diffusers(shapes)):
        return found
    caption = shapes.get("cap_embedder.1.weight", shapes.get("time_caption_embed.caption_embedder.1.weight", (0,)))
    if caption[0] in CAPTIONS:
        return CAPTIONS[caption[0]]
    if shapes.get("txt_norm.weight", (0,))[0] == 3584:
        return QWEN_IMAGE
    return WAN if "head.modulation" in shapes else ""


def _of_double_blocks(shapes: Mapping[str, Sequence[int]]) -> str:
    """The architecture of a network of Flux's blocks; or ""."""
    if "double_stream_modulation_img.lin.weight" in shapes:
        return FLUX2
    if any(n.startswith("distilled_guidance_layer.") for n in shapes):
        return CHROMA
    if "img_in.weight" not in shapes or "vector_in.in_layer.weight" not in shapes:
        return ""  # video models, and others of the same blocks
    return FLUX_DEV if any(n.startswith("guidance_in.") for n in shapes) else FLUX_SCHNELL


def _of_diffusers(shapes: Mapping[str, Sequence[int]]) -> str:
    """The architecture of a transformer in diffusers' layout that other hosts have in another; or ""."""
    if "single_transformer_blocks.0.attn.to_q.weight" in shapes:
        if any(n.startswith("distilled_guidance_layer.") for n in shapes):
            return CHROMA
        if "time_text_embed.text_embedder.linear_1.weight" not in shapes or "x_embedder.weight" not in shapes:
            return ""  # video models, and others of the same blocks
        return FLUX_DEV if any(n.startswith("time_text_embed.guidance_embedder.") for n in shapes) else FLUX_SCHNELL
    if any(n.startswith("double_stream_modulation_img.") for n in shapes):
        return FLUX2
    if "pos_embed.proj.weight" in shapes and "transformer_blocks.0.attn.add_q_proj.weight" in shapes:
        if any(".attn2." in n for n in shapes):
            return SD35_MEDIUM
        return SD35_LARGE if "transformer_blocks.37.attn.to_q.weight" in shapes else SD3
    return SANA if "caption_norm.weight" in shapes and "patch_embed.proj.weight" in shapes else ""


WHOLE = "model.diffusion_model."  # before a network's names in the file of a whole checkpoint
# The first half of a LoRA on a UNet's keys of text, as kohya, ComfyUI, diffusers and peft write it: (rank, width).
LORA = re.compile(r"attn2[._](?:processor\.)?to_k\S*(?:down|lora_A)\S*weight$")


def architecture_of_file(shapes: Mapping[str, Sequence[int]]) -> str:
    """Names and shapes in a weight file -> the architecture of the network in it, or that its LoRA is for; or ""."""
    network = {n.removeprefix(WHOLE): s for n, s in shapes.items() if n.startswith(WHOLE)}
    if found := architecture_of(network or shapes):
        return found
    return next((UNETS.get(s[1], "") for n, s in shapes.items() if LORA.search(n) and len(s) > 1), "")
