"""What a weight file is that is no model to distil, by its names and shapes; one sentence each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...core.card import KEY, CardError, StudentCard
from ...core.header import Header, Shapes
from ..run import state_file
from . import merged

BASE = "give the model that it belongs to instead"
INSTEAD = "load a model that makes pictures of text, such as one of Stable Diffusion 1.x, 2.x, XL, 3.x or Flux"
ELSEWHERE = "it is not loaded here; if ComfyUI loads it, try to distil it there"


@dataclass(frozen=True)
class Refusal:
    """A file that is refused: `pattern` is in the name of one of its weights; `what` it is, `todo` what to do."""

    pattern: str
    what: str
    todo: str = INSTEAD


# What is added to a model. A LoRA's names hold a model's own, so these are looked for first.
ADDITIONS = (
    Refusal(r"lora_(up|down|mid|A|B|magnitude|linear)|\.lora\.|^lora_", "a LoRA, not a model", BASE),
    Refusal(
        r"hada_w[12]|lokr_w[12]|oft_(blocks|diag)|dora_scale|\.[ab][12]\.weight$|\.on_input$|\.diff(_b)?$",
        "a LyCORIS (LoHa, LoKr, OFT or the like), not a model",
        BASE,
    ),
    Refusal(
        r"^(control_model|control_net|controlnet\w*|input_hint_block|zero_convs|control_(layers|blocks|all)\w*)\.",
        "a ControlNet, not a model",
        BASE,
    ),
    Refusal(r"^(image_proj|ip_adapter)\.", "an IP-Adapter, not a model", BASE),
    Refusal(r"^(adapter\.)?body\.\d+\.(in_conv|block1|resnets)", "a T2I-Adapter, not a model", BASE),
    Refusal(r"motion_module", "a motion module of AnimateDiff, which makes videos"),
)
# Models that cannot be distilled here.
MODELS = (
    Refusal(r"time_stack|time_mixer|temporal_transformer|temp_convs", "a video model (Stable Video Diffusion's kind)"),
    Refusal(r"^head\.modulation$", "a video model (Wan)"),
    Refusal(r"^patchify_proj\.|^audio_patchify_proj\.", "a video model (LTX-Video)"),
    Refusal(r"individual_token_refiner", "a video model (HunyuanVideo's kind)"),
    Refusal(r"attn\.qkv_x\.", "a video model (Mochi)"),
    Refusal(r"^net\.(blocks|x_embedder)\.|^(blocks\.block0\.)", "a model of Cosmos' kind", ELSEWHERE),
    Refusal(r"^patch_embed\.text_proj", "a video model (CogVideoX)"),
    Refusal(r"^edm_mean$", "Playground 2.5, whose noise levels are EDM's own", INSTEAD),
    Refusal(r"^(double|single)_stream_modulation", "FLUX.2", ELSEWHERE),
    Refusal(r"^early_stream_modulations", "FLUX.3", ELSEWHERE),
    Refusal(r"^double_stream_blocks\.", "HiDream", ELSEWHERE),
    Refusal(r"^double_layers\.0\.attn\.w1q", "AuraFlow", ELSEWHERE),
    Refusal(r"^clip_txt_mapper|\.channelwise\.", "Stable Cascade", ELSEWHERE),
    Refusal(r"^txtfusion\.", "Krea 2", ELSEWHERE),
    Refusal(r"^txt_in\.text_norm\.", "Qwen-Image 2.1", ELSEWHERE),
    Refusal(r"^mlp_t5\.", "HunyuanDiT", ELSEWHERE),
)
# Parts of a model by themselves, where no denoiser was found.
PARTS = (
    Refusal(r"cross_attn\.kv_linear", "PixArt", ELSEWHERE),
    Refusal(r"^model_ema\.", "only the moving average (EMA) of a model's weights, without the weights", INSTEAD),
    Refusal(
        r"(^|\.)(encoder|decoder)\.(conv_in|conv1|down|up|mid|middle|down_blocks|up_blocks|project_in)\.|taesd_",
        "an autoencoder (VAE) alone",
        "give the model, and this file as its vae",
    ),
    Refusal(r"(^|\.)(vision_model|visual)\.", "an image encoder (CLIP vision) alone"),
    Refusal(
        r"text_model\.(encoder|embeddings)|transformer\.resblocks\.|SelfAttention\.q\.|^(model\.)?layers\.\d+\.self_attn\.",
        "a text encoder alone",
    ),
    Refusal(
        r"RDB1\.|rdb1\.|RRDB|residual_group\.|^conv_first\.|^body\.\d+\.weight$",
        "an upscaler (ESRGAN's kind)",
    ),
    Refusal(
        r"^(single_)?transformer_blocks\.\d+\.|^(down|up)_blocks\.",
        "a part of a diffusers folder",
        "give the folder that holds model_index.json",
    ),
)
QUANTISED = (
    Refusal(r"bitsandbytes__(nf4|fp4)|\.quant_state\.", "in 4 bits, by bitsandbytes"),
    Refusal(r"\.SCB$|weight_format$|\.(absmax|quant_map|nested_absmax)$", "by bitsandbytes"),
    Refusal(r"\.(qweight|wscales|qzeros)$", "in 4 bits, by Nunchaku, AWQ or GPTQ"),
    Refusal(r"scaled_fp8$|\.(scale_weight|weight_scale|scale_input|input_scale|weight_scale_2)$", "in scaled fp8"),
    Refusal(r"comfy_quant$", "by ComfyUI"),
)
CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler (Stable Diffusion x4)",
    8: "a model that edits pictures (InstructPix2Pix's kind)",
    9: "an inpainting model",
}
FLUX_CHANNELS = {128: "a model of Flux's control kind (Canny or Depth)", 384: "an inpainting model (Flux Fill)"}


def _first(refusals: Iterable[Refusal], shapes: Shapes) -> Refusal | None:
    """The first whose pattern is found in a weight's name."""
    return next((r for r in refusals if any(map(re.compile(r.pattern).search, shapes))), None)


