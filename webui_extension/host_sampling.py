"""The samplers in the hosts' ordinary list: AUTOMATIC1111's and Forge's own k-diffusion sampler with our levels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from modules import sd_samplers, shared
from modules.sd_samplers_common import SamplerData
from modules.sd_samplers_kdiffusion import KDiffusionSampler
from torch import Tensor

from ..core.card import CardError
from ..core.families import SamplingRecipe
from ..core.fit import Base, read_base
from ..generate.recipe import as_it_was_put_out, schedule_for, to_x0
from . import host
from .host_denoiser import architecture, prediction_of
from .host_denoiser import space_of as network_space
from .samplers import (
    DETECT,
    HIRES_TIMESTEPS,
    LIMITS,
    MODEL,
    TIMESTEPS,
    Found,
    by_another,
    find,
    misfits,
    passes,
    remarks,
    students_among,
    too_many,
    unet_weight,
)

CHOICE, REMARKS = "turbodistill_choice", "turbodistill_remarks"  # what we write on the host's `p`


class OneStepData(SamplerData):
    """An entry of the host's list, which counts the passes that are made, whatever Steps says."""

    def total_steps(self, steps: int) -> int:
        return passes(self.name, steps)


def register() -> None:
    """Put the samplers into the host's list, in place of those of an earlier load of the scripts."""
    ours = [OneStepData(name, partial(OneStepSampler, name), [], {}) for name in LIMITS]
    # The list stays the same object: others hold it.
    sd_samplers.all_samplers[:] = [entry for entry in sd_samplers.all_samplers if entry.name not in LIMITS] + ours
    sd_samplers.all_samplers_map.update({entry.name: entry for entry in ours})
    sd_samplers.set_samplers()
    if clear := getattr(getattr(sd_samplers, "get_sampler_and_scheduler", None), "cache_clear", None):
        clear()  # it remembers names that it has not known


def applied(p) -> dict[str, float]:
    """The LoRAs that the host applies in the pass that is made now, with their weights in the UNet."""
    data = getattr(p, "hr_extra_network_data" if p.is_hr_pass else "extra_network_data", None) or {}
    found = {params.items[0]: unet_weight(params.items[1:]) for params in data.get("lora", []) if params.items}
    return {name: weight for name, weight in found.items() if weight}


def remark(p, words: str) -> None:
    """Tell it below the picture, and whoever asked by the API, whose answers leave the host's comments out."""
    p.comment(words)
    setattr(p, REMARKS, list(dict.fromkeys([*getattr(p, REMARKS, ()), words])))


def loaded_base() -> Base:
    """What is known of the loaded model."""
    file, model = host.checkpoint_file(), shared.sd_model
    base = read_base(file) if file else Base()
    kind = base.architecture or architecture(model)
    return replace(base, architecture=kind, prediction=base_prediction(model), clip_skip=host.clip_skip(model, kind))


def foreign(p) -> None:
    """Tell what another sampler than ours makes of the students in the prompt."""
    loras = applied(p)
    if students := students_among(loras, host.lora_files()):
        try:
            said = misfits(students, loras, loaded_base())
        except CardError as error:
            said = [str(error)]
        for each in said + by_another(students, p.sampler_name, p.steps, p.cfg_scale):
            remark(p, each)


def space_of(model):
    """Forge's object of noise levels and reading (reForge's bears ComfyUI's name); None in AUTOMATIC1111."""
    if not hasattr(model, "forge_objects"):
        return None
    return network_space(model.forge_objects.unet.model)


def base_prediction(model) -> str:
    """What the network of the host's model predicts; "" where the host does not say."""
    if hasattr(model, "forge_objects"):
        prediction = prediction_of(space_of(model))
        return "" if prediction == "unknown" else prediction
    if hasattr(model, "create_denoiser"):
        return "flow"
    return "v" if model.parameterization == "v" else "eps"


