"""Weights into a diffusers or transformers module, without a second copy of them in memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .errors import ModelError

EIGHT_BITS = {getattr(torch, n) for n in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, n)}


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within, modules made in this thread have parameters without memory; their buffers are real."""
    thread = threading.get_ident()

    def replace(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:  # torch types it as None
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle: Any = register_module_parameter_registration_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def stored_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The floating-point type of most of the numbers; float32 where there are none."""
    numbers: Counter[torch.dtype] = Counter()
    for value in weights.values():
        if value.is_floating_point():
            numbers[value.dtype] += value.numel()
    return numbers.most_common(1)[0][0] if numbers else torch.float32


def loaded(
    path: Path,
    what: str,
    make: Callable[[], nn.Module],
    convert: Callable[[nn.Module], dict[str, Tensor]],
    dtype: torch.dtype | None,
    eight_bits_as: torch.dtype,
) -> tuple[nn.Module, str]:
    """The module that `make` makes, with the weights that `convert` gives for it, and a remark on their type, or "".

    In the type that most of them are stored in, or in `dtype`. Raises ModelError if a weight is missing, unknown, of
    another shape or no number.
    """
    with parameters_on_meta():
        module = make()
    weights = convert(module)
    _check_names(path, what, weights, module)
    kinds = sorted({str(w.dtype).removeprefix("torch.") for w in weights.values() if w.is_floating_point()})
    stored = stored_dtype(weights)
    target = dtype or (eight_bits_as if stored in EIGHT_BITS else stored)
    # T5 overflows in float16 without these.
    precise = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if target == torch.float16 else set()
    for name in list(weights):  # one at a time, so that no second copy of all of them is held
        if weights[name].is_floating_point():
            weights[name] = weights[name].to(torch.float32 if precise.intersection(name.split(".")) else target)
    module.load_state_dict(weights, strict=False, assign=True)
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # pyright: ignore[reportCallIssue]
    check_finite(path, what, module)
    mixed = len(kinds) > 1 or stored in EIGHT_BITS
    remark = f"the {what} is stored in {' and '.join(kinds)}: it is loaded in {str(target).removeprefix('torch.')}."
    return module.eval(), remark if mixed and dtype is None else ""


def _check_names(path: Path, what: str, weights: Mapping[str, Tensor], module: nn.Module) -> None:
    """Raise ModelError unless the weights have a module's own names and shapes."""
    wanted = module.state_dict()
    tied = set(getattr(module, "_tied_weights_keys", None) or ())
    missing = sorted(n for n in wanted if n not in weights and n not in tied)
    strange = sorted(n for n in weights if n not in wanted)
    other = [n for n in wanted if n in weights and wanted[n].shape != weights[n].shape]
    for names, fault in (
        (missing, "are missing"),
        (strange, "are of no layer that is known"),
        (other, "are of another shape"),
    ):
        if names:
            raise ModelError(
                f"{path}: {len(names)} of the {what}'s weights {fault}, such as {names[0]:.200}: the file is damaged, "
                "or of a kind that is not known; get it again, or load the model that it was made of"
            )


def check_finite(path: Path, what: str, module: nn.Module) -> None:
    """Raise ModelError for weights that are no numbers, or that are still without memory."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_meta:
            raise ModelError(f"{path}: the {what}'s weight {name} is missing: get the file again")
        if not value.is_floating_point() or not value.numel():
            continue
        low, high = value.detach().aminmax()  # of not-a-number both are that; many times faster than isfinite
        if not (low.isfinite() and high.isfinite()):
            raise ModelError(
                f"{path}: the {what}'s weight {name} holds what is no number (NaN or infinity): the file is damaged, "
                "or a merge went wrong; get it again, or merge it again in float32"
            )
