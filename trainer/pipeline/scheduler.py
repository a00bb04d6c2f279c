"""A scheduler for diffusers' pipelines that samples a student exactly as core does.

This module alone imports diffusers when it is imported: a class needs its base, and `from_pretrained` finds it here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from ...core.sampling import row_noise, sigmas_of
from ...core.schedule import (
    PREDICTION_TYPES,
    DiscreteSchedule,
    FlowSchedule,
    Schedule,
    expand,
    prediction_of_name,
    trailing_timesteps,
)
from .denoisers import pack, unpack


@dataclass
class StudentSchedulerOutput(BaseOutput):
    """The next noisy latents, and the picture that was predicted on the way."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """Predict the picture, add fresh noise for the next timestep, and so on (ADD, section 4).

    Timesteps trail from `start_timestep`; `trained_steps` is the most that the student was trained for. Latents are
    those of DDIM (alpha x0 + sigma noise), in a flow (1 - sigma) x0 + sigma noise. The noise between two steps
    follows from the first step's latents, so that it is the same as in every other host; `latent_size` (height, width)
    lets that hold for the packed latents of FLUX.1 and its like.

    `prediction_type` is how the network's output is read: epsilon, v_prediction, sample or flow_prediction;
    `use_flow_sigmas` says that the noise levels are a flow's, of `shift`, or of one that depends on the picture's size
    (`use_dynamic_shifting`, with the settings that diffusers has for it). Else they are those of the betas.
    """

    config: Any  # diffusers types it as a plain dictionary, which has no attributes
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        start_timestep: int = 999,
        trained_steps: int = 1,
        latent_size: tuple[int, int] | None = None,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        use_flow_sigmas: bool = False,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        time_shift_type: str = "exponential",
    ):
        self.prediction = prediction_of_name(prediction_type)
        if not self.prediction:
            raise ValueError(
                f"prediction_type is {prediction_type!r:.80}: use one of {', '.join(PREDICTION_TYPES.values())}"
            )
        if use_flow_sigmas:
            self.schedule: Schedule = FlowSchedule(shift, num_train_timesteps)
        else:
            betas = (beta_start, beta_end, beta_schedule, trained_betas)
            table = DDIMScheduler(num_train_timesteps, *betas, rescale_betas_zero_snr=rescale_betas_zero_snr)
            self.schedule = DiscreteSchedule(table.alphas_cumprod)
            self.alphas_cumprod = self.schedule.alphas_cumprod.float()
        self._begin_index: int | None = None
        self.set_timesteps(1)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """The student's own timesteps, or those that are given; of `sigmas`, which some pipelines give, the number.

        `mu` is the shift of a picture of this size where it depends on that. Raises ValueError for none of them.
        """
        given = timesteps if timesteps is not None else sigmas
        count = num_inference_steps if given is None else len(given)
        if not count:
            raise ValueError("give num_inference_steps, or timesteps")
        if count > self.config.trained_steps:
            most = self.config.trained_steps
            warnings.warn(f"num_inference_steps is {count}: this student was trained for {most}", stacklevel=2)
        total = self.config.num_train_timesteps
        if self.config.use_dynamic_shifting and mu is not None:
            self.schedule = FlowSchedule(mu if self.config.time_shift_type == "linear" else math.exp(mu), total)
        own = trailing_timesteps(count, self.config.start_timestep, total) if timesteps is None else list(timesteps)
        self.sigmas = sigmas_of(self.schedule, own)
        self.num_inference_steps = count
        # A flow's network takes the noise level as its timestep, in thousandths.
        self.timesteps = self.sigmas[:-1] * total if self.flows else torch.tensor(own)
        self.timesteps = self.timesteps.to(device)
        self._step_index: int | None = None
        self._begin_index = None
        self._noise: Any = None

    @property
    def flows(self) -> bool:
        """Whether the noise levels are a flow's."""
        return isinstance(self.schedule, FlowSchedule)

    @property
    def init_noise_sigma(self) -> float:
        """What a pipeline multiplies pure noise with."""
        return float(self.schedule.alpha_sigma(self.sigmas[0])[1])

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The step that a pipeline begins with: of picture to picture one of the later."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The latents as they are: the network takes them so."""
        return sample

    def _index(self, timestep: Any) -> int:
        """The step of a timestep: the nearest, since some pipelines round it."""
        return int((self.timesteps.cpu().double() - float(timestep)).abs().argmin())

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> StudentSchedulerOutput | tuple[Tensor, Tensor]:
        """Latents (B, C, H, W), or packed (B, N, D), and the network's output for them -> the next, less noisy ones."""
        if self._step_index is None:
            self._step_index = self._index(timestep) if self._begin_index is None else self._begin_index
            self._noise, self._first = self._noise_of(sample), self._step_index
        sigma, following = self.sigmas[self._step_index : self._step_index + 2].to(sample.device)
        x = sample.float() / self._alpha(sigma)
        x0 = self.schedule.to_x0(self.prediction, x, model_output.float(), sigma)
        x = x0
        if following > 0:
            noise = self._noise(self._step_index - self._first).to(x)
            x = self.schedule.add_noise(x0, noise, following) * self._alpha(following)
        self._step_index += 1
        x, x0 = x.to(sample.dtype), x0.to(sample.dtype)
        return StudentSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)

    def _alpha(self, sigma: Tensor) -> Tensor | float:
        """The factor between k-diffusion's latents and these."""
        return 1.0 if self.flows else self.schedule.alpha_sigma(sigma)[0]

    def _noise_of(self, sample: Tensor) -> Any:
        """`noise(i)` that comes after step i, seeded by the first latents; of packed ones as if they were not."""
        height, width = self.config.latent_size or (0, 0)
        if sample.ndim == 3 and sample.shape[1] * 4 == height * width:
            noise = row_noise(unpack(sample, height, width))
            return lambda i: pack(noise(i))
        return row_noise(sample)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents (B, ...) as noisy as they are at timesteps (B,)."""
        x0 = original_samples
        sigma = timesteps / self.config.num_train_timesteps if self.flows else self.schedule.sigma(timesteps.cpu())
        alpha, s = self.schedule.alpha_sigma(sigma.to(x0.device, torch.float32))
        return (expand(alpha, x0) * x0 + expand(s, noise) * noise).to(x0.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The same, as a flow's pipelines ask for it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
