"""comfy.model_sampling, latent_formats, model_base, model_patcher and lora: a MODEL is a small network, on the CPU."""

from __future__ import annotations

import copy
import enum
import operator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
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
        timestep = timestep.float().clamp(0, len(self.sigmas) - 1)
        low = timestep.floor().long()
        high = timestep.ceil().long()
        return torch.lerp(self.log_sigmas[low], self.log_sigmas[high], timestep - low).exp()


class ModelSamplingDiscreteDistilled(ModelSamplingDiscrete):
    """Every twentieth level: the fifty that the first LCMs were distilled at."""

    def __init__(self):
        super().__init__(DiscreteSchedule().sigmas[19::20])

    def timestep(self, sigma):
        return super().timestep(sigma) * 20 + 19

    def sigma(self, timestep):
        return super().sigma((timestep - 19) / 20)


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
    spacial_downscale_ratio = 8
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


class CONDCrossAttn(CONDRegular):
    """Of networks where the picture attends to the text, whose tokens may be repeated."""


class ToyConfig:
    """What ComfyUI's detection would call a toy."""

    architecture, title = "toy-v1", "toy"

    def __getattr__(self, name):  # ComfyUI warns, and goes on
        return None


class BaseModel(nn.Module):
    model_config = ToyConfig()

    def __init__(self, diffusion_model, model_sampling, latent_format=None, process_timestep=lambda t: t):
        super().__init__()
        self.diffusion_model, self.model_sampling = diffusion_model, model_sampling
        self.latent_format, self.process_timestep = latent_format or LatentFormat(), process_timestep

    def apply_model(self, x, t, c_crossattn=None, transformer_options=None):
        space = self.model_sampling
        time = self.process_timestep(space.timestep(t).float())
        return space.calculate_denoised(t, self.diffusion_model(space.calculate_input(t, x), time, c_crossattn), x)

    def extra_conds(self, cross_attn, **_):
        return {"c_crossattn": CONDCrossAttn(cross_attn)}

    def process_latent_in(self, latent):
        return self.latent_format.process_in(latent)

    def process_latent_out(self, latent):
        return self.latent_format.process_out(latent)

    def scale_latent_inpaint(self, sigma, noise, latent_image, x=None):
        return self.model_sampling.noise_scaling(sigma, noise, latent_image)


class Dimension(NamedTuple):
    """What a MODEL keeps of a weight that it has patched."""

    weight: torch.Tensor
    inplace_update: bool


class ModelPatcher:
    """A MODEL: patches by name over a network that its clones share, put in by whichever clone runs."""

    def __init__(self, model, load_device=CPU, offload_device=CPU):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.patches, self.object_patches, self.attachments = {}, {}, {}
        self.model_options = {"transformer_options": {}}
        self.wrappers, self.injections = {}, {}
        self.backup, self.object_patches_backup = {}, {}

    def clone(self):
        return self._like(type(self), self.model)

    def _like(self, kind, model):
        new = kind(model, self.load_device, self.offload_device)
        new.patches = {key: list(entries) for key, entries in self.patches.items()}
        new.object_patches, new.attachments = dict(self.object_patches), dict(self.attachments)
        new.model_options, new.wrappers = copy.deepcopy(self.model_options), dict(self.wrappers)
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

    @contextmanager
    def loaded(self):
        """The shared network within is this MODEL's: weights merged in place, objects exchanged."""
        weights = self.model.state_dict()
        try:
            for key, entries in self.patches.items():
                self.backup[key] = Dimension(weights[key].clone(), False)
                weights[key].copy_(calculate_weight(entries, weights[key].float()))
            for name, patch in self.object_patches.items():
                self.object_patches_backup[name] = getattr(self.model, name)
                setattr(self.model, name, patch)
            yield self.model
        finally:
            for key, kept in self.backup.items():
                weights[key].copy_(kept.weight)
            for name, kept in self.object_patches_backup.items():
                setattr(self.model, name, kept)
            self.backup.clear()
            self.object_patches_backup.clear()


class ModelVBAR:
    """Memory that weights are streamed through. It frees itself when it goes: a copy would free it twice."""

    def __deepcopy__(self, memo):
        raise AssertionError("a ModelVBAR was copied")


class ModelPatcherDynamic(ModelPatcher):
    """With dynamic VRAM (ComfyUI 0.33): weights stay where they were read, and every layer has a place to stream to.

    `cached_patcher_init` is what reads the file again: a function, its arguments, and which of its results it is.
    """

    cached_patcher_init = None

    def is_dynamic(self):
        return True

    def clone(self, disable_dynamic=False):
        if not disable_dynamic:
            new = super().clone()
        elif self.cached_patcher_init is None:
            raise RuntimeError("Cannot create non-dynamic delegate: cached_patcher_init is not initialized.")
        else:
            read, arguments, which = self.cached_patcher_init
            new = self._like(ModelPatcher, read(*arguments, disable_dynamic=True)[which].model)
            new.backup, new.object_patches_backup = {}, {}
        new.cached_patcher_init = self.cached_patcher_init
        return new


def load_models_gpu(models, memory_required=0, force_full_load=False):
    for patcher in models:
        if isinstance(patcher, ModelPatcherDynamic):
            for layer in patcher.model.modules():
                layer._v = (ModelVBAR(), 0, 0)


# --- comfy.lora ---


class LoRAAdapter:
    def __init__(self, up, down, alpha):
        self.up, self.down, self.alpha = up.float(), down.float(), alpha
        self.weights = (self.up, self.down, alpha, None, None, None)

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
