"""Stand-ins for what our nodes use of ComfyUI, so that they are tested where it is not installed.

Written from its interfaces: each does what the class or function of the same name does there, as far
as our nodes rely on it, and refuses what that one refuses. A MODEL is a small network, on the CPU.
"""

from __future__ import annotations

import enum
import importlib
import math
import operator
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import turbodistill
from torch import nn
from turbodistill.core.sampling import sample_euler
from turbodistill.core.schedule import DiscreteSchedule, expand

CPU = torch.device("cpu")

# --- comfy.model_sampling: what a network's output means, and the noise levels it knows ---


class EPS:
    def calculate_input(self, sigma, noise):
        return noise * (expand(sigma, noise) ** 2 + 1).rsqrt()

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - expand(sigma, model_input) * model_output

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        sigma = expand(sigma, noise)
        return latent_image + noise * ((1 + sigma**2).sqrt() if max_denoise else sigma)

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class V_PREDICTION(EPS):
    def calculate_denoised(self, sigma, model_output, model_input):
        sigma = expand(sigma, model_input)
        alpha = (sigma**2 + 1).rsqrt()
        return alpha**2 * model_input - sigma * alpha * model_output


class EDM(V_PREDICTION):
    def calculate_denoised(self, sigma, model_output, model_input):
        return super().calculate_denoised(sigma, -model_output, model_input)


class X0(EPS):
    def calculate_denoised(self, sigma, model_output, model_input):
        return model_output


class CONST:
    def calculate_input(self, sigma, noise):
        return noise

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - expand(sigma, model_input) * model_output

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return torch.lerp(latent_image, noise, expand(sigma, noise))

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - expand(sigma, latent))


class Levels(nn.Module):
    def __init__(self, sigmas):
        super().__init__()
        self.register_buffer("sigmas", sigmas.float())

    sigma_min = property(lambda self: self.sigmas[0])
    sigma_max = property(lambda self: self.sigmas[-1])


class ModelSamplingDiscrete(Levels):
    def __init__(self, sigmas=None):
        super().__init__(DiscreteSchedule().sigmas if sigmas is None else sigmas)
        self.register_buffer("log_sigmas", self.sigmas.log())

    def timestep(self, sigma):
        return (sigma.log()[..., None] - self.log_sigmas).abs().argmin(-1)

    def sigma(self, timestep):
        low = timestep.floor().long()
        high = timestep.ceil().long()
        return torch.lerp(self.log_sigmas[low], self.log_sigmas[high], timestep - low).exp()


class ModelSamplingDiscreteDistilled(ModelSamplingDiscrete):
    """Every twentieth level: the fifty that the first LCMs were distilled at."""

    def __init__(self):
        super().__init__(DiscreteSchedule().sigmas[19::20])

    def timestep(self, sigma):
        return super().timestep(sigma) * 20 + 19


class ModelSamplingDiscreteFlow(Levels):
    """Shifted linear levels; `multiplier` is the timestep of pure noise (1 for Flux, whose table has 10000 entries)."""

    def __init__(self, shift=1.0, entries=1000, multiplier=1000):
        self.shift, self.multiplier = shift, multiplier
        super().__init__(self.sigma((torch.arange(entries) + 1) / entries * multiplier))

    def timestep(self, sigma):
        return sigma * self.multiplier

    def sigma(self, timestep):
        t = timestep / self.multiplier
        return self.shift * t / (1 + (self.shift - 1) * t)


def model_sampling(reading, levels, *settings):
    return type("ModelSampling", (levels, reading), {})(*settings)


# --- comfy.model_base, latent_formats, model_patcher ---


class LatentFormat:
    scale_factor = 1.0
    latent_channels = 4
    latent_dimensions = 2
    latent_rgb_factors = None

    def process_in(self, latent):
        return latent * self.scale_factor

    def process_out(self, latent):
        return latent / self.scale_factor


class ModelType(enum.Enum):
    EPS = EPS
    V_PREDICTION = V_PREDICTION


class CONDRegular:
    def __init__(self, cond):
        self.cond = cond

    def process_cond(self, batch_size, **_):
        return type(self)(self.cond.repeat(batch_size, *(1 for _ in self.cond.shape[1:])))


