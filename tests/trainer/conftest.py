"""Toy hosts for the trainer's tests: a checkpoint with text, pictures and weights in a few thousand parameters."""

from __future__ import annotations

import copy
import csv
import importlib.util
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from turbodistill.core.card import fingerprint
from turbodistill.core.decoder import Decoder
from turbodistill.core.denoiser import Cond, Denoiser
from turbodistill.core.schedule import DiscreteSchedule
from turbodistill.core.student import Student
from turbodistill.core.vision import Features
from turbodistill.trainer.config import Config
from turbodistill.trainer.data.pairs import load_pairs, make_pairs
from turbodistill.trainer.data.samples import Samples
from turbodistill.trainer.loop.start import features
from turbodistill.trainer.loop.state import State
from turbodistill.trainer.run import run, training
from turbodistill.trainer.run.state_file import read_state

TOKENS, STATES, SIDE = 5, 16, 8
WORDS = ("fox", "owl", "elk", "ant", "bee", "cod", "emu", "yak", "rat", "hen", "pig", "ram")


def _beside(name):
    """A module of the folder of all tests."""
    spec = importlib.util.spec_from_file_location(
        f"turbodistill_trainer_{name}", Path(__file__).parents[1] / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toys, pickles = _beside("toys"), _beside("pickles")


class ToyHost:
    """Text states from a hash of the prompt; pictures are a linear map of the latents, four times as large."""

    name, architecture, text_hash = "toy", "toy-v1", ""
    own, clip_skip, sampling, beside, eye = True, 0, None, (0, 0), None
    latent_shape, resolution = (4, SIDE, SIDE), (4 * SIDE, 4 * SIDE)

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self.base_hash = fingerprint(denoiser.backbone)

    def aside(self, decodes: bool = False):
        return nullcontext()

    def sized(self, width: int, height: int) -> ToyHost:
        other = copy.copy(self)
        other.resolution, other.latent_shape = (width, height), (4, height // 4, width // 4)
        return other

    def encode_text(self, prompts: list[str]) -> Cond:
        seeds = [zlib.crc32(p.encode()) for p in prompts]
        return Cond(torch.stack([torch.randn(TOKENS, STATES, generator=_seeded(s)) for s in seeds]))

    @property
    def decoder(self) -> Decoder:
        return Decoder(4, nn.Identity, lambda _, z: F.interpolate(z[:, :3] / 4 + 0.5, scale_factor=4.0), own=True)

    @property
    def tiny_decoder(self) -> Decoder:
        raise ValueError("pixel_decoder is 'tiny', and this toy has none")

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        small = F.avg_pool2d(images, 4) * 4 - 2
        return torch.cat([small, small.mean(1, keepdim=True)], 1)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conv_host(seed: int = 0) -> ToyHost:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyHost(toys.Toy(toys.PlainBackbone(text=STATES).eval(), DiscreteSchedule(), "eps"))


def unet_denoiser(attention: bool = True) -> Denoiser:
    return toys.UNetDenoiser(toys.small_unet(STATES, attention), DiscreteSchedule(), "eps")


def unet_host() -> ToyHost:
    return ToyHost(unet_denoiser())


def config(**changes) -> Config:
    """Two quick updates with every part of the default loss; `changes` win."""
    small = {
        "rank": 2, "pairs": 12, "pair_steps": 2, "pair_sampler": "euler", "guidance": 2.0, "batch_size": 4,
        "updates": 2, "regression_updates": 0, "discriminator_warmup": 0, "adversarial_ramp": 0, "lr": 1e-2,
        "lr_decay": 0.0, "head_channels": 8, "precision": "float32", "preview_every": 0, "evaluate_every": 0,
        "taps": "blocks.0,blocks.1",
    }  # fmt: skip
    return Config(**(small | changes))


def pairs(host: ToyHost, settings: Config, folder, prompts=WORDS) -> Samples:
    for _ in make_pairs(host, settings, prompts, folder):
        pass
    return load_pairs(folder, settings.pairs)


def state(host: ToyHost, settings: Config, samples: Samples, seeing: Sequence[Features] | None = None) -> State:
    torch.manual_seed(settings.seed)
    student = Student(host.denoiser, settings.rank, settings.alpha or None, settings.targets, settings.prediction)
    return State.create(student, settings, samples, seeing or features(host, settings))


def started(host: ToyHost, folder, **changes) -> tuple[State, Samples]:
    """A fresh training of these settings, and its pairs."""
    settings = config(**changes)
    samples = pairs(host, settings, folder)
    return state(host, settings, samples), samples


def reals(host: ToyHost) -> Samples:
    """Pictures that the teacher could not have made."""
    prompts = ["a photograph"] * 6
    return Samples(torch.randn(6, *host.latent_shape), host.encode_text(prompts), prompts)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tensors(path) -> dict[str, Tensor]:
    return load_file(path)


def names(events) -> list[str]:
    return [type(e).__name__ for e in events]


def go(host: ToyHost, settings: Config, folder, **more) -> list:
    """All events of a run to its end."""
    return list(run.run(host, settings, folder, WORDS, **more))


def updates(folder) -> list[int]:
    """Those in the history of a run."""
    with (folder / training.HISTORY).open(newline="") as file:
        return [int(row["update"]) for row in csv.DictReader(file)]


def saved(folder) -> dict:
    """The last state of a run."""
    return read_state(folder / training.STATE)


class Refused(Exception):
    """What a host raises in a pass, when the user cancels there."""


def fail_at(host, number, error=Refused):
    """Raise in a pass of the network, the first being 1; returns the hook's handle."""
    passes = iter(range(1, 10**6))

    def look(*_):
        if next(passes) == number:
            raise error

    return host.denoiser.backbone.register_forward_pre_hook(look)


def flip(path):
    """Change one bit of a file's last numbers."""
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 0xFF
    path.write_bytes(raw)


def truncate(path):
    """Leave only the beginning of a file."""
    path.write_bytes(path.read_bytes()[:200])


def strip(path):
    """Write a file again without what it says of itself."""
    save_file(load_file(path), path)


@pytest.fixture(scope="session")
def kit():
    """The functions above: tests are no package, and nothing can import a conftest."""
    return SimpleNamespace(**globals())


@pytest.fixture
def host():
    return conv_host()


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A complete Stable Diffusion folder in a few hundred kilobytes, made without a network."""
    import json

    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = tmp_path_factory.mktemp("tokenizer")
    alphabet = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    entries = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(a + "</w>" for a in alphabet)]
    (words / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(entries)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=16)
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(entries), hidden_size=STATES, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        tokenizer,
        toys.small_unet(STATES),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reference_zip(tmp_path_factory):
    """Real pictures of two styles that differ: flat colours, and noise."""
    import io
    import json
    import zipfile

    import numpy
    from PIL import Image

    path = tmp_path_factory.mktemp("reference") / "reference.zip"
    rows, noise = [], numpy.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(24):
            style = ("flat", "rough")[i % 2]
            flat = Image.new("RGB", (32, 32), (10 * i, 255 - 10 * i, 90))
            rough = Image.fromarray(noise.integers(0, 256, (32, 32), dtype="uint8")).convert("RGB")
            picture = flat if style == "flat" else rough
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            archive.writestr(f"{i}.png", buffer.getvalue())
            split = "heldout" if i >= 16 else "train"
            rows.append({"file_name": f"{i}.png", "text": f"thing {i}, {style}", "style": style, "split": split})
        archive.writestr("metadata.jsonl", "\n".join(map(json.dumps, rows)))
    return path
