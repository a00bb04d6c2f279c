"""Small checkpoints of the real classes, in the original layouts' names, with the modules that they were made of."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from turbodistill.core.naming import to_single_file

WHOLE = "model.diffusion_model."
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
TOKENS = [*LETTERS, *(a + "</w>" for a in LETTERS), "!", "!</w>", "<|startoftext|>", "<|endoftext|>"]
ROWS = 64  # of the text encoders' tables of tokens


@dataclass
class Made:
    """A checkpoint's weights by the names in its file, and the modules that have them, by diffusers' components."""

    weights: dict[str, Tensor]
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def write(self, path: Path, metadata: dict[str, str] | None = None, **more: Tensor) -> Path:
        save_file({k: v.clone().contiguous() for k, v in (self.weights | more).items()}, path, metadata)
        return path

    def without(self, *prefixes: str) -> Made:
        return Made({k: v for k, v in self.weights.items() if not k.startswith(prefixes)}, self.modules)

    def renamed(self, old: str, new: str) -> Made:
        return Made({re.sub(old, new, k): v for k, v in self.weights.items()}, self.modules)


def seeded(make, seed: int = 0) -> nn.Module:
    """A module with random weights that float16 holds, biases and norms, too: equal ones would hide a wrong name."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return module.half().eval().requires_grad_(False)


def unet(text: int, linear: bool, **more):
    from diffusers import UNet2DConditionModel

    return seeded(
        lambda: UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(1, 2) if linear else 8,
            cross_attention_dim=text,
            use_linear_projection=linear,
            **more,
        )
    )


def unet_weights(module: nn.Module, prefix: str = WHOLE) -> dict[str, Tensor]:
    table = to_single_file(module.state_dict())
    return {prefix + table[k]: v for k, v in module.state_dict().items()}


def vae(latents: int = 4, **more):
    from diffusers import AutoencoderKL

    return seeded(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64),
            latent_channels=latents,
            layers_per_block=1,
            **more,
        ),
        1,
    )


def vae_weights(module, prefix: str = "first_stage_model.", convolutions: bool = True) -> dict[str, Tensor]:
    """LDM's names, written from its own code: the decoder counts its levels from the finest."""
    top, found = len(module.config.block_out_channels) - 1, {}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

    def finest_first(match):
        return f"decoder.up.{top - int(match[1])}." + (f"block.{match[3]}" if match[2] == "resnets" else "upsample")

    for name, value in module.state_dict().items():
        name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
        name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
        name = re.sub(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)", finest_first, name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        name = name.replace("conv_shortcut", "nin_shortcut")
        for theirs, ldm in attention.items():
            name = name.replace(f"attn_1.{theirs}.", f"attn_1.{ldm}.")
        if convolutions and "attn_1" in name and value.ndim == 2:
            value = value[:, :, None, None]
        found[prefix + name] = value
    return found


def clip(width: int, projected: bool = False, activation: str = "quick_gelu", layers: int = 1):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=ROWS, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, projection_dim=width, hidden_act=activation,
    )  # fmt: skip
    return seeded(lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), 2)


def clip_weights(module, prefix: str = "cond_stage_model.transformer.") -> dict[str, Tensor]:
    """transformers' names as those that wrote checkpoints had them: with an inner text_model."""
    found = {}
    for name, value in module.state_dict().items():
        inner = name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
        found[prefix + inner] = value
    return found


