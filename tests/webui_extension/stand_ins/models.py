"""Small loaded models of AUTOMATIC1111 and Forge, and as much of their modules as works on them."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, amp, nn
from torch.nn import Linear
from turbodistill.core.schedule import scaled_linear

FILE = "/models/toy.safetensors"


def unet(toys):
    """A toy network (B, 4, H, W) that is called as a host's: a timestep up to 999, text by name."""

    class Unet(toys.BlockBackbone):
        def forward(self, x, timesteps=None, context=None, y=None, **_):
            summary = 0 if y is None else y.mean(-1)
            return super().forward(x, timesteps / 1000 + summary, context)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Unet()
    made.input_blocks = nn.ModuleList()  # by which a UNet is told from a transformer
    return made


class Text(nn.Module):
    """Three tokens of width 6 for each word or part of one, told by its letters; more than one makes two chunks."""

    def __init__(self):
        super().__init__()
        self.letters = Linear(6, 6)

    def forward(self, prompts):
        def states(text):
            chunks = max(1, -(-len(text.split()) // 2))
            codes = torch.tensor([float(ord(c) % 7) for c in text.ljust(18 * chunks)][: 18 * chunks])
            return self.letters(codes.view(-1, 6) / 7)

        return torch.stack([states(p) for p in prompts])


class DiagonalGaussianDistribution:
    def __init__(self, mean: Tensor):
        self.mean = mean

    def mode(self) -> Tensor:
        return self.mean

    def sample(self) -> Tensor:
        return self.mean + torch.randn_like(self.mean)


class Pictures(nn.Module):
    """A latent is eight by eight pixels' mean; of four channels the last is nothing."""

    __module__ = "backend.nn.vae"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def encode(self, x):
        mean = nn.functional.avg_pool2d(x * self.scale, 8)
        return DiagonalGaussianDistribution(torch.cat([mean, torch.zeros_like(mean[:, :1])], 1))

    def decode(self, z):
        return nn.functional.interpolate(z[:, :3] / self.scale, scale_factor=8.0)


class Compvis(nn.Module):
    """AUTOMATIC1111's LatentDiffusion: the UNet, the text encoder and the autoencoder."""

    def __init__(self, toys, parameterization="eps"):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = unet(toys)
        self.model.conditioning_key = "crossattn"
        self.cond_stage_model, self.first_stage_model = Text(), Pictures()
        self.parameterization, self.scale_factor = parameterization, 0.5
        self.alphas_cumprod = scaled_linear().float()
        self.sd_checkpoint_info = SimpleNamespace(filename=FILE, name="toy.safetensors", name_for_extra="toy")
        self.is_sd1, self.lowvram = True, False

    def get_learned_conditioning(self, prompts):
        return self.cond_stage_model(prompts)

    @torch.no_grad()
    def decode_first_stage(self, z):
        return self.first_stage_model.decode(z / self.scale_factor)


class Large(Compvis):
    """An SDXL's: its conditioning is a dict, and an empty negative prompt is nought."""

    def __init__(self, toys):
        super().__init__(toys)
        self.is_sd1, self.is_sdxl = False, True

    def get_learned_conditioning(self, prompts):
        states = self.cond_stage_model(prompts)
        sizes = torch.tensor([[prompts.width, prompts.height]]).float().repeat(len(prompts), 1)
        if prompts.is_negative_prompt and not any(prompts):
            states = torch.zeros_like(states)
        return {"crossattn": states, "vector": sizes}


class Predictor(nn.Module):
    """Forge's table of noise levels; `numbered` is how the network is told one."""

    def __init__(self, prediction_type="epsilon", sigmas=None, numbered=True):
        super().__init__()
        self.prediction_type, self.numbered = prediction_type, numbered
        table = scaled_linear()
        self.set_sigmas(((1 - table) / table).sqrt() if sigmas is None else sigmas)

    def set_sigmas(self, sigmas):
        self.register_buffer("sigmas", sigmas.float())

    def timestep(self, sigma):
        if self.prediction_type == "const":
            return sigma * 1000
        if not self.numbered:
            return 0.25 * sigma.log()
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(0).view(sigma.shape)

    def calculate_denoised(self, sigma, output, x):
        sigma = sigma.view(-1, 1, 1, 1)
        if self.prediction_type == "v_prediction":
            return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5
        return x - output * sigma


class KModel(nn.Module):
    def __init__(self, network, predictor):
        super().__init__()
        self.diffusion_model, self.predictor = network, predictor
        self.computation_dtype = torch.float32

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **extra):
        flow = self.predictor.prediction_type == "const"
        scaled = x if flow else x / (t.view(-1, 1, 1, 1) ** 2 + 1) ** 0.5
        transformer_options["seen"] = True
        told = {k: v.to(self.computation_dtype) for k, v in extra.items()}
        output = self.diffusion_model(
            scaled.to(self.computation_dtype),
            self.predictor.timestep(t).float(),
            context=c_crossattn.to(self.computation_dtype),
            **told,
        )
        return self.predictor.calculate_denoised(t, output.float(), x)


class Patcher:
    """A module with the LoRAs that are merged into it: `loras` are changes of weights by name."""

    def __init__(self, model, loras=None):
        self.model, self.loras = model, loras or {}
        self.model_options = {"transformer_options": {}}
        self.load_device = torch.device("cpu")

    def clone(self, loras):
        return Patcher(self.model, loras)

    @torch.inference_mode()
    def refresh_loras(self):
        kept = self.model.__dict__.setdefault("kept", {})
        for name in [*kept]:
            owner, _, key = name.rpartition(".")
            setattr(self.model.get_submodule(owner), key, kept.pop(name))
        for name, change in self.loras.items():
            owner, _, key = name.rpartition(".")
            module = self.model.get_submodule(owner)
            kept[name] = getattr(module, key)
            setattr(module, key, nn.Parameter(kept[name] + change, requires_grad=False))


class Engine:
    """Forge's diffusion engine, all of it made in inference mode."""

    @torch.inference_mode()
    def __init__(self, toys, predictor=None):
        predictor = predictor or Predictor()
        clip = SimpleNamespace(cond_stage_model=Text())
        clip.patcher = Patcher(clip.cond_stage_model)
        vae = SimpleNamespace(first_stage_model=Pictures(), latent_channels=4)
        vae.patcher = Patcher(vae.first_stage_model)
        self.forge_objects_original = Objects(Patcher(KModel(unet(toys), predictor)), clip, vae)
        self.forge_objects = self.forge_objects_original.shallow_copy()
        self.sd_checkpoint_info = SimpleNamespace(filename=FILE, name="toy.safetensors", name_for_extra="toy")
        self.model_config = SimpleNamespace(unet_config={"in_channels": 4}, ztsnr=False)
        self.is_sd1, self.clip_skip = True, None

    @property
    def network(self):
        return self.forge_objects_original.unet.model.diffusion_model

    def set_clip_skip(self, count):
        self.clip_skip = count

    @torch.inference_mode()
    def get_learned_conditioning(self, prompts):
        return self.forge_objects.clip.cond_stage_model(prompts)

    @torch.inference_mode()
    def encode_first_stage(self, x):
        return self.forge_objects.vae.first_stage_model.encode(x).sample()

    @torch.inference_mode()
    def decode_first_stage(self, z):
        return self.forge_objects.vae.first_stage_model.decode(z)


class Objects(SimpleNamespace):
    def __init__(self, unet, clip, vae):
        super().__init__(unet=unet, clip=clip, vae=vae)

    def shallow_copy(self):
        return Objects(self.unet, self.clip, self.vae)


class SdConditioning(list):
    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None):
        super().__init__(prompts)
        self.is_negative_prompt, self.width, self.height = is_negative_prompt, width, height