class Space:
    """The host's way of adding noise, in core's words."""

    def __init__(self, model):
        self.model = model

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x0, noise (B, ...), one level sigma (B,) -> the noisy latents (B, ...)."""
        if space := space_of(self.model):
            return space.noise_scaling(sigma[0], noise, x0)
        if hasattr(self.model, "add_noise_to_latent"):
            return self.model.add_noise_to_latent(x0, noise, sigma[0])
        return x0 + sigma[0] * noise


class OneStepSampler(KDiffusionSampler):
    """The recipe's sampler at the levels and with the reading of the model that is sampled."""

    def __init__(self, name: str, sd_model):
        super().__init__(self.run, sd_model)
        self.name = name
        self.found = Found(SamplingRecipe(name))
        self.levels = torch.zeros(1)

    @torch.no_grad()
    def run(self, model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
        """Noisy latents x (B, C, H, W) at sigmas[0], sigmas (n + 1,) -> latents (B, C, H, W)."""
        return self.found.sampling.sample(model, x, sigmas, extra_args, callback, schedule=Space(shared.sd_model))

    def get_sigmas(self, p, steps: int) -> Tensor:
        """Our levels. For image to image the host asks for more, of which it takes the last."""
        return torch.cat([self.levels[:1].expand(max(steps + 1 - len(self.levels), 0)), self.levels])

    def sample(self, p, x, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        with self._set(p, steps or p.steps, 1.0) as count:
            x = self._scaled(x)
            return super().sample(p, x, conditioning, unconditional_conditioning, count, image_conditioning)

    def sample_img2img(
        self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None
    ):
        if not p.denoising_strength:
            return x
        with self._set(p, steps or p.steps, p.denoising_strength) as count:
            return super().sample_img2img(
                p, x, noise, conditioning, unconditional_conditioning, count, image_conditioning
            )

    def _scaled(self, x: Tensor) -> Tensor:
        """Pure noise such that the host's scaling makes it sigma times noise for a student of ours, as it learnt."""
        space = space_of(shared.sd_model)
        flow = space is not None and prediction_of(space) == "flow"
        if not self.found.sampling.exact or not shared.opts.sgm_noise_multiplier or flow:
            return x
        sigma = self.levels[0].to(x)
        return x * sigma / (1 + sigma**2).sqrt()

    @contextmanager
    def _set(self, p, steps: int, strength: float) -> Iterator[int]:
        """The number of passes; within, levels and reading are those of the model that the host samples."""
        choice, loras, count = getattr(p, CHOICE, DETECT), applied(p), passes(self.name, steps)
        files, base = host.lora_files(), loaded_base()
        self.found = find(choice, count, files, loras, host.checkpoint_file(), base)
        # Image to image makes it before a zero-terminal schedule is set.
        self.model_wrap_cfg.model_wrap = None
        self.model_wrap = self.model_wrap_cfg.inner_model
        timesteps = self.found.sampling.timesteps(count, strength)
        self.levels = self.found.sampling.sigmas(self.model_wrap.sigmas, timesteps)
        write_down(p, self.found, timesteps)
        said = too_many(self.name, steps) + misfits(students_among(loras, files), loras, base)
        for each in said + remarks(self.found, count, p.cfg_scale, choice, loras):
            remark(p, each)
        with read_as(self.found.sampling, shared.sd_model, self.model_wrap):
            yield count


def write_down(p, found: Found, timesteps: list[int]) -> None:
    """Write into the picture how it is made."""
    written = " ".join(map(str, timesteps))
    ours = {HIRES_TIMESTEPS: written} if p.is_hr_pass else {MODEL: found.sampling.name, TIMESTEPS: written}
    p.extra_generation_params = {**p.extra_generation_params, **ours}  # a new table: copies of p share the old one


@contextmanager
def read_as(sampling: SamplingRecipe, model, wrapped) -> Iterator[None]:
    """Within, the network is told the timestep and its output read as the sampling says.

    `wrapped` is AUTOMATIC1111's denoiser of this one picture; Forge's is the model's own, and is put back.
    """
    if sampling.prediction == "inherit" and sampling.shift == 1000:
        yield
    elif space := space_of(model):
        network = model.forge_objects.unet.model
        place = "predictor" if hasattr(network, "predictor") else "model_sampling"
        setattr(network, place, _read_space(sampling, space))
        try:
            yield
        finally:
            setattr(network, place, space)
    else:
        _read_wrapped(sampling, wrapped, base_prediction(model))
        yield


def _derived(like: Any, **changed) -> Any:
    """A copy of an object, sharing what it holds, with other methods."""
    other = copy.copy(like)
    other.__class__ = type(f"OneStep{type(like).__name__}", (type(like),), changed)
    return other


def _read_space(sampling: SamplingRecipe, space):
    base = prediction_of(space)
    schedule = schedule_for(base)

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return to_x0(sampling.prediction, schedule, model_input, model_output, sigma, space.timestep(sigma))

    changed: dict[str, Any] = {
        "prediction_type": base,
        "timestep": lambda self, sigma: sampling.network_timestep(space.timestep(sigma)),
    }
    if sampling.prediction != "inherit":
        changed["calculate_denoised"] = calculate_denoised
    return _derived(space, **changed)


def _read_wrapped(sampling: SamplingRecipe, wrapped, base: str) -> None:
    cls = type(wrapped)
    schedule = schedule_for(base)

    def sigma_to_t(self, sigma: Tensor, quantize=None) -> Tensor:
        return sampling.network_timestep(cls.sigma_to_t(self, sigma, quantize))

    def forward(self, x: Tensor, sigma: Tensor, **given) -> Tensor:
        x0 = cls.forward(self, x, sigma, **given)
        if sampling.prediction == "inherit":
            return x0
        output = as_it_was_put_out(base, x, x0, sigma)
        return to_x0(sampling.prediction, schedule, x, output, sigma, cls.sigma_to_t(self, sigma))

    wrapped.__class__ = type(f"OneStep{cls.__name__}", (cls,), {"sigma_to_t": sigma_to_t, "forward": forward})