class BaseModel(nn.Module):
    def __init__(self, diffusion_model, model_sampling, latent_format=None, process_timestep=lambda t: t):
        super().__init__()
        self.diffusion_model, self.model_sampling = diffusion_model, model_sampling
        self.latent_format, self.process_timestep = latent_format or LatentFormat(), process_timestep

    def apply_model(self, x, t, c_crossattn=None, transformer_options=None):
        space = self.model_sampling
        time = self.process_timestep(space.timestep(t).float())
        return space.calculate_denoised(t, self.diffusion_model(space.calculate_input(t, x), time, c_crossattn), x)

    def extra_conds(self, cross_attn, **_):
        return {"c_crossattn": CONDRegular(cross_attn)}

    def process_latent_in(self, latent):
        return self.latent_format.process_in(latent)

    def process_latent_out(self, latent):
        return self.latent_format.process_out(latent)

    def scale_latent_inpaint(self, sigma, noise, latent_image, x=None):
        return self.model_sampling.noise_scaling(sigma, noise, latent_image)


class ModelPatcher:
    """A MODEL: patches by name over a network that its clones share, put in by whichever clone runs."""

    def __init__(self, model, load_device=CPU, offload_device=CPU):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.patches, self.object_patches, self.attachments = {}, {}, {}
        self.model_options = {"transformer_options": {}}
        self.backup, self.object_patches_backup = {}, {}

    def clone(self):
        new = type(self)(self.model, self.load_device, self.offload_device)
        new.patches = {key: list(entries) for key, entries in self.patches.items()}
        new.object_patches, new.attachments = dict(self.object_patches), dict(self.attachments)
        new.backup, new.object_patches_backup = self.backup, self.object_patches_backup
        return new

    def set_attachments(self, key, attachment):
        self.attachments[key] = attachment

    def add_object_patch(self, name, obj):
        self.object_patches[name] = obj

    def get_model_object(self, name):
        for known in (self.object_patches, self.object_patches_backup):
            if name in known:
                return known[name]
        return operator.attrgetter(name)(self.model)

    def model_state_dict(self, filter_prefix=""):
        return {k: v for k, v in self.model.state_dict().items() if k.startswith(filter_prefix)}

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        known = [key for key in patches if key in self.model.state_dict()]
        for key in known:
            self.patches.setdefault(key, []).append((strength_patch, patches[key], strength_model, None, None))
        return known

    def get_key_patches(self, filter_prefix=""):
        weights = self.model_state_dict(filter_prefix)
        return {k: [(self.backup.get(k, v), None), *self.patches.get(k, [])] for k, v in weights.items()}

    @contextmanager
    def loaded(self):
        """The shared network within is this MODEL's: weights merged in place, objects exchanged."""
        weights = self.model.state_dict()
        try:
            for key, entries in self.patches.items():
                self.backup[key] = weights[key].clone()
                weights[key].copy_(calculate_weight(entries, weights[key].float()))
            for name, patch in self.object_patches.items():
                self.object_patches_backup[name] = getattr(self.model, name)
                setattr(self.model, name, patch)
            yield self.model
        finally:
            for key, weight in self.backup.items():
                weights[key].copy_(weight)
            for name, kept in self.object_patches_backup.items():
                setattr(self.model, name, kept)
            self.backup.clear()
            self.object_patches_backup.clear()


# --- comfy.lora ---


class LoRAAdapter:
    def __init__(self, up, down, alpha):
        self.up, self.down, self.alpha = up.float(), down.float(), alpha

    def delta(self, weight):
        product = self.up.flatten(1) @ self.down.flatten(1)
        return (product * self.alpha / len(self.down)).reshape(weight.shape)


def model_lora_keys_unet(model, key_map):
    for key in model.state_dict():
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if key.startswith("diffusion_model."):
            key_map[key.removesuffix(".weight")] = key
            if key.endswith(".weight"):
                key_map["lora_unet_" + name.replace(".", "_")] = key
    return key_map


def load_lora(lora, to_load, log_missing=True):
    return {
        key: LoRAAdapter(lora[f"{n}.lora_up.weight"], lora[f"{n}.lora_down.weight"], lora[f"{n}.alpha"].item())
        for n, key in to_load.items()
        if f"{n}.lora_up.weight" in lora
    }


def calculate_weight(patches, weight):
    for strength, patch, strength_model, *_ in patches:
        change = patch.delta(weight) if isinstance(patch, LoRAAdapter) else patch[0]
        weight = strength_model * weight + strength * change
    return weight


# --- comfy.sampler_helpers, comfy.samplers, comfy.sample ---


def convert_cond(cond):
    return [options | {"cross_attn": states, "model_conds": {}} for states, options in cond]


def process_conds(model, noise, conds, device):
    def prepared(cond):
        return cond | {"model_conds": cond["model_conds"] | model.extra_conds(**cond, noise=noise, device=device)}

    return {name: [prepared(cond) for cond in entries] for name, entries in conds.items()}