def learned(model, prompts, steps):
    """Prompts joined by AND, each with its schedule, of which the last is what a first step has."""

    def rows(value, row):
        return {k: v[row] for k, v in value.items()} if isinstance(value, dict) else value[row]

    batch = []
    for prompt in prompts:
        parts = []
        for text in prompt.split(" AND "):
            asked = SdConditioning([text], prompts.is_negative_prompt, prompts.width, prompts.height)
            cond = rows(model.get_learned_conditioning(asked), 0)
            parts.append(SimpleNamespace(schedules=[SimpleNamespace(cond=None), SimpleNamespace(cond=cond)]))
        batch.append(parts)
    return SimpleNamespace(batch=batch)


def parse_prompt(prompt):
    """A prompt without its <kind:name:...>, and those by their kind."""
    return re.sub(r"<\w+:.*?>", "", prompt), {m[1]: m[2] for m in re.finditer(r"<(\w+):(.*?)>", prompt)}


def merged_in_place(module):
    """The Lora extension's: the wanted networks' changes on a copy that it keeps of the weight."""
    wanted = tuple(networks.loaded_networks)
    if wanted == getattr(module, "network_current_names", ()):
        return
    if getattr(module, "network_weights_backup", None) is None:
        module.network_weights_backup = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.copy_(module.network_weights_backup)
        for _ in wanted:
            module.weight.add_(1.0)
    module.network_current_names = wanted


