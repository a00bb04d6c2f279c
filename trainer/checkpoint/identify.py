"""What a single file is: its architecture, where its parts lie, and what it says of its predictions."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...core import architecture as names
from ...core.architecture import WHOLE, architecture_of
from ...core.header import Header, Shapes
from ...core.schedule import prediction_of_name
from .errors import ModelError
from .refusals import CHANNELS, FLUX_CHANNELS, addition, channels, part, quantised, unusable

# Before a denoiser's names, as the tools of these years write them; the last for those that hold nothing else.
PREFIXES = (WHOLE, "diffusion_model.", "model.model.", "module.", "model.", "transformer.", "unet.", "")
VAES = ("first_stage_model.", "vae.")
# Where a text encoder lies -> what it is. CLIP's are in transformers' names, OpenCLIP's in its own.
TEXTS = {
    "cond_stage_model.transformer.": "clip_l",
    "cond_stage_model.model.": "open_clip_h",
    "conditioner.embedders.0.transformer.": "clip_l",
    "conditioner.embedders.1.model.": "open_clip_g",
    "text_encoders.clip_l.transformer.": "clip_l",
    "text_encoders.clip_g.transformer.": "clip_g",
    "text_encoders.t5xxl.transformer.": "t5xxl",
}
FIRST = {
    **dict.fromkeys((names.SD1, names.SD2, names.SDXL), ("input_blocks.0.0.weight", 4)),
    **dict.fromkeys((names.SD3, names.SD35_MEDIUM, names.SD35_LARGE), ("x_embedder.proj.weight", 16)),
    **dict.fromkeys((names.FLUX_DEV, names.FLUX_SCHNELL, names.CHROMA), ("img_in.weight", 64)),
}
# A weight that a transformer has in its original names, and not in diffusers'.
ORIGINAL = {
    **{architecture: first for architecture, (first, _) in FIRST.items()},
    **dict.fromkeys((names.LUMINA2, names.Z_IMAGE), "x_embedder.weight"),
    names.SANA: "x_embedder.proj.weight",
}
UNETS = (names.SD1, names.SD2, names.SDXL)
# Of Stable Diffusion 2 only the weights tell the prediction type: this layer's, which ComfyUI looks at, too.
SD2_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"


@dataclass(frozen=True)
class Content:
    """What a file holds.

    `prefix` and `vae` come before the names of the denoiser and the autoencoder (None where there is none), `texts`
    before those of text encoders, with their kinds. `prediction` is eps, v, flow, or "" where nothing says it.
    """

    architecture: str
    prefix: str
    vae: str | None
    texts: dict[str, str] = field(default_factory=dict)
    prediction: str = ""
    zero_terminal: bool = False

    @property
    def unet(self) -> bool:
        return self.architecture in UNETS


def below(shapes: Shapes, prefix: str) -> Shapes:
    """Names that begin with the prefix, without it."""
    return {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}


def identify(header: Header) -> Content:
    """What the file is; raises ModelError for what is no base model, in a sentence that names it."""
    if reason := addition(header) or quantised(header):
        raise ModelError(f"{header.path} {reason}")
    shapes = header.shapes
    prefix, architecture = _denoiser(shapes)
    network = below(shapes, prefix)
    reason = unusable(network) or unusable(shapes)
    if not reason and architecture == names.SDXL_REFINER:
        reason = "is the refiner of Stable Diffusion XL, which only ends what its base began: give the base model"
    if not reason and not architecture:
        reason = _unet_of_no_kind(network) or part(shapes)
    if not reason and architecture not in UNETS and ORIGINAL.get(architecture, "") not in (*network, ""):
        reason = "is a part of a diffusers folder: give the folder that holds model_index.json"
    reason = reason or _more_channels(architecture, network)
    if reason:
        raise ModelError(f"{header.path} {reason}")
    prediction, zero = _prediction(header, architecture)
    vae = next((v for v in VAES if f"{v}decoder.conv_in.weight" in shapes), None)
    texts = {at: kind for at, kind in TEXTS.items() if any(n.startswith(at) for n in shapes)}
    return Content(architecture, prefix, vae, texts, prediction, zero)


def _denoiser(shapes: Shapes) -> tuple[str, str]:
    """The prefix of the denoiser's names and its architecture; "" where it is none that is known."""
    for prefix in PREFIXES:
        if architecture := architecture_of(below(shapes, prefix)):
            return prefix, architecture
    return next((p for p in PREFIXES if p and any(n.startswith(p) for n in shapes)), ""), ""


def _unet_of_no_kind(network: Shapes) -> str:
    """Of a UNet that attends to no text of a known width, what to say."""
    if "input_blocks.0.0.weight" not in network:
        return ""
    width = next((s[-1] for n, s in network.items() if n.endswith("attn2.to_k.weight")), 0)
    kind = f"attends to text of width {width}" if width else "attends to no text"
    return f"holds a UNet that {kind}: Stable Diffusion 1.x (768), 2.x (1024) and XL (2048) are known"


def _more_channels(architecture: str, network: Shapes) -> str:
    """What a denoiser is that takes more than noisy latents, in words."""
    if architecture == names.SD2 and "label_emb.0.0.weight" in network:
        return "is Stable Diffusion unCLIP, which needs a picture beside the text: give Stable Diffusion 2.1 itself"
    if architecture not in FIRST or FIRST[architecture][0] not in network:
        return ""
    first, usual = FIRST[architecture]
    return channels(network, first, usual, CHANNELS if architecture in UNETS else FLUX_CHANNELS)


def _prediction(header: Header, architecture: str) -> tuple[str, bool]:
    """The prediction type that the file says, "" where it does not, and whether its last step holds no signal."""
    if architecture not in UNETS:
        return "flow", False
    if "edm_vpred.sigma_max" in header.shapes:
        raise ModelError(
            f"{header.path} predicts v over EDM's noise levels (it holds edm_vpred.sigma_max), which are not known "
            "here: load a model that predicts eps, or v over the usual thousand levels"
        )
    if "v_pred" in header.shapes:
        return "v", "ztsnr" in header.shapes
    prediction = prediction_of_name(header.metadata.get("modelspec.prediction_type", "").lower())
    return prediction if prediction in ("eps", "v") else "", False