class Sampler:
    def max_denoise(self, model_wrap, sigmas):
        most, first = float(model_wrap.inner_model.model_sampling.sigma_max), float(sigmas[0])
        return first > most or math.isclose(first, most, rel_tol=1e-5)


class KSamplerX0Inpaint:
    """What a sampler calls: the guider, with what the mask protects put back before and after."""

    def __init__(self, model, noise, latent_image):
        self.inner_model, self.noise, self.latent_image = model, noise, latent_image

    def __call__(self, x, sigma, denoise_mask, model_options=None, seed=None):
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options, seed)
        noisy = self.inner_model.inner_model.scale_latent_inpaint(
            x=x, sigma=sigma, noise=self.noise, latent_image=self.latent_image
        )
        out = self.inner_model(torch.lerp(noisy, x, denoise_mask), sigma, model_options, seed)
        return torch.lerp(self.latent_image, out, denoise_mask)


class KSAMPLER(Sampler):
    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        space, last = model_wrap.inner_model.model_sampling, len(sigmas) - 1
        x = self.sampler_function(
            KSamplerX0Inpaint(model_wrap, noise, latent_image),
            space.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas)),
            sigmas,
            extra_args=extra_args | {"denoise_mask": denoise_mask},
            callback=callback and (lambda step: callback(step["i"], step["denoised"], step["x"], last)),
            disable=disable_pbar,
            **self.extra_options,
        )
        return space.inverse_noise_scaling(sigmas[-1], x)


class CFGGuider:
    def __init__(self, model_patcher):
        self.model_patcher, self.conds, self.cfg = model_patcher, {}, 1.0

    def inner_set_conds(self, conds):
        self.conds = {name: cond[0][0] for name, cond in conds.items()}

    def set_cfg(self, cfg):
        self.cfg = cfg

    def __call__(self, x, sigma, model_options=None, seed=None):
        def predict(name):
            context = self.conds[name]
            return self.inner_model.apply_model(x, sigma, context.expand(len(x), *context.shape[1:]))

        # At cfg 1 the negative is not even asked.
        return predict("positive") if self.cfg == 1 else torch.lerp(predict("negative"), predict("positive"), self.cfg)

    @torch.no_grad()
    def sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None
    ):
        with self.model_patcher.loaded() as self.inner_model:
            if latent_image.count_nonzero() > 0:
                latent_image = self.inner_model.process_latent_in(latent_image)
            if denoise_mask is not None:
                mask = denoise_mask.reshape(-1, 1, *denoise_mask.shape[-2:])
                denoise_mask = nn.functional.interpolate(mask, noise.shape[2:], mode="bilinear").expand_as(noise)
            extra = {"model_options": {}, "seed": seed}
            out = sampler.sample(self, sigmas, extra, callback, noise, latent_image, denoise_mask, disable_pbar)
            return self.inner_model.process_latent_out(out.float())


def ksampler(sampler_name):
    return KSAMPLER({"euler": sample_euler}[sampler_name])


def calculate_sigmas(model_sampling, scheduler_name, steps):
    first, last = (model_sampling.timestep(s) for s in (model_sampling.sigma_max, model_sampling.sigma_min))
    spaced = {"normal": torch.linspace(float(first), float(last), steps)}[scheduler_name]
    return torch.cat([model_sampling.sigma(spaced), torch.zeros(1)])


def prepare_noise(latent_image, seed, noise_inds=None):
    generator = torch.Generator().manual_seed(seed)
    if noise_inds is None:
        return torch.randn(latent_image.shape, generator=generator)
    rows = [torch.randn(latent_image.shape[1:], generator=generator) for _ in range(max(noise_inds) + 1)]
    return torch.stack([rows[i] for i in noise_inds])


def fix_empty_latent_channels(model, latent_image):
    wanted = model.get_model_object("latent_format").latent_channels
    if latent_image.shape[1] == wanted or latent_image.count_nonzero() > 0:
        return latent_image
    return latent_image.new_zeros(len(latent_image), wanted, *latent_image.shape[2:])


# --- comfy.supported_models_base, comfy.sd, comfy.sd1_clip: what a model is built from ---

UNetModel = AutoencoderKL = None  # set by the tests that build a model from its configuration


class BASE:
    unet_extra_config: dict = {"num_heads": -1, "num_head_channels": 64}  # noqa: RUF012 - as it is there
    latent_format = LatentFormat

    def __init__(self, unet_config):
        self.unet_config = unet_config | self.unet_extra_config
        self.latent_format = self.latent_format()

    def set_inference_dtype(self, dtype, manual_cast_dtype):
        self.unet_config["dtype"] = dtype

    def get_model(self, state_dict, prefix="", device=None):
        reading = self.model_type(state_dict, prefix).value
        return BaseModel(
            UNetModel(**self.unet_config), model_sampling(reading, ModelSamplingDiscrete), self.latent_format
        )