def open_clip_weights(module, prefix: str, last: bool = False) -> dict[str, Tensor]:
    """OpenCLIP's names: query, key and value in one, and the projection from the other side."""
    inner = {k.removeprefix("text_model."): v for k, v in module.state_dict().items()}
    found = {
        "token_embedding.weight": inner["embeddings.token_embedding.weight"],
        "positional_embedding": inner["embeddings.position_embedding.weight"],
        "ln_final.weight": inner["final_layer_norm.weight"],
        "ln_final.bias": inner["final_layer_norm.bias"],
        "logit_scale": torch.ones(()),
    }
    if "text_projection.weight" in inner:
        found["text_projection"] = inner["text_projection.weight"].T.contiguous()
    for i in range(module.config.num_hidden_layers):
        theirs, ours = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            three = [inner[f"{theirs}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            found[f"{ours}.attn.in_proj_{kind}"] = torch.cat(three)
            found[f"{ours}.attn.out_proj.{kind}"] = inner[f"{theirs}.self_attn.out_proj.{kind}"]
            found[f"{ours}.ln_1.{kind}"] = inner[f"{theirs}.layer_norm1.{kind}"]
            found[f"{ours}.ln_2.{kind}"] = inner[f"{theirs}.layer_norm2.{kind}"]
            found[f"{ours}.mlp.c_fc.{kind}"] = inner[f"{theirs}.mlp.fc1.{kind}"]
            found[f"{ours}.mlp.c_proj.{kind}"] = inner[f"{theirs}.mlp.fc2.{kind}"]
    return {prefix + k: v for k, v in found.items()}


def sd1() -> Made:
    """Stable Diffusion 1 as the old files have it, with what training left."""
    parts = {"unet": unet(768, False), "vae": vae(), "text_encoder": clip(768)}
    weights = unet_weights(parts["unet"]) | vae_weights(parts["vae"]) | clip_weights(parts["text_encoder"])
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    left = {"alphas_cumprod": (1000,), "model_ema.decay": (), "model_ema.diffusion_modelinput_blocks00bias": (64,)}
    weights |= {name: torch.rand(shape) for name, shape in left.items()}
    return Made(weights, parts)


def sd2() -> Made:
    parts = {"unet": unet(1024, True), "vae": vae(), "text_encoder": clip(1024, activation="gelu")}
    weights = unet_weights(parts["unet"]) | vae_weights(parts["vae"])
    return Made(weights | open_clip_weights(parts["text_encoder"], "cond_stage_model.model."), parts)


def sdxl() -> Made:
    added = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": (2, 1),
    }  # fmt: skip
    parts = {
        "unet": unet(2048, True, **added),
        "vae": vae(),
        "text_encoder": clip(768),
        "text_encoder_2": clip(1280, True, "gelu"),
    }
    weights = unet_weights(parts["unet"]) | vae_weights(parts["vae"])
    weights |= clip_weights(parts["text_encoder"], "conditioner.embedders.0.transformer.")
    return Made(weights | open_clip_weights(parts["text_encoder_2"], "conditioner.embedders.1.model."), parts)


SD_BLOCKS = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
FULL = {  # the published configurations
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8} | SD_BLOCKS,
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
    | SD_BLOCKS,
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def full(name: str) -> Made:
    """A whole checkpoint in its real size, of which there are names and shapes alone."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text(kind, width, layers):
        return kind(
            CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                num_attention_heads=width // 64, projection_dim=width,
            )
        )  # fmt: skip

    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel(**FULL[name]),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
        }
        if name == "sd2":  # of its 24 layers the last is in the file and never used
            parts["text_encoder"] = text(CLIPTextModel, 1024, 24)
            texts = open_clip_weights(parts["text_encoder"], "cond_stage_model.model.")
        else:
            parts["text_encoder"] = text(CLIPTextModel, 768, 12)
            at = "conditioner.embedders.0.transformer." if name == "sdxl" else "cond_stage_model.transformer."
            texts = clip_weights(parts["text_encoder"], at)
        if name == "sdxl":
            parts["text_encoder_2"] = text(CLIPTextModelWithProjection, 1280, 32)
            texts |= open_clip_weights(parts["text_encoder_2"], "conditioner.embedders.1.model.")
    return Made(unet_weights(parts["unet"]) | vae_weights(parts["vae"]) | texts, parts)


READ = """
import json, sys
from turbodistill.trainer.checkpoint.single_file import load_parts
import diffusers, transformers
diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, transformers.CLIPTextModel

def most():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

before = most()
parts = load_parts(__import__("pathlib").Path(sys.argv[1]))
told = {"shapes": {}, "prediction": parts.prediction, "types": []}
for name, module in parts.modules.items():
    told["shapes"][name] = {n: list(v.shape) for n, v in module.state_dict().items()}
    told["types"] = sorted({str(v.dtype) for v in module.state_dict().values()} | set(told["types"]))
print("RESULT" + json.dumps([told, most() - before]))
"""


def in_a_process(path: Path) -> tuple[dict, int]:
    """What a file's modules are when another process reads it, and by how many bytes its memory grew at most."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux: there a process's peak of memory can be read")
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    told, peak = json.loads(done.stdout.partition("RESULT")[2])
    return told, peak


def equal(found: nn.Module, made: nn.Module) -> bool:
    """Whether a loaded module has just the weights of the one that its file was made of, bit for bit, and its type."""
    a, b = found.state_dict(), made.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def files():
    """The functions above: tests are no package, and nothing can import a conftest."""
    return SimpleNamespace(**globals())


@pytest.fixture(scope="session")
def small_sd1():
    return sd1()


@pytest.fixture(scope="session")
def small_sd2():
    return sd2()


@pytest.fixture(scope="session")
def small_sdxl():
    return sdxl()


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """A folder with a tokenizer that knows single letters."""
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="session")
def layouts():
    """The module `layouts.py`."""
    spec = importlib.util.spec_from_file_location("turbodistill_layouts", Path(__file__).with_name("layouts.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