networks = SimpleNamespace(loaded_networks=[], network_apply_weights=merged_in_place)


class Hijack:
    """AUTOMATIC1111's model_hijack, of which tiling is what is left on after a generation."""

    circular_enabled, layers = False, (1,)

    def apply_circular(self, on):
        self.circular_enabled = on


def host_modules(model, data: Path, forge: bool) -> dict[str, ModuleType | SimpleNamespace]:
    """The modules of a host that has loaded the model, by name."""
    data_of = SimpleNamespace(sd_model=model, forge_loading_parameters={})
    if model is not None:
        data_of.forge_loading_parameters = {"checkpoint_info": model.sd_checkpoint_info}
    aliases = {} if model is None else {"toy": model.sd_checkpoint_info}
    opts = type("Options", (SimpleNamespace,), {"set": lambda self, key, value, *_: True})(
        CLIP_stop_at_last_layers=1, sd_model_checkpoint="toy", sd_noise_schedule="Default"
    )
    told = SimpleNamespace(unets=[], loads=0, sent=0)

    def select_checkpoint():
        if model is None:
            raise FileNotFoundError("No checkpoints found.")
        return model.sd_checkpoint_info

    def load_models_gpu(patchers, memory_required=0):
        told.loads += 1

    def decode_latent_batch(model, batch, target_device=None, check_for_nans=False):
        return [model.decode_first_stage(row[None])[0].to(target_device) for row in batch]

    made: dict[str, dict] = {
        "modules": {},
        "modules.devices": {
            "device": torch.device("cpu"), "dtype_vae": torch.float32, "torch_gc": lambda: None,
            "autocast": lambda: amp.autocast("cpu", enabled=False),
        },
        "modules.shared": {
            "opts": opts, "cmd_opts": SimpleNamespace(lowvram=False, lora_dir=str(data / "Lora")),
            "loaded_hypernetworks": [], "sd_model": model,
        },
        "modules.paths": {"data_path": str(data)},
        "modules.call_queue": {"queue_lock": threading.Lock()},
        "modules.progress": {"ProgressResponse": SimpleNamespace},
        "modules.extra_networks": {"parse_prompt": parse_prompt},
        "modules.processing": {"decode_latent_batch": decode_latent_batch},
        "modules.prompt_parser": {"SdConditioning": SdConditioning, "get_multicond_learned_conditioning": learned},
        "modules.sd_models": {
            "model_data": data_of, "checkpoint_aliases": aliases, "select_checkpoint": select_checkpoint,
            "reload_model_weights": lambda: model, "send_model_to_device": lambda m: None,
            "apply_alpha_schedule_override": lambda m: None,
        },
    }  # fmt: skip
    if forge:
        made["modules.sd_models"]["forge_model_reload"] = lambda: (model, False)
        made["modules.processing"]["rescale_zero_terminal_snr_sigmas"] = lambda sigmas: sigmas * 2
        made |= {
            "backend": {},
            "backend.memory_management": {"load_models_gpu": load_models_gpu},
            "backend.stream": {"stream_activated": True},
            "backend.nn": {},
            "backend.nn.vae": {"DiagonalGaussianDistribution": DiagonalGaussianDistribution},
            "modules_forge": {},
        }
    else:
        made |= {
            "modules.lowvram": {"is_enabled": lambda m: m.lowvram},
            "modules.sd_hijack": {"model_hijack": Hijack()},
            "modules.sd_unet": {"apply_unet": told.unets.append},
        }
        networks.loaded_networks = []
    found = {}
    for name, values in made.items():
        found[name] = ModuleType(name)
        found[name].__spec__ = ModuleSpec(name, None)
        vars(found[name]).update(values, told=told)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(found[parent], child, found[name])
    return found | ({} if forge else {"networks": networks})


OURS = "turbodistill.webui_extension"


def forget() -> None:
    """Our modules over a host are imported anew: each holds on to the host that it was imported in."""
    package = sys.modules.get(OURS)
    for name in [n for n in sys.modules if n.startswith(f"{OURS}.host")]:
        del sys.modules[name]
        vars(package).pop(name.rpartition(".")[2], None)


@contextmanager
def within(monkeypatch, model, data: Path, forge: bool):
    """A host's modules are there; yields ours over it, by the last part of their names."""
    forget()
    for name in ("modules_forge", "networks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name, module in host_modules(model, data, forge).items():
        monkeypatch.setitem(sys.modules, name, module)
    names = ("host_forge" if forge else "host_a1111", "host_training", "host_backend")
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"{OURS}.{name}") for name in names})
    finally:
        forget()
