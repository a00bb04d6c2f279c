"""comfy.sampler_helpers, samplers and sample."""

from __future__ import annotations

import math

import torch
from torch import nn
from turbodistill.core.sampling import sample_euler


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


def fix_empty_latent_channels(model, latent_image, downscale_ratio_spacial=None, downscale_ratio_temporal=None):
    if latent_image.count_nonzero() > 0:
        return latent_image
    wanted = model.get_model_object("latent_format")
    ratio = (downscale_ratio_spacial or wanted.spacial_downscale_ratio) / wanted.spacial_downscale_ratio
    shape = (len(latent_image), wanted.latent_channels, *(round(size * ratio) for size in latent_image.shape[2:]))
    return latent_image if latent_image.shape == shape else latent_image.new_zeros(shape)
