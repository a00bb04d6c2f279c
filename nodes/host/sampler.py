"""ComfyUI's own SAMPLER and SIGMAS, as what a teacher is sampled with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ...core.sampling import trailing_sigmas
from ...core.schedule import Schedule
from .patches import values_hash

MOST = 1000  # steps, as of pair_steps
LATEST = 0.8  # of the noise levels' timesteps: sampling that begins below does not begin with noise
# Samplers without randomness or steps of a batch's own: rows beside each other come out as each does alone.
STEADY = ("euler", "heun", "heunpp2", "dpm_2", "lms", "dpmpp_2m", "ipndm", "ipndm_v", "deis")


class SamplerSampling:
    """`trainer.host.HostSampling` over ComfyUI's sampling; `sampler` or `sigmas` may be missing.

    Where the sampler is missing it is ComfyUI's `name`, and where the sigmas are, `steps` trailing timesteps. Raises
    ValueError for a SAMPLER of another kind, and for SIGMAS that do not lead from noise to a picture.
    """

    def __init__(self, model, schedule: Schedule, sampler, sigmas: Tensor | None, name: str, steps: int):
        self.model, self.sampler = model, comfy.samplers.ksampler(name) if sampler is None else sampler
        self.sigmas = trailing_sigmas(schedule, steps) if sigmas is None else sigmas.detach().float().cpu()
        check_sampler(self.sampler)
        check_sigmas(self.sigmas, schedule)
        function, options = self.sampler.sampler_function, self.sampler.extra_options
        self.steady = not options and function.__name__.removeprefix("sample_") in STEADY
        called = function.__qualname__.removeprefix("sample_")
        values = " ".join(f"{sigma:.5g}" for sigma in self.sigmas.tolist())
        digest = hashlib.sha256(values.encode()).hexdigest()[:8]
        self.recipe = {
            "sampler": f"ComfyUI's {called}" + (f" with options {values_hash(options)[:8]}" if options else ""),
            "steps": f"{len(self.sigmas) - 1} from sigma {self.sigmas[0]:.4g} (SIGMAS {digest})",
        }

    def __call__(self, model: Callable[[Tensor, Tensor], Tensor], noise: Tensor, seeds: list[int]) -> Tensor:
        """Standard normal noise (B, C, H, W) and the seed of each row -> latents (B, C, H, W).

        All at once if the sampler is steady, else one by one: so a picture depends on its seed alone, and is the one
        that SamplerCustom makes with it.
        """
        if self.steady or len(noise) == 1:
            return self._sample(model, noise, seeds[0])
        rows = range(len(noise))
        return torch.cat([self._sample(_row(model, k), noise[k : k + 1], seeds[k]) for k in rows])

    def _sample(self, model: Callable[[Tensor, Tensor], Tensor], noise: Tensor, seed: int) -> Tensor:
        extra = {"model_options": {}, "seed": seed}
        devices = [noise.device] if noise.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            wrapped, sigmas, empty = Model(model, self.model), self.sigmas.to(noise.device), torch.zeros_like(noise)
            latents = self.sampler.sample(wrapped, sigmas, extra, None, noise, empty, None, True)
        if latents.shape != noise.shape:
            raise ValueError(f"{self.recipe['sampler']} makes pictures of another size: choose another sampler")
        return latents


class Model:
    """What ComfyUI's samplers call a guided model, with what they look up behind it."""

    def __init__(self, guided: Callable[[Tensor, Tensor], Tensor], model):
        self.guided, self.model_patcher = guided, model
        self.cfg = 1.0  # for the log: guidance is within
        self.inner_model = SimpleNamespace(model_sampling=model.get_model_object("model_sampling"))

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict | None = None, seed: int | None = None) -> Tensor:
        if asked := set(model_options or ()):
            raise ValueError(
                f"the sampler changes the guidance within its steps ({', '.join(sorted(asked))}), as those of CFG++ "
                "do, which a teacher cannot: choose one without"
            )
        return self.guided(x, sigma)


def _row(model: Any, k: int) -> Any:
    """A guided batch's row as a batch of one."""
    return model.rows(slice(k, k + 1))


def check_sampler(sampler) -> None:
    """Raise ValueError for a SAMPLER that is not a function over a model's pictures at falling noise levels."""
    if not isinstance(sampler, comfy.samplers.KSAMPLER) or not hasattr(sampler.sampler_function, "__qualname__"):
        raise ValueError(
            f"sampler is a {type(sampler).__qualname__:.80}, which works in a way of its own: connect KSamplerSelect, "
            "or another node that gives one of ComfyUI's samplers"
        )


def check_sigmas(sigmas: Tensor, schedule: Schedule) -> None:
    """Raise ValueError for SIGMAS that do not fall from noise to 0 in 1 to MOST steps."""
    if sigmas.ndim != 1 or not 2 <= len(sigmas) <= MOST + 1:
        raise ValueError(f"sigmas has {max(sigmas.numel() - 1, 0)} steps: give 1 to {MOST}, with a denoise of 1")
    if not sigmas.isfinite().all() or (sigmas.diff() >= 0).any():
        raise ValueError("sigmas do not fall from step to step: connect a scheduler such as BasicScheduler")
    if sigmas[-1] != 0:
        raise ValueError(f"sigmas end at {sigmas[-1]:.4g}: the last must be 0, connect them whole, not split")
    begins = float(schedule.timestep(sigmas[:1])[0]) / (schedule.timesteps - 1)
    if begins < LATEST:
        raise ValueError(
            f"sigmas begin at {sigmas[0]:.4g}, where a part of a picture should be there already: pairs begin with "
            "noise, set the scheduler's denoise to 1"
        )
