"""The optimizer of everything that is trained."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ADAMW8BIT, PRODIGY, Config, ConfigError

# What an optimizer takes besides torch: the module, and the name that pip knows it by.
NEEDS = {ADAMW8BIT: ("torchao", "torchao"), PRODIGY: ("pytorch_optimizer", "pytorch-optimizer")}
BETAS = (0.9, 0.99)  # of what trains the student


def of_student(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The student's, as the settings ask for it; raises ConfigError where its library is missing.

    Discriminator and fake score learn by AdamW whatever the student learns by: both follow a student that moves, and
    Prodigy's estimate of a learning rate only ever rises.
    """
    check_optimizer(config.optimizer)
    parameters = list(module.parameters())
    if config.optimizer == ADAMW8BIT:
        return _eight_bits(parameters, config.lr, BETAS)
    if config.optimizer == PRODIGY:
        return _prodigy(parameters, config.lr, BETAS)
    return adam(module, config.lr, BETAS)


def adam(module: nn.Module, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW without weight decay, as one kernel where torch has that for the device: several times as fast."""
    parameters = list(module.parameters())
    try:
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0, fused=True)
    except RuntimeError:  # an older torch, or a device without it
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0)


def has_eight_bits() -> bool:
    """Whether there is an optimizer whose moments have eight bits."""
    return importlib.util.find_spec("torchao") is not None


def check_optimizer(kind: str) -> None:
    """Raise ConfigError for an optimizer that needs what is not installed."""
    if kind not in NEEDS:
        return
    module, name = NEEDS[kind]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"optimizer is {kind!r}, which needs {name}: pip install {name} (for ComfyUI and WebUIs: into the Python "
            "that they run in), or use adamw"
        )


def _eight_bits(parameters: list[nn.Parameter], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Moments of eight bits (arXiv 2110.02861), by torchao."""
    from torchao.optim import AdamW8bit

    class Eager(AdamW8bit):
        """As it is: compiling its step takes seconds for every shape of a LoRA, which has hundreds."""

        def step(self, closure=None):
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return Eager(parameters, lr=lr, betas=betas, weight_decay=0.0)


def _prodigy(parameters: list[nn.Parameter], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Prodigy (arXiv 2306.06101, algorithm 4); its estimate, which `lr` multiplies, is saved with its groups.

    With Adam's bias correction, as its authors advise for diffusion models; their safeguard is for a warm-up of `lr`,
    which there is none of here, and with a small `lr` the estimate would never rise.
    """
    from pytorch_optimizer import Prodigy

    return Prodigy(parameters, lr=lr, betas=betas, bias_correction=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group a learning rate, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def saved_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` in plain tensors: moments of eight bits as the parts that they are of."""
    found = optimizer.state_dict()
    state = {i: {k: _parts(v) for k, v in moments.items()} for i, moments in found["state"].items()}
    return found | {"state": state}


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """The inverse of `saved_state`; raises ValueError for the state of another kind of optimizer."""
    state = {i: {k: _whole(v) for k, v in moments.items()} for i, moments in saved["state"].items()}
    optimizer.load_state_dict(saved | {"state": state})


PARTS = ("codes", "scale", "qmap")


def _parts(moment: Any) -> Any:
    if all(hasattr(moment, name) for name in PARTS):
        return {name: getattr(moment, name) for name in PARTS} | {"signed": moment.signed}
    return moment


def _whole(moment: Any) -> Any:
    if not isinstance(moment, dict):
        return moment
    if not has_eight_bits() or moment.keys() != {*PARTS, "signed"}:
        raise ValueError("an optimizer's moments are of a kind that is not known here")
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(*(moment[name] for name in PARTS), moment["signed"])


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step can be left out on the device, by `found_inf`, without asking it, as fused kernels do."""
    return bool(optimizer.defaults.get("fused"))
