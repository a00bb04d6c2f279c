"""What other nodes have put on a MODEL: what of it a training sees, and a hash of it."""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

COMPILED = ("torch.compile", "torch_compile_kwargs")  # quicker, not different: trained without
NETWORK = ("transformer_options", "denoise_mask_function", "disable_cfg1_optimization", *COMPILED)
VALUES = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)
MOST = 2**16  # values that are read of a tensor


def check_patches(model) -> None:
    """Raise ValueError for a MODEL that a node has changed outside of its network, which alone is trained.

    Such nodes change the guidance, or save work between the steps of a sampler: a pass of the network knows of neither.
    """
    options = model.model_options
    inside = options.get("transformer_options", {})
    outside = [value for name, value in options.items() if name not in NETWORK and value]
    wrappers = [*model.wrappers.values(), *inside.get("wrappers", {}).values()]
    keys = {key or "a wrapper" for keyed in wrappers for key, found in keyed.items() if found and key not in COMPILED}
    if not (outside or keys) and options.get("disable_cfg1_optimization"):  # to have a negative prompt in every pass
        outside += inside.get("patches", {}).values()
    patches = [part for value in outside for part in (value if isinstance(value, list) else [value])]
    if names := sorted({*map(_node, patches), *keys, *model.injections}):
        raise ValueError(
            f"the MODEL comes through {', '.join(names)}, which acts on the sampling of a picture and not in the "
            "network, so that a student could not learn it: connect the MODEL from before that node"
        )


def _node(patch: Any) -> str:
    """The node that a patch comes from: mostly a function within a method of the node's class."""
    named = patch if hasattr(patch, "__qualname__") else type(patch)
    return named.__qualname__.split(".")[0]


def patches_hash(model) -> str:
    """16 hex digits of all that nodes have put on a MODEL beside its weights' patches; "" if there is nothing.

    The same nodes with the same values give the same in another session: code counts by its bytes, everything else by
    its values, nothing by its address.
    """
    options = model.model_options.get("transformer_options", {})
    if not (options or model.object_patches):
        return ""
    network = getattr(model.model, "diffusion_model", model.model)
    known = {id(part): part for part in (model, model.model, *network.modules())}
    for patch in model.object_patches.values():  # while the MODEL is loaded, it is in its place
        known = {address: part for address, part in known.items() if part is not patch}
    return values_hash([options, model.object_patches], known)


def values_hash(value: Any, known: dict[int, Any] | None = None) -> str:
    """16 hex digits of a value by what it holds, the same in another session; of objects in `known` nothing counts."""
    digest = hashlib.sha256()
    for part in _described(value, {} if known is None else known):
        digest.update(part)
    return digest.hexdigest()[:16]


def _described(value: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    """A value's parts as bytes; objects in `seen`, by their addresses, are left out, and become so."""
    if isinstance(value, VALUES):
        yield f"{type(value).__name__} {value!r};".encode()
    elif isinstance(value, type):
        yield ",".join(f"{kind.__module__}.{kind.__qualname__}" for kind in value.__mro__).encode()
    elif id(value) not in seen:
        seen[id(value)] = value  # kept, for another could lie where it was
        yield type(value).__qualname__.encode()
        if isinstance(value, Tensor):
            flat = value.detach().flatten()
            yield f"{value.dtype} {tuple(value.shape)}".encode()
            yield flat[:: len(flat) // MOST + 1].to("cpu", torch.float64).numpy().tobytes()
        for part in _parts(value):
            yield from _described(part, seen)


def _parts(value: Any) -> Sequence[Any]:
    """What decides how a function or another object acts."""
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, types.CodeType):
        constants = [c for c in value.co_consts if isinstance(c, (*VALUES, types.CodeType))]
        return [value.co_code, value.co_names, constants]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (Tensor, types.ModuleType, types.BuiltinFunctionType)):
        return [getattr(value, "__name__", None)]
    return [type(value), getattr(value, "__dict__", None)]


def kept_for_backward(options: dict[str, Any]) -> dict[str, Any]:
    """`transformer_options` whose patches may write into their tensors in place before backward, as FreeU's do."""
    patches = options.get("patches", {})
    return options | {"patches": {place: [_kept(patch) for patch in found] for place, found in patches.items()}}


def _kept(patch: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        own = (value.clone() if isinstance(value, Tensor) else value for value in args)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
            return patch(*own, **kwargs)

    return run
