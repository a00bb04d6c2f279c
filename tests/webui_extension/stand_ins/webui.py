"""As much of AUTOMATIC1111 and Forge as our samplers and panel touch, over a toy model."""

from __future__ import annotations

import importlib
import sys
import threading
from collections import namedtuple
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn
from turbodistill.core.schedule import expand

OURS = "turbodistill.webui_extension"


class Interrupted(BaseException):
    pass


class SamplerData(namedtuple("SamplerData", ["name", "constructor", "aliases", "options"])):
    def total_steps(self, steps):
        return steps


class Wrapped(nn.Module):
    """AUTOMATIC1111's model for one picture: levels, and x0 by reading the network's output."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model
        self.sigmas = model.levels()

    def sigma_to_t(self, sigma, quantize=None):
        return self.inner_model.toy.schedule.timestep(sigma)

    def forward(self, x, sigma, cond):
        toy, t = self.inner_model.toy, 1000 * sigma if self.inner_model.flow else self.sigma_to_t(sigma)
        return toy.schedule.to_x0(toy.prediction, x, self.inner_model.apply_model(x, sigma, t, cond), sigma)


class Model:
    """AUTOMATIC1111's loaded model."""

    is_sdxl = False

    def __init__(self, toy, file=None):
        self.toy, self.told = toy, []
        self.flow = toy.prediction == "flow"
        self.parameterization = "v" if toy.prediction == "v" else "eps"
        self.sd_checkpoint_info = file and SimpleNamespace(filename=str(file), name_for_extra=file.stem)
        self.zero_terminal = False
        if self.flow:
            self.create_denoiser = lambda: Wrapped(self)
            self.add_noise_to_latent = lambda x, noise, amount: x * (1 - amount) + noise * amount

    def levels(self) -> Tensor:
        """The table as it is now: another, once the schedule ends without signal."""
        return self.toy.schedule.sigma(torch.arange(1000.0)) * (2.0 if self.zero_terminal else 1.0)

    def apply_model(self, x, sigma, t, cond):
        self.told.append(t)
        return called(self.toy, x, sigma, t, cond)


def called(toy, x, sigma, t, cond):
    """The toy's output where a host's network is told t; a flow model is told its sigma, a flow toy where that lies."""
    if toy.prediction == "flow":
        return toy.backbone(x, toy.schedule.timestep(t / 1000) / 1000, cond)
    return toy.backbone(expand(toy.schedule.alpha_sigma(sigma)[0], x) * x, t.float() / 1000, cond)


class Predictor(nn.Module):
    """Forge's levels and reading, a part of the model."""

    def __init__(self, toy):
        super().__init__()
        self.toy = toy
        self.prediction_type = {"eps": "epsilon", "v": "v_prediction", "flow": "const"}[toy.prediction]
        flow = toy.prediction == "flow"
        self.register_buffer(
            "sigmas", toy.schedule.sigma(torch.arange(1000.0)) if flow else toy.schedule.sigmas.float()
        )

    def timestep(self, sigma):
        if self.prediction_type == "const":
            return sigma * 1000
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(0).view(sigma.shape)

    def calculate_denoised(self, sigma, model_output, model_input):
        return self.toy.schedule.to_x0(self.toy.prediction, model_input, model_output, sigma)

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        if self.prediction_type == "const":
            return sigma * noise + (1.0 - sigma) * latent_image
        return noise * (torch.sqrt(1.0 + sigma**2.0) if max_denoise else sigma) + latent_image


class ForgeNetwork(nn.Module):
    """Forge's KModel; reForge's bears another name for the predictor."""

    def __init__(self, model, place="predictor"):
        super().__init__()
        self.told, self.toy, self.place = model.told, model.toy, place
        setattr(self, place, Predictor(model.toy))

    def apply_model(self, x, sigma, cond):
        space = getattr(self, self.place)
        t = space.timestep(sigma)
        self.told.append(t)
        return space.calculate_denoised(sigma, called(self.toy, x, sigma, t, cond), x)