class ClipTarget:
    def __init__(self, tokenizer, clip):
        self.tokenizer, self.clip, self.params = tokenizer, clip, {}


class CLIP:
    def __init__(self, target):
        self.cond_stage_model = target.clip(**target.params, device=CPU, dtype=torch.float16, model_options={})
        self.tokenizer = target.tokenizer(embedding_directory=None, tokenizer_data={})
        assert self.cond_stage_model.dtypes

    def tokenize(self, text, return_word_ids=False, **options):
        return self.tokenizer.tokenize_with_weights(text, return_word_ids, **options)

    @torch.no_grad()
    def encode_from_tokens(self, tokens):
        self.cond_stage_model.reset_clip_options()
        self.cond_stage_model.set_clip_options({"layer": None})
        cond, _pooled = self.cond_stage_model.encode_token_weights(tokens)[:2]
        return cond


class VAE:
    def __init__(self, sd, config):
        self.first_stage_model = AutoencoderKL(**config["params"])
        self.first_stage_model.load_state_dict(sd)
        self.downscale_ratio = self.upscale_ratio = 8


def token_weights(string, current_weight):
    """Bracketed parts apart from the rest; one level of brackets and `:weight` are enough here."""
    parts = re.findall(r"\(([^()]*?)(?::([\d.]+))?\)|([^()]+)", string)
    return [(plain, current_weight) if plain else (text, float(w or 1.1)) for text, w, plain in parts]


def escape_important(text):
    return text.replace(r"\)", "\0\1").replace(r"\(", "\0\2")


def unescape_important(text):
    return text.replace("\0\1", ")").replace("\0\2", "(")


# --- folder_paths ---

FOLDERS: dict[str, Path] = {}


def get_filename_list(folder_name):
    root = FOLDERS.get(folder_name)
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*.*") if p.is_file()) if root else []


def get_full_path(folder_name, filename):
    root = FOLDERS.get(folder_name, Path())
    path = (root / filename).resolve()
    return str(path) if path.is_file() and path.is_relative_to(root.resolve()) else None


# --- comfy_api.latest ---


class Socket:
    """An input or output of a node; a setting that its kind does not have is refused."""

    io_type, settings = "", ()

    def __init__(self, id=None, **given):
        stray = given.keys() - set(self.settings)
        if stray:
            raise TypeError(f"a socket of type {self.io_type} has no {', '.join(sorted(stray))}")
        self.id = id
        for name in self.settings:
            setattr(self, name, given.get(name))


def kind(io_type, *widget):
    inputs = ("display_name", "optional", "tooltip", "lazy", *widget)
    return SimpleNamespace(
        Input=type("Input", (Socket,), {"io_type": io_type, "settings": inputs}),
        Output=type(
            "Output", (Socket,), {"io_type": io_type, "settings": ("display_name", "tooltip", "is_output_list")}
        ),
    )


class Schema:
    def __init__(
        self,
        node_id,
        display_name=None,
        category="sd",
        inputs=(),
        outputs=(),
        hidden=None,
        description="",
        is_output_node=False,
    ):
        self.node_id, self.display_name, self.category, self.description = node_id, display_name, category, description
        self.inputs, self.outputs, self.hidden = list(inputs), list(outputs), list(hidden or [])
        self.is_output_node = is_output_node

    def validate(self):
        names = [socket.id for socket in self.inputs + self.outputs]
        if len(names) != len(set(names)):
            raise ValueError(f"ids must be unique among inputs and outputs: {names}")


class Hidden(enum.Enum):
    prompt = "PROMPT"
    unique_id = "UNIQUE_ID"
    extra_pnginfo = "EXTRA_PNGINFO"


class ComfyNode:
    hidden = None

    @classmethod
    def define_schema(cls):
        raise NotImplementedError

    @classmethod
    def execute(cls, **inputs):
        raise NotImplementedError

    @classmethod
    def run(cls, *, prompt=None, unique_id="1", **inputs):
        """As the executor does: on a clone of the class that holds the hidden inputs."""
        asked = {name.value for name in cls.define_schema().hidden}
        held = {"PROMPT": prompt, "UNIQUE_ID": unique_id}
        hidden = SimpleNamespace(**{h.name: held.get(h.value) if h.value in asked else None for h in Hidden})
        return type(cls.__name__, (cls,), {"hidden": hidden}).execute(**inputs)


