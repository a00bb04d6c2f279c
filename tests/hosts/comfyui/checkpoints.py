"""Synthetic checkpoints: the layouts by which ComfyUI tells the architectures, few layers, seeded random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from turbodistill.core.card import StudentCard, fingerprint
from turbodistill.core.denoiser import Denoiser
from turbodistill.core.lora import FORMATS
from turbodistill.core.naming import to_single_file
from turbodistill.core.schedule import DiscreteSchedule
from turbodistill.core.student import FULL_PREFIX, Student, student_bytes
from turbodistill.trainer.pipeline.denoisers import UNetDenoiser

# ComfyUI tells Stable Diffusion 1 by the first width and the text's.
SD15 = {
    "sample_size": 8,
    "block_out_channels": (320, 320),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
# Stable Diffusion 2 by the text's width and the linear projections; its heads are of 64.
SD2 = SD15 | {"attention_head_dim": 5, "cross_attention_dim": 1024, "use_linear_projection": True}
# An SDXL is told by the transformers' depths on the way down, too; those of KOALA-700M are the fewest.
SDXL = {
    "sample_size": 8,
    "block_out_channels": (320, 320, 320),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (0, 2, 5),
    "reverse_transformer_layers_per_block": (0, 1, 0),
    "attention_head_dim": 5,
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3_DEPTH, SD3_TEXT, SD3_POOLED = 4, 64, 32
FLUX_WIDTH, FLUX_TEXT, FLUX_POOLED = 64, 48, 32


# ComfyUI's marks of models that predict v. Of a Stable Diffusion 2 it is how far a layer's biases are apart, which
# only the full size has; of EDM's levels, where they end.
MARKS = {
    "sdxl_v": {"v_pred": torch.zeros(1)},
    "sdxl_edm": {"edm_vpred.sigma_max": torch.tensor(120.0)},
    "sd2_v": {f"{FULL_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])},
}


@dataclass(frozen=True)
class Checkpoint:
    """A file in models/checkpoints.

    `width` and `pooled` are the sizes of its text's states and summary, `scale` leads from ComfyUI's
    latents to the network's; `denoiser` is the same weights through diffusers' classes, where we have
    an adapter of them.
    """

    file: str
    width: int
    pooled: int
    prediction: str
    scale: float
    weights: dict[str, Tensor]
    denoiser: Denoiser | None = None


def unet_denoiser(config: dict, seed: int, prediction: str) -> UNetDenoiser:
    """A diffusers UNet of weights that float16 holds exactly."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**config).half().float().eval().requires_grad_(False)
    return UNetDenoiser(unet, DiscreteSchedule(), prediction)


def single_file(unet) -> dict[str, Tensor]:
    """A UNet's weights as a checkpoint names and keeps them, without the prefix."""
    table = to_single_file(unet.state_dict())
    return {table[k]: v.half() for k, v in unet.state_dict().items()}


def random_weight(*shape: int) -> Tensor:
    """A weight that keeps its input's size."""
    return (torch.randn(shape) / max(torch.Size(shape[1:]).numel(), 1) ** 0.5).half()


def sd3_weights(depth: int = SD3_DEPTH) -> dict[str, Tensor]:
    """The transformer of Stable Diffusion 3, 64 wide for each layer."""
    width = 64 * depth
    layers = {
        "context_embedder": (width, SD3_TEXT),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, SD3_POOLED),
        "y_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (2 * 2 * 16, width),
        "x_embedder.proj": (width, 16, 2, 2),
    }
    for i in range(depth):
        for side in ("x", "context"):
            block = f"joint_blocks.{i}.{side}_block"
            ends = side == "context" and i == depth - 1  # the text goes no further than the last attention
            layers[f"{block}.attn.qkv"] = (3 * width, width)
            layers[f"{block}.adaLN_modulation.1"] = ((2 if ends else 6) * width, width)
            if not ends:
                layers[f"{block}.attn.proj"] = (width, width)
                layers[f"{block}.mlp.fc1"] = (4 * width, width)
                layers[f"{block}.mlp.fc2"] = (width, 4 * width)
    torch.manual_seed(3)
    weights = {f"{name}.weight": random_weight(*shape) for name, shape in layers.items()}
    weights |= {f"{name}.bias": torch.zeros(shape[0]).half() for name, shape in layers.items()}
    return weights | {"pos_embed": random_weight(1, 16 * 16, width)}