def _embedding(shapes: Shapes) -> bool:
    """Whether these few vectors are a textual inversion's."""
    known = {"emb_params", "clip_l", "clip_g", "t5xxl"}
    small = len(shapes) <= 4 and all(
        len(s) in (1, 2) and s[-1] in (768, 1024, 1280, 2048, 4096) for s in shapes.values()
    )
    return bool(shapes) and small and all(n in known or re.fullmatch(r"<.*>|\*|string_to_param.*", n) for n in shapes)


def addition(header: Header) -> str:
    """What of a model's additions this file is, in words, and what to do; "" where it is none."""
    if KEY in header.metadata and not merged.of_file(header):
        try:
            base = StudentCard.from_metadata(header.metadata).base_model
        except CardError:
            base = "its base"
        return f"is a student that TurboDistill made of {base}: give it as the student, and {base} as the model"
    if state_file.KEY in header.metadata:
        return "is the state of a training, from which `distill` goes on, not a model: give its base instead"
    whole = any(n.startswith("model.diffusion_model.") for n in header.shapes)  # an addition may lie beside it
    if not whole and (refusal := _first(ADDITIONS, header.shapes)):
        return f"is {refusal.what}: {refusal.todo}"
    if _embedding(header.shapes):
        return f"is an embedding (textual inversion), not a model: {BASE}"
    return ""


def quantised(header: Header) -> str:
    """How this file's weights are quantised, in words, and what to do; "" where they are not."""
    refusal = _first(QUANTISED, header.shapes)
    whole_numbers = [n for n, d in header.dtypes.items() if d in ("U8", "I8") and len(header.shapes[n]) > 1]
    if refusal is None and not whole_numbers:
        return ""
    return (
        f"holds quantised weights ({refusal.what if refusal else 'in whole numbers'}): give it in float16 or bfloat16"
    )


def unusable(shapes: Shapes) -> str:
    """What this denoiser (names without prefix) is that cannot be distilled here, in words; "" where it can be."""
    refusal = _first(MODELS, shapes)
    return f"is {refusal.what}: {refusal.todo}" if refusal else ""


def channels(shapes: Shapes, first: str, usual: int, known: dict[int, str]) -> str:
    """What a denoiser with other channels in is, in words; "" where its first layer takes the `usual` ones."""
    found = shapes[first][1]
    if found == usual:
        return ""
    what = known.get(found) or f"a model with {found} channels in, where {usual} are usual"
    return f"is {what}, which needs a picture beside the text: {INSTEAD}"


def part(shapes: Shapes) -> str:
    """What a file without a denoiser is, in words."""
    refusal = _first(PARTS, shapes)
    if refusal:
        return f"is {refusal.what}: {refusal.todo}"
    some = ", ".join(sorted(shapes)[:3]) or "none"
    return f"is of a kind that is not known (its weights are called {some:.200}): {INSTEAD}"
