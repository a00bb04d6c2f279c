"""Noise schedules as one view: sigma in k-diffusion's space, and what a network predicts there.

A variance-preserving model (eps, v, x0) sees `x = x0 + sigma * noise`, a flow model
`x = (1 - sigma) * x0 + sigma * noise`: the convention of k-diffusion and ComfyUI. The (alpha_t,
sigma_t) of the papers are `Schedule.alpha_sigma`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor

TIMESTEPS = 1000  # of a discrete model
LAST_TIMESTEP = TIMESTEPS - 1  # pure noise, where every sampler begins by itself
# What networks predict -> `prediction_type`, as diffusers' schedulers call it.
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
OTHER_NAMES = {"v-prediction": "v", "const": "flow"}  # ModelSpec's and the hosts'


def prediction_of_name(name: str) -> str:
    """What a network predicts (eps, v, x0, flow) by any program's name for it; "" for a name that is not known."""
    names = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()} | OTHER_NAMES
    return name if name in PREDICTION_TYPES else names.get(name, "")


def expand(value: Tensor, like: Tensor) -> Tensor:
    """(B,) or scalar -> broadcastable over `like` (B, ...), in its dtype and on its device."""
    value = torch.as_tensor(value, device=like.device, dtype=like.dtype)
    return value.reshape(-1, *(1,) * (like.ndim - 1))


TERMINAL = 4.8973451890853435e-08  # what the hosts put in place of a last alphas_cumprod of 0