class NodeOutput:
    def __init__(self, *args, ui=None):
        self.args, self.ui = args, ui

    def __getitem__(self, index):
        return self.args[index]


class ComfyExtension:
    async def get_node_list(self):
        raise NotImplementedError


class PreviewImage:
    def __init__(self, image, animated=False, cls=None):
        self.image, self.cls = image, cls


WIDGET = ("default", "socketless", "force_input")
SOCKETS = {
    "Int": kind("INT", *WIDGET, "min", "max", "step", "control_after_generate", "display_mode"),
    "Float": kind("FLOAT", *WIDGET, "min", "max", "step", "round", "display_mode"),
    "String": kind("STRING", *WIDGET, "multiline", "placeholder", "dynamic_prompts"),
    "Combo": kind("COMBO", *WIDGET, "options", "control_after_generate", "upload", "image_folder", "remote"),
} | {
    name: kind(name.upper())
    for name in ("Model", "Clip", "Vae", "Conditioning", "Latent", "Image", "Mask", "Sigmas", "Sampler", "Noise")
}

# --- the modules, in and out ---


def modules() -> dict[str, dict[str, object]]:
    """Module name -> what our nodes may find in it."""
    io = SimpleNamespace(Schema=Schema, Hidden=Hidden, ComfyNode=ComfyNode, NodeOutput=NodeOutput, **SOCKETS)
    return {
        "comfy": {},
        "comfy.latent_formats": {"LatentFormat": LatentFormat},
        "comfy.lora": {"model_lora_keys_unet": model_lora_keys_unet, "load_lora": load_lora},
        "comfy.model_base": {"ModelType": ModelType, "BaseModel": BaseModel},
        "comfy.model_management": {
            "get_torch_device": lambda: CPU,
            "intermediate_device": lambda: CPU,
            "load_models_gpu": lambda models, memory_required=0, force_full_load=False: None,
            "unet_dtype": lambda device=None, model_params=0, supported_dtypes=(), weight_dtype=None: torch.float32,
            "unet_manual_cast": lambda weight_dtype, inference_device, supported_dtypes=(): None,
            "unet_offload_device": lambda: CPU,
        },
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.model_sampling": {"EPS": EPS, "V_PREDICTION": V_PREDICTION, "EDM": EDM, "CONST": CONST, "X0": X0},
        "comfy.sample": {"prepare_noise": prepare_noise, "fix_empty_latent_channels": fix_empty_latent_channels},
        "comfy.sampler_helpers": {"convert_cond": convert_cond},
        "comfy.samplers": {
            "process_conds": process_conds,
            "KSAMPLER": KSAMPLER,
            "CFGGuider": CFGGuider,
            "ksampler": ksampler,
            "calculate_sigmas": calculate_sigmas,
        },
        "comfy.sd": {"CLIP": CLIP, "VAE": VAE},
        "comfy.sd1_clip": {
            "token_weights": token_weights,
            "escape_important": escape_important,
            "unescape_important": unescape_important,
        },
        "comfy.supported_models": {},
        "comfy.supported_models_base": {"BASE": BASE, "ClipTarget": ClipTarget},
        "comfy.utils": {"PROGRESS_BAR_ENABLED": True},
        "comfy_api": {},
        "comfy_api.latest": {
            "io": io,
            "ui": SimpleNamespace(PreviewImage=PreviewImage),
            "ComfyExtension": ComfyExtension,
        },
        "folder_paths": {"get_filename_list": get_filename_list, "get_full_path": get_full_path},
        "latent_preview": {"prepare_callback": lambda model, steps: lambda step, x0, x, total: None},
    }


OURS = "turbodistill.nodes"


def _ours_and_theirs() -> list[str]:
    return [n for n in sys.modules if n in modules() or n == OURS or n.startswith(OURS + ".")]


@contextmanager
def installed():
    """Our nodes over the stand-ins, as a namespace of modules; both are gone from sys.modules at the end."""
    kept = {name: sys.modules.pop(name) for name in _ours_and_theirs()}
    package = turbodistill.__dict__.pop("nodes", None)
    try:
        for name, content in modules().items():
            sys.modules[name] = module = ModuleType(name)
            vars(module).update(content)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        files = sorted(p.stem for p in (Path(turbodistill.__file__).parent / "nodes").glob("*.py"))
        yield SimpleNamespace(**{file: importlib.import_module(f"{OURS}.{file}") for file in files})
    finally:
        for name in _ours_and_theirs():
            del sys.modules[name]
        turbodistill.__dict__.pop("nodes", None)
        sys.modules.update(kept)
        if package is not None:
            turbodistill.nodes = package