class CFGDenoiser(nn.Module):
    """What samplers call: guidance (none here), the mask, interrupts and previews."""

    def __init__(self, sampler):
        super().__init__()
        self.sampler, self.model_wrap, self.mask, self.nmask, self.init_latent = sampler, None, None, None, None

    @property
    def inner_model(self):
        if self.model_wrap is None:
            model = shared.sd_model
            if hasattr(model, "forge_objects"):
                network = model.forge_objects.unet.model
                self.model_wrap = SimpleNamespace(sigmas=getattr(network, network.place).sigmas, inner_model=model)
            else:
                self.model_wrap = Wrapped(model)
        return self.model_wrap

    def forward(self, x, sigma, cond):
        if shared.state.interrupted:
            raise Interrupted
        model = shared.sd_model
        if hasattr(model, "forge_objects"):
            x0 = model.forge_objects.unet.model.apply_model(x, sigma, cond)
        else:
            x0 = self.inner_model(x, sigma, cond=cond)
        if self.mask is not None:
            x0 = x0 * self.nmask + self.init_latent * self.mask
        self.sampler.last_latent = x0
        return x0


class KDiffusionSampler:
    """The hosts' own: it scales noise, slices levels for image to image, and calls a function of k-diffusion's kind."""

    def __init__(self, function, sd_model):
        self.func, self.last_latent = function, None
        self.model_wrap_cfg = CFGDenoiser(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def _launch(self, p, x, sigmas, conditioning):
        self.model_wrap_cfg.mask, self.model_wrap_cfg.nmask = getattr(p, "mask", None), getattr(p, "nmask", None)
        try:
            return self.func(
                self.model_wrap_cfg,
                x,
                extra_args={"cond": conditioning},
                disable=False,
                callback=lambda told: shared.state.seen.append(told["i"]),
                sigmas=sigmas,
            )
        except Interrupted:
            return self.last_latent

    def sample(self, p, x, conditioning, uncond, steps=None, image_conditioning=None):
        sigmas, more = self.get_sigmas(p, steps or p.steps), shared.opts.sgm_noise_multiplier
        if space := forge_space():
            x = space.noise_scaling(sigmas[0], x, torch.zeros_like(x), max_denoise=more)
        else:
            x = x * (torch.sqrt(1.0 + sigmas[0] ** 2.0) if more else sigmas[0])
        self.last_latent = x
        return self._launch(p, x, sigmas, conditioning)

    def sample_img2img(
        self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None
    ):
        last = steps - 1
        steps = int(steps / min(p.denoising_strength, 0.999))
        sigmas = self.get_sigmas(p, steps)[steps - last - 1 :]
        if space := forge_space():
            noisy = space.noise_scaling(sigmas[0], noise, x)
        elif hasattr(shared.sd_model, "add_noise_to_latent"):
            noisy = shared.sd_model.add_noise_to_latent(x, noise, sigmas[0])
        else:
            noisy = x + noise * sigmas[0]
        self.model_wrap_cfg.init_latent = self.last_latent = x
        return self._launch(p, noisy, sigmas, conditioning)


def forge_space():
    if not hasattr(shared.sd_model, "forge_objects"):
        return None
    network = shared.sd_model.forge_objects.unet.model
    return getattr(network, network.place)


def forged(model, place="predictor"):
    """The model as Forge's."""
    model.forge_objects = SimpleNamespace(unet=SimpleNamespace(model=ForgeNetwork(model, place)))
    return model


class Script:
    is_img2img = False
    tabname = "txt2img"
    infotext_fields = None

    def elem_id(self, name):
        return f"script_{self.tabname}_{name}"


class Parameters:
    """The hosts' `params` of one `<lora:name:1>`."""

    def __init__(self, *items):
        self.items = list(items)


class Processing(SimpleNamespace):
    """The hosts' `p`."""

    def __init__(self, **given):
        fresh = {"extra_generation_params": {}, "comments": [], "extra_network_data": {}}
        plain = {"steps": 1, "sampler_name": "ADD 1-step", "cfg_scale": 1.0, "is_hr_pass": False}
        super().__init__(**fresh | plain | {"denoising_strength": None} | given)

    def comment(self, text):
        self.comments.append(text)


class Progress(SimpleNamespace):
    """What the hosts answer a page that asks how far a picture is."""


class Options(SimpleNamespace):
    """The hosts' settings: two, one of which waits for the lock when it is changed."""

    def __init__(self, **given):
        def wrap_queued_call():
            def f(): ...

            return f

        waits, plain = SimpleNamespace(onchange=wrap_queued_call()), SimpleNamespace(onchange=None)
        waits.onchange.__qualname__ = "wrap_queued_call.<locals>.f"  # which is not within this class
        super().__init__(data={}, data_labels={"sd_vae": waits, "grid_save": plain}, **given)

    def set(self, key, value, is_api=False, run_callbacks=True):
        self.data[key] = value
        return True


shared = ModuleType("modules.shared")


def _module(name: str, **held) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    made.__dict__.update(held)
    return made


@contextmanager
def installed(model, folder: Path, kind: str = "a1111", **changed):
    """The host's modules are importable, and ours over them in what this gives, as long as it lives.

    `changed` replaces whole modules of the host, by their names without `modules.`; None takes them away.
    """
    networks = _module("networks", available_networks={}, available_network_aliases={})
    networks.list_available_networks = lambda: None
    existing = SamplerData("DPM++ 2M", None, [], {})
    shared.__spec__ = ModuleSpec("modules.shared", None)
    shared.sd_model = model
    shared.opts = Options(sgm_noise_multiplier=False, sd_model_checkpoint="", add_option=None)
    shared.state = SimpleNamespace(interrupted=False, seen=[])
    shared.cmd_opts = SimpleNamespace(lora_dir=str(folder / "Lora"), api=True, nowebui=False, api_auth=None)
    samplers = _module(
        "modules.sd_samplers",
        all_samplers=[existing],
        all_samplers_map={"DPM++ 2M": existing},
        set_samplers=lambda: None,
    )
    named = {
        "": _module("modules", __path__=[]),
        "paths": _module("modules.paths", data_path=str(folder)),
        "shared": shared,
        "sd_models": _module("modules.sd_models", model_data=SimpleNamespace(sd_model=model), checkpoint_aliases={}),
        "call_queue": _module("modules.call_queue", queue_lock=threading.Lock()),
        "progress": _module("modules.progress", ProgressResponse=Progress),
        "sd_samplers": samplers,
        "sd_samplers_common": _module("modules.sd_samplers_common", SamplerData=SamplerData),
        "sd_samplers_kdiffusion": _module("modules.sd_samplers_kdiffusion", KDiffusionSampler=KDiffusionSampler),
        "scripts": _module("modules.scripts", Script=Script, AlwaysVisible=object(), scripts_data=[]),
        "ui_common": _module("modules.ui_common", create_refresh_button=lambda *_: None),
    }
    named |= changed
    table = {f"modules.{name}".rstrip("."): module for name, module in named.items()}
    table |= {"networks": networks, "modules_forge": _module("modules_forge") if kind == "forge" else None}
    kept = _taken_away(table)
    sys.modules.update({name: module for name, module in table.items() if module is not None})
    try:
        yield SimpleNamespace(
            get=lambda name: importlib.import_module(f"{OURS}.{name}"),
            networks=networks,
            samplers=samplers,
            shared=shared,
            scripts=named["scripts"],
        )
    finally:
        _taken_away(table)
        for name, module in kept.items():
            sys.modules[name] = module
            if name.startswith(OURS):
                setattr(sys.modules[OURS], name.rpartition(".")[2], module)


def _taken_away(table) -> dict[str, ModuleType]:
    """The modules of a host, and ours over them, which are importable no more."""
    kept = {name: module for name, module in sys.modules.items() if name in table or name.startswith(f"{OURS}.host")}
    for name in kept:
        del sys.modules[name]
        if name.startswith(OURS):
            delattr(sys.modules[OURS], name.rpartition(".")[2])  # else `from . import` would find it there
    return kept