def flux_weights(guidance: bool, double: int = 2, single: int = 2) -> dict[str, Tensor]:
    """The transformer of Flux, narrow: dev takes a guidance strength, schnell does not.

    ComfyUI reads the numbers of blocks from a file, but takes the widths for granted: see narrow.py.
    """
    width = FLUX_WIDTH
    layers = {"img_in": (width, 64), "txt_in": (width, FLUX_TEXT)}
    for name, into in {"time": 256, "vector": FLUX_POOLED, "guidance": 256}.items():
        if guidance or name != "guidance":
            layers |= {f"{name}_in.in_layer": (width, into), f"{name}_in.out_layer": (width, width)}
    attentions = []
    for i in range(double):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            layers |= {f"{block}_mod.lin": (6 * width, width), f"{block}_attn.qkv": (3 * width, width)}
            layers |= {f"{block}_attn.proj": (width, width)}
            layers |= {f"{block}_mlp.0": (4 * width, width), f"{block}_mlp.2": (width, 4 * width)}
            attentions.append(f"{block}_attn")
    for i in range(single):
        block = f"single_blocks.{i}"
        layers |= {f"{block}.linear1": (7 * width, width), f"{block}.linear2": (width, 5 * width)}
        layers |= {f"{block}.modulation.lin": (3 * width, width)}
        attentions.append(block)
    layers |= {"final_layer.linear": (64, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    torch.manual_seed(8)
    weights = {f"{name}.weight": random_weight(*shape) for name, shape in layers.items()}
    weights |= {f"{name}.bias": torch.zeros(shape[0]).half() for name, shape in layers.items()}
    scales = (f"{a}.norm.{part}_norm.scale" for a in attentions for part in ("query", "key"))
    return weights | {name: torch.ones(width // 2).half() for name in scales}  # two heads


def inpainting_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's weights with five more channels in: a mask and a masked picture."""
    first = "input_blocks.0.0.weight"
    return weights | {first: torch.cat([weights[first], torch.zeros(320, 5, 3, 3).half()], 1)}


def controlnet_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ControlNet over a UNet's own weights, whose outputs are not zero."""
    torch.manual_seed(4)
    kept = {k: v for k, v in weights.items() if k.startswith(("time_embed.", "input_blocks.", "middle_block."))}
    blocks = len({k.split(".")[1] for k in weights if k.startswith("input_blocks.")})
    layers = {f"zero_convs.{i}.0": (320, 320, 1, 1) for i in range(blocks)} | {"middle_block_out.0": (320, 320, 1, 1)}
    hint = (3, 16, 16, 32, 32, 96, 96, 256, 320)
    layers |= {f"input_hint_block.{2 * i}": (hint[i + 1], hint[i], 3, 3) for i in range(len(hint) - 1)}
    gain = {name: 2 if "hint" in name else 1 for name in layers}  # else eight layers would make the hint faint
    kept |= {f"{name}.weight": gain[name] * random_weight(*shape) for name, shape in layers.items()}
    kept |= {f"{name}.bias": torch.zeros(shape[0]).half() for name, shape in layers.items()}
    return {f"control_model.{k}": v for k, v in kept.items()}


def text_encoder_weights() -> dict[str, Tensor]:
    """Stable Diffusion 1's text encoder: ComfyUI takes it in full size only."""
    from transformers import CLIPTextConfig, CLIPTextModel

    size = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    torch.manual_seed(5)
    weights = CLIPTextModel(size).half().state_dict()
    return {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in weights.items()}


def vae_weights() -> dict[str, Tensor]:
    """The tiny autoencoder, which ComfyUI takes in a checkpoint, too."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(6)
    weights = {}
    for name, value in AutoencoderTiny().half().state_dict().items():
        side, _, index, rest = name.split(".", 3)
        # ComfyUI's decoder counts the clamp before the first layer.
        weights[f"first_stage_model.taesd_{side}.{int(index) + (side == 'decoder')}.{rest}"] = value
    return weights


def write(models: Path) -> dict[str, Checkpoint]:
    """The checkpoints and a ControlNet in ComfyUI's model folders, by short names; Flux needs narrow.py."""
    sd15, sdxl = unet_denoiser(SD15, 1, "eps"), unet_denoiser(SDXL, 2, "eps")
    sd2 = unet_denoiser(SD2, 9, "v")
    sdxl_v = UNetDenoiser(sdxl.backbone, sdxl.schedule, "v")
    made = {
        "sd15": Checkpoint("sd15.safetensors", 768, 768, "eps", 0.18215, single_file(sd15.backbone), sd15),
        "sd2_v": Checkpoint("sd2_v.safetensors", 1024, 1024, "v", 0.18215, single_file(sd2.backbone), sd2),
        "sdxl": Checkpoint("sdxl.safetensors", 2048, 1280, "eps", 0.13025, single_file(sdxl.backbone), sdxl),
        "sdxl_v": Checkpoint("sdxl_v.safetensors", 2048, 1280, "v", 0.13025, single_file(sdxl.backbone), sdxl_v),
        "sd3": Checkpoint("sd3.safetensors", SD3_TEXT, SD3_POOLED, "flow", 1.5305, sd3_weights()),
        "flux": Checkpoint("flux.safetensors", FLUX_TEXT, FLUX_POOLED, "flow", 0.3611, flux_weights(True)),
        "schnell": Checkpoint("schnell.safetensors", FLUX_TEXT, FLUX_POOLED, "flow", 0.3611, flux_weights(False)),
    }
    inpainting = inpainting_weights(made["sd15"].weights)
    fill = made["flux"].weights | {"img_in.weight": random_weight(FLUX_WIDTH, 6 * 64)}  # of as many channels in
    made |= {
        "fill": Checkpoint("fill.safetensors", FLUX_TEXT, FLUX_POOLED, "flow", 0.3611, fill),
        "inpainting": Checkpoint("inpainting.safetensors", 768, 768, "eps", 0.18215, inpainting),
        "sdxl_edm": Checkpoint("sdxl_edm.safetensors", 2048, 1280, "v", 0.13025, made["sdxl"].weights),
    }
    for folder in ("checkpoints", "controlnet", "diffusion_models", "loras"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    for name, checkpoint in made.items():
        weights = {FULL_PREFIX + k: v for k, v in checkpoint.weights.items()}
        save_file(weights | MARKS.get(name, {}), models / "checkpoints" / checkpoint.file)
    save_file(controlnet_weights(made["sd15"].weights), models / "controlnet" / "sd15.safetensors")
    return made


def write_bare(name: str, folder: Path) -> Path:
    """One of the checkpoints by itself, Stable Diffusion 1 or Flux, or the ControlNet; its file."""
    weights = flux_weights(True) if name == "flux" else single_file(unet_denoiser(SD15, 1, "eps").backbone)
    named = {FULL_PREFIX + k: v for k, v in weights.items()}
    save_file(controlnet_weights(weights) if name == "controlnet" else named, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def write_whole(sd15: Checkpoint, models: Path) -> str:
    """Stable Diffusion 1 with its text encoder and autoencoder; the file's name."""
    whole = {FULL_PREFIX + k: v for k, v in sd15.weights.items()} | text_encoder_weights() | vae_weights()
    save_file(whole, models / "checkpoints" / "sd15_whole.safetensors")
    return "sd15_whole.safetensors"


def card_of(checkpoint: Checkpoint, **changed) -> StudentCard:
    """The card of a student of a checkpoint."""
    about = {
        "kind": "lora",
        "base_model": checkpoint.file.removesuffix(".safetensors"),
        "base_hash": fingerprint(checkpoint.weights),
        "architecture": "tests",
        "prediction": checkpoint.prediction,
        "base_prediction": checkpoint.prediction,
        "timesteps": (999, 749, 499, 249),
        "guidance": 4.0,
        "resolution": (64, 64),
        "rank": 4,
        "alpha": 4.0,
    }
    return StudentCard(**about | changed)


def write_student(path: Path, student: Student, card: StudentCard) -> None:
    """A student's file, as the trainer writes it."""
    path.write_bytes(student_bytes(student, card))


def write_sd3_student(path: Path, checkpoint: Checkpoint, rank: int = 4) -> None:
    """A LoRA on the attention of Stable Diffusion 3, for which the command line has no model of its own yet."""
    tensors = {}
    for name in sorted(n.removesuffix(".weight") for n in checkpoint.weights if n.endswith("attn.qkv.weight")):
        out, into = checkpoint.weights[f"{name}.weight"].shape
        key = FORMATS["kohya"] + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = random_weight(rank, into)
        tensors[f"{key}.lora_up.weight"] = random_weight(out, rank)
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path, card_of(checkpoint, targets="attention").to_metadata())
