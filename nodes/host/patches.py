"""What other nodes have put on a MODEL: what of it a training sees, and a hash of it."""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.denoiser import Guidance

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
    if names := sorted({*_nodes(outside), *keys, *model.injections}):
        raise ValueError(
            f"the MODEL comes through {', '.join(names)}, which acts on the sampling of a picture and not in the "
            "network, so that a student could not learn it: connect the MODEL from before that node"
        )


def check_guidance(model, guidance: Guidance) -> None:
    """Raise ValueError if a node wants the negative prompt in every pass, as NAG does, and the teacher's lack it."""
    whole = guidance.scale != 1 and (guidance.start, guidance.end) == (0, 1)
    if model.model_options.get("disable_cfg1_optimization") and not whole:
        names = _nodes(model.model_options.get("transformer_options", {}).get("patches", {}).values())
        raise ValueError(
            f"the MODEL comes through {', '.join(names)}, which compares with the negative prompt in every pass of the "
            f"teacher, and with guidance {guidance.scale:g} from {guidance.start:g} to {guidance.end:g} some have "
            "none: set guidance above 1, guidance_start to 0 and guidance_end to 1, or connect the MODEL from before "
            "that node"
        )


def _nodes(values: Iterable[Any]) -> list[str]:
    """The nodes that patches, or lists of them, come from: most are functions within a method of the node's class."""
    patches = [part for value in values for part in (value if isinstance(value, list) else [value])]
    named = [patch if hasattr(patch, "__qualname__") else type(patch) for patch in patches]
    return sorted({each.__qualname__.split(".")[0] for each in named})


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
    """16 hex digits of a value by what it holds, the same in another session; of objects in `known` nothing counts.

    Nor does what functions keep from one call to the next: ToMe's patches hold what the last pass merged.
    """
    digest, state = hashlib.sha256(), set[int]()
    for _ in _described(value, dict(known or {}), state):
        pass  # to find that state, wherever it is read
    for part in _described(value, dict(known or {}), state):
        digest.update(part)
    return digest.hexdigest()[:16]


def _described(value: Any, seen: dict[int, Any], state: set[int]) -> Iterator[bytes]:
    """A value's parts as bytes; objects in `seen`, by their addresses, are left out, and become so.

    `state` has the addresses of the variables (cells) that functions give new values, and gets those that are found.
    """
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
        for part in _parts(value, state):
            yield from _described(part, seen, state)


def _parts(value: Any, state: set[int]) -> Sequence[Any]:
    """What decides how a function or another object acts, without the variables in `state`, which gets its own."""
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
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        state.update(id(cells[name]) for name in _rebound(value.__code__))
        cells = [cell.cell_contents for cell in cells.values() if id(cell) not in state]
        return [value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (Tensor, types.ModuleType, types.BuiltinFunctionType)):
        return [getattr(value, "__name__", None)]
    return [type(value), getattr(value, "__dict__", None)]


def _rebound(code: types.CodeType) -> set[str]:
    """The outer variables to which a function, or one within it, gives new values."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_DEREF"}
    found = found.union(*(_rebound(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))
    return found.intersection(code.co_freevars)


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