def scaled_linear(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """alphas_cumprod (steps,) of Stable Diffusion 1, 2 and XL: sqrt(beta) is linear in t."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def zero_terminal(alphas_cumprod: Tensor) -> Tensor:
    """Rescale a schedule (T,) so that its last step holds no signal (arXiv 2305.08891, algorithm 1).

    The last value stays barely above zero (the hosts' own choice), so that sigma is finite: 4518.
    """
    root = alphas_cumprod.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    rescaled = ((root - last) * first / (first - last)) ** 2
    rescaled[-1] = TERMINAL
    return rescaled


def trailing_timesteps(steps: int, start: int = LAST_TIMESTEP, total: int = TIMESTEPS) -> list[int]:
    """Timesteps of an n-step sampler that begins at `start`: 999, 749, 499, 249 for four.

    From 999 these are diffusers' `timestep_spacing="trailing"`; a lower start scales them.
    """
    if not 1 <= steps <= start + 1:
        raise ValueError(f"steps is {steps}: give a number from 1 to {start + 1}")
    if not 0 <= start < total:
        raise ValueError(f"start timestep is {start}: the model knows 0 to {total - 1}")
    return [round((start + 1) * (1 - i / steps)) - 1 for i in range(steps)]


class Schedule(abc.ABC):
    """Maps timestep <-> sigma, adds noise, and turns network outputs into x0 and back."""

    timesteps: int

    @abc.abstractmethod
    def sigma(self, timestep: Tensor | float) -> Tensor:
        """Sigma (B,) of timesteps (B,), which may lie between two of the model's."""

    @abc.abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """Timestep (B,), fractional, of sigma (B,): the inverse of `sigma`."""

    @abc.abstractmethod
    def alpha_sigma(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The papers' (alpha_t, sigma_t), each (B,), at a k-diffusion sigma (B,)."""

    @abc.abstractmethod
    def signal(self, sigma: Tensor) -> Tensor:
        """The factor of x0 in the model's noisy input; the factor of the noise is sigma itself."""

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x0, noise (B, ...), sigma (B,) -> the noisy input (B, ...) at that level."""
        return expand(self.signal(sigma), x0) * x0 + expand(sigma, x0) * noise

    def noise_in(self, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """The noise that leads from x0 to x: the inverse of `add_noise`."""
        return (x - expand(self.signal(sigma), x) * x0) / expand(sigma, x)

    @abc.abstractmethod
    def to_x0(self, prediction: str, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        """What the network put out (B, ...) for input x (B, ...) -> its x0 (B, ...)."""

    @abc.abstractmethod
    def from_x0(self, prediction: str, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """The inverse of `to_x0`."""

    @property
    def sigma_max(self) -> float:
        return float(self.sigma(self.timesteps - 1))


class DiscreteSchedule(Schedule):
    """A trained table of alphas_cumprod (T,), as in DDPM and Stable Diffusion."""

    def __init__(self, alphas_cumprod: Tensor | None = None):
        table = scaled_linear() if alphas_cumprod is None else alphas_cumprod.detach().double().cpu().clone()
        if len(table) > 1 and table[-1] == 0:  # a zero-terminal table as diffusers makes it
            table[-1] = TERMINAL
        if not ((table > 0) & (table <= 1)).all() or not (table.diff() <= 0).all():
            raise ValueError(
                f"the model's noise schedule is unusable: alphas_cumprod must fall from 1 towards 0, this goes from "
                f"{float(table[0]):g} to {float(table[-1]):g}"
            )
        self.alphas_cumprod = table
        self.sigmas = ((1 - table) / table).sqrt()
        self.log_sigmas = self.sigmas.log()
        self.timesteps = len(table)
        self._tables = {self.log_sigmas.device: self.log_sigmas}

    def _table(self, device: torch.device) -> Tensor:
        """The logarithms of sigma (T,) where they are looked up: a look-up elsewhere would wait for the device.

        In float32 but for a CPU, which alone is fast in float64, and Apple's devices have none.
        """
        if device not in self._tables:
            self._tables[device] = self.log_sigmas.to(device, torch.float32)
        return self._tables[device]

    def sigma(self, timestep: Tensor | float) -> Tensor:
        t = timestep.detach() if isinstance(timestep, Tensor) else torch.tensor(timestep, dtype=torch.float64)
        table = self._table(t.device)
        low = t.to(table.dtype).clamp(0, self.timesteps - 1)
        floor = low.floor().long()
        ceil = low.ceil().long()
        return torch.lerp(table[floor], table[ceil], low - floor).exp().float()

    def timestep(self, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma).detach()
        table = self._table(sigma.device)
        log = sigma.to(table.dtype).clamp(min=1e-10).log()
        high = torch.searchsorted(table, log.contiguous()).clamp(1, self.timesteps - 1)
        weight = ((log - table[high - 1]) / (table[high] - table[high - 1])).clamp(0, 1)
        return (high - 1 + weight).float()

    def alpha_sigma(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        alpha = (sigma**2 + 1).rsqrt()
        return alpha, sigma * alpha

    def signal(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(torch.as_tensor(sigma))

    def to_x0(self, prediction: str, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        alpha, s = (expand(v, x) for v in self.alpha_sigma(sigma))
        if prediction == "eps":
            return x - expand(sigma, x) * output
        if prediction == "v":  # v = alpha_t eps - sigma_t x0 (arXiv 2202.00512), and x_t = alpha_t x
            return alpha * (alpha * x) - s * output
        if prediction == "x0":
            return output
        raise ValueError(f"prediction {prediction!r} does not go with a discrete schedule: use eps, v or x0")

    def from_x0(self, prediction: str, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        alpha, s = (expand(v, x) for v in self.alpha_sigma(sigma))
        if prediction == "eps":
            return (x - x0) / expand(sigma, x)
        if prediction == "v":
            return (alpha * (alpha * x) - x0) / s
        if prediction == "x0":
            return x0
        raise ValueError(f"prediction {prediction!r} does not go with a discrete schedule: use eps, v or x0")


class FlowSchedule(Schedule):
    """Rectified flow (SD3, Flux): sigma in [0, 1], x = (1 - sigma) x0 + sigma noise, output noise - x0.

    `shift` moves sigma towards noise: s t / (1 + (s - 1) t) (arXiv 2403.03206, eq. 23).
    """

    def __init__(self, shift: float = 1.0, timesteps: int = 1000):
        self.shift = shift
        self.timesteps = timesteps

    def sigma(self, timestep: Tensor | float) -> Tensor:
        t = (torch.as_tensor(timestep, dtype=torch.float32) + 1) / self.timesteps
        return self.shift * t / (1 + (self.shift - 1) * t)

    def timestep(self, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma)
        return sigma / (self.shift - (self.shift - 1) * sigma) * self.timesteps - 1

    def alpha_sigma(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - sigma, sigma

    def signal(self, sigma: Tensor) -> Tensor:
        return 1 - torch.as_tensor(sigma)

    def to_x0(self, prediction: str, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        if prediction == "flow":
            return x - expand(sigma, x) * output
        if prediction == "x0":
            return output
        raise ValueError(f"prediction {prediction!r} does not go with a flow schedule: use flow or x0")

    def from_x0(self, prediction: str, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        if prediction == "flow":
            return (x - x0) / expand(sigma, x)
        if prediction == "x0":
            return x0
        raise ValueError(f"prediction {prediction!r} does not go with a flow schedule: use flow or x0")


def flow_of(sigmas: Tensor) -> FlowSchedule | None:
    """The flow schedule whose noise levels are these (T,), whatever its shift; None where there is none.

    SD3, Flux and AuraFlow write the shift in different ways; the level halfway tells it for all.
    """
    table = sigmas.detach().double().cpu()
    middle = float(table[len(table) // 2 - 1])
    if not 0 < middle < 1:
        return None
    schedule = FlowSchedule(middle / (1 - middle))
    times = torch.linspace(0, 1, len(table) + 1)[1:] * schedule.timesteps - 1
    return schedule if torch.allclose(schedule.sigma(times).double(), table, atol=1e-4) else None


def schedule_of(prediction: str, sigmas: Tensor, timestep: Callable[[Tensor], Tensor]) -> Schedule:
    """The schedule of a host's own noise levels (T,), where `timestep` gives what its network is told of sigmas (T,).

    Raises ValueError for levels of another kind: EDM's networks, for one, are told the logarithm, not a number.
    """
    table = sigmas.detach().double().cpu()
    if prediction in ("eps", "v") and len(table) == TIMESTEPS:
        if torch.equal(timestep(sigmas).detach().cpu().float(), torch.arange(float(TIMESTEPS))):
            return DiscreteSchedule(1 / (1 + table**2))
    elif prediction == "flow" and len(table) and (schedule := flow_of(table)):
        return schedule
    raise ValueError(
        f"this model predicts {prediction} over {len(table)} noise levels of its own kind: eps and v over {TIMESTEPS} "
        "levels, and flow with a shift, are what can be used here; load such a model"
    )
