"""A few-step model sampled as its recipe says: what the WebUIs, ComfyUI and plain Python have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core.denoiser import Cond, Denoiser, Guidance, guided
from ..core.families import SamplingRecipe, lcm_boundary
from ..core.sampling import sigmas_of
from ..core.schedule import DiscreteSchedule, FlowSchedule, Schedule


def schedule_for(prediction: str) -> Schedule:
    """The kind of schedule of a network that predicts this; its reading of outputs needs no more."""
    return FlowSchedule() if prediction == "flow" else DiscreteSchedule()


def to_x0(prediction: str, schedule: Schedule, x: Tensor, output: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
    """What the network put out (B, ...) for x (B, ...) at sigma, timestep (B,) -> x0 (B, ...)."""
    if prediction == "lcm":
        return lcm_boundary(x, schedule.to_x0("eps", x, output, sigma), timestep)
    return schedule.to_x0(prediction, x, output, sigma)


def as_it_was_put_out(base: str, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """x0 as the host has read it from a network that predicts `base` -> what the network put out, all (B, ...)."""
    return schedule_for(base).from_x0(base, x, x0, sigma)


class FewStepModel:
    """A denoiser that makes pictures in one or a few steps, as `recipe` says.

    `uncond` is the condition of the empty prompt, which a recipe with a cfg above 1 needs. `merging` gives the context
    in which the weights are those that are sampled, and `release` takes off what was put on the denoiser.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        recipe: SamplingRecipe,
        uncond: Cond | None = None,
        merging: Callable[[], AbstractContextManager[Any]] = nullcontext,
        release: Callable[[], None] = lambda: None,
    ):
        self.denoiser, self.recipe, self.uncond = denoiser, recipe, uncond
        self._merging, self.release = merging, release
        self.schedule = schedule = denoiser.schedule
        if isinstance(schedule, FlowSchedule):
            if recipe.flow_shift:
                self.schedule = FlowSchedule(recipe.flow_shift, schedule.timesteps)
        elif recipe.shift != 1000:
            # NitroFusion's network is given another timestep; its noise levels are those of the table.
            shifted: Any = copy.copy(schedule)
            shifted.timestep = lambda sigma: recipe.network_timestep(schedule.timestep(sigma))
            self.denoiser = copy.copy(denoiser)
            self.denoiser.schedule = shifted

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within, the weights are those that are sampled."""
        with self._merging():
            yield

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """Noisy x (B, C, H, W) at sigma (B,) -> x0 (B, C, H, W), without guidance."""
        if self.recipe.prediction == "inherit":
            return self.denoiser(x, sigma, cond)
        output = self.denoiser.output(x, sigma, cond).to(x.dtype)
        return to_x0(self.recipe.prediction, self.schedule, x, output, sigma, self.schedule.timestep(sigma))

    both = Denoiser.both

    def sigmas(self, steps: int, strength: float = 1.0) -> Tensor:
        """Sigmas (steps + 1,) with the final 0; with a strength below 1 they begin nearer to the picture."""
        return sigmas_of(self.schedule, self.recipe.timesteps(steps, strength))

    @torch.no_grad()
    def generate(
        self,
        noise: Tensor,
        cond: Cond,
        steps: int | None = None,
        picture: Tensor | None = None,
        strength: float = 1.0,
        fresh: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Unit noise (B, C, H, W), and a picture's latents to begin from, if any -> latents (B, C, H, W).

        In as many steps as it was made for, if none are given. `fresh(i)` draws the noise that follows step i, by
        default as every host does.
        """
        sigmas = self.sigmas(steps or self.recipe.steps, strength).to(noise)
        start = torch.zeros_like(noise) if picture is None else picture.to(noise).expand_as(noise)
        x = self.schedule.add_noise(start, noise, sigmas[:1])
        if picture is None and not self.recipe.exact and not isinstance(self.schedule, FlowSchedule):
            x = (1 + sigmas[0] ** 2).sqrt() * noise  # so that the network is given the noise itself, as by diffusers
        uncond = None if self.uncond is None else self.uncond.to(noise.device)

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            return guided(self, x, sigma, cond, uncond, Guidance(self.recipe.cfg))  # pyright: ignore[reportArgumentType]

        return self.recipe.sample(model, x, sigmas, schedule=self.schedule, noise=fresh)
