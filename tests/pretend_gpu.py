"""A GPU that is none: the tensors that lie on it are plain ones of the CPU, which a mark tells apart.

Within `pretend()`, what is put on "cuda" computes as ever, and so does autograd. But an operation that mixes devices is
refused as a real one would be, and what makes the CPU wait for the device, or keeps it busy for nothing, is counted:

- `waits`: numbers and masks that are read back, and copies between the devices that are not in the background;
- `doubles`: results in float64, which cards are slow in and Apple's have not;
- `full`: products of matrices, and convolutions, in float32;
- `operations`: everything that is sent to the device.

What no Python function made, such as the zeros that autograd begins with, lies on either device.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, amp
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Methods that read numbers back.
READING = (
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
    Tensor.__array__, Tensor.__contains__, Tensor.nonzero, torch.nonzero, torch.equal, Tensor.equal, torch.allclose,
    torch.masked_select, Tensor.masked_select, torch.unique, Tensor.unique, torch.bincount,
)  # fmt: skip
MAKING = {
    torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.linspace,
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.eye, torch.from_numpy, torch.multinomial,
}  # fmt: skip
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution")
GROUPING = (os.path.join("torch", "optim"), os.path.join("torch", "nn", "utils"))
resolved = lru_cache(os.path.realpath)
TESTS = resolved(os.path.dirname(__file__)) + os.sep
PACKAGE = resolved(os.path.dirname(os.path.dirname(__file__))) + os.sep
SCALING = os.path.join("torch", "amp", "grad_scaler")
# Operations of the device whose result's size is data.
OF_DATA = {"aten::nonzero", "aten::masked_select", "aten::_local_scalar_dense", "aten::_unique2", "aten::equal"}


class DeviceMix(RuntimeError):
    """Tensors of two devices in one operation."""


class Marks:
    """On which device storages lie that are known to lie on one."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def of(self, tensor: Tensor) -> torch.device | None:
        reference, device = self.known.get(tensor.untyped_storage()._cdata, (None, None))
        return device if reference and not reference.expired() else None

    def put(self, tensor: Tensor, device: torch.device) -> None:
        storage = tensor.untyped_storage()
        self.known[storage._cdata] = StorageWeakRef(storage), device


class Seen:
    """What the pretended device was asked."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.doubles: Counter[str] = Counter()
        self.full: Counter[str] = Counter()
        self.operations = 0

    def clear(self) -> None:
        self.__init__()


def files() -> Iterator[tuple[str, int]]:
    """The files and lines that called, the innermost first."""
    frame = sys._getframe(1)
    while frame:
        if frame.f_code.co_filename != __file__:
            yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def caller() -> str:
    """The file that called into torch."""
    return next(files())[0]


def scales() -> bool:
    """Whether float16's scaler is at work, which inverts its factor in float64."""
    return any(SCALING in file for file, _ in files())


def where() -> str:
    """The line of the package that called."""
    for file, line in ((resolved(file), line) for file, line in files()):
        if file.startswith(PACKAGE) and not file.startswith(TESTS):
            return f"{file[len(PACKAGE) :].replace(os.sep, '/')}:{line}"
    return "a test"


class Functions(TorchFunctionMode):
    """What Python calls: factories, moves, and the numbers that are read."""

    def __init__(self, marks: Marks, seen: Seen):
        super().__init__()
        self.marks, self.seen = marks, seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == Tensor.device.__get__:
            return CUDA if self.marks.of(args[0]) == CUDA else function(*args)
        if function == Tensor.is_cuda.__get__:
            return self.marks.of(args[0]) == CUDA
        if function is Tensor.is_pinned:
            return bool(getattr(args[0], "_pinned", False))
        if function is Tensor.pin_memory:
            pinned = args[0].clone()
            self.marks.put(pinned, CPU)
            pinned._pinned = True
            return pinned
        if function in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._moved(function, args, kwargs)
        if function in READING and self.marks.of(args[0]) == CUDA:
            self.seen.waits[f"{function.__name__} in {where()}"] += 1
        device = kwargs.pop("device", None)
        made_on = None if device is None else torch.device(device)
        draws = kwargs.get("generator")
        on = made_on or (CUDA if any(self.marks.of(t) == CUDA for t in tree_leaves(args) if _plain(t)) else CPU)
        if draws is not None and getattr(draws, "pretended", CPU).type != on.type:
            raise RuntimeError(f"Expected a {on.type!r} device type for generator but found another")
        if made_on is not None and function not in MAKING and made_on.type != "cuda":
            kwargs["device"] = device
        result = function(*args, **kwargs)
        if function in MAKING or made_on is not None:
            target = made_on or CPU
            given = args[0] if args and _plain(args[0]) else None
            from_host = function in (torch.tensor, torch.as_tensor) and (given is None or self.marks.of(given) != CUDA)
            if from_host and target.type == "cuda":
                self.seen.waits[f"{function.__name__} in {where()}"] += 1
            for leaf in tree_leaves(result):
                if _plain(leaf) and not (function is torch.as_tensor and self.marks.of(leaf)):
                    self.marks.put(leaf, CUDA if target.type == "cuda" else CPU)
        return result

    def _moved(self, function, args, kwargs) -> Tensor:
        tensor, *rest = args
        was = self.marks.of(tensor) or CPU
        kwargs.pop("copy", None)
        if function is Tensor.cuda:
            device, dtype, background, form = CUDA, None, False, None
        elif function is Tensor.cpu:
            device, dtype, background, form = CPU, None, False, None
        else:
            like = kwargs.get("other", rest[0] if rest else None)
            with torch._C.DisableTorchFunction():
                device, dtype, background, form = torch._C._nn._parse_to(*rest, **kwargs)
            if isinstance(like, Tensor):
                device = self.marks.of(like) or CPU
        wanted = was if device is None else CUDA if device.type == "cuda" else CPU
        options = {} if form is None else {"memory_format": form}
        result = tensor.to(dtype or tensor.dtype, **options)
        if wanted == was:
            return result
        # Torch's own loops over parameters group them by where they really lie, which is the CPU.
        ours = not any(place in caller() for place in GROUPING)
        if ours and not (background and (wanted == CPU or getattr(tensor, "_pinned", False))):
            self.seen.waits[f"copy to {wanted.type} in {where()}"] += 1
        moved = result.clone() if result.untyped_storage()._cdata == tensor.untyped_storage()._cdata else result
        self.marks.put(moved, wanted)
        if background and wanted == CPU:  # torch makes these in pinned memory
            moved._pinned = True
        return moved


class Operations(TorchDispatchMode):
    """What the device computes."""

    def __init__(self, marks: Marks, seen: Seen):
        super().__init__()
        self.marks, self.seen = marks, seen

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_flatten((args, kwargs))[0] if _plain(t)]
        places = [(t, self.marks.of(t)) for t in given]
        on_device = [t for t, place in places if place == CUDA]
        name = operation.name()
        if on_device:
            self.seen.operations += 1
            strangers = [t for t, place in places if place == CPU and t.ndim > 0]
            if strangers and name.startswith(("aten::index", "aten::_index_put")) and on_device[0] is given[0]:
                self.seen.waits[f"index from the CPU in {where()}"] += 1
            elif strangers and not name.startswith(("aten::copy_", "aten::_to_copy", "aten::detach")):
                shapes = [tuple(t.shape) for t in strangers]
                raise DeviceMix(f"{name} of tensors on cuda and, {shapes}, on the CPU, in {where()}")
            masks = name.startswith(("aten::index", "aten::_index_put")) and any(
                t.dtype in (torch.bool, torch.uint8) for t in given[1:]
            )
            if name.split(".")[0] in PRODUCTS and on_device[0].dtype == torch.float32:
                self.seen.full[f"{name} in {where()}"] += 1
            if name.split(".")[0] in OF_DATA or masks:
                self.seen.waits[f"{name} in {where()}"] += 1
        result = operation(*args, **kwargs)
        for leaf in tree_leaves(result):
            if _plain(leaf) and on_device:
                self.marks.put(leaf, CUDA)
                if leaf.dtype == torch.float64 and not scales():
                    self.seen.doubles[f"{name} in {where()}"] += 1
            elif _plain(leaf) and self.marks.of(leaf) is None and any(place == CPU for _, place in places):
                self.marks.put(leaf, CPU)
        return result


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided


class Generator(torch.Generator):
    """A CPU's generator that says that it is the device's."""

    def __new__(cls, device: Any = "cpu"):
        made = super().__new__(cls)
        made.pretended = torch.device(device)
        return made


@contextmanager
def pretend(capability: tuple[int, int] = (9, 0)) -> Iterator[Seen]:
    """Within, "cuda" is a device that is seen; autocast there is that of the CPU, in bfloat16 and float16 alike."""
    marks, seen = Marks(), Seen()
    autocast, scaler, own = amp.autocast, amp.GradScaler, torch.is_autocast_enabled

    def cast(device_type: str, *args: Any, **kwargs: Any):
        return autocast("cpu", *args, **kwargs)

    def scaled(device: str = "cuda", **kwargs: Any):
        return scaler("cpu", **kwargs)

    with ExitStack() as stack:
        for target, name, value in (
            (amp, "autocast", cast),
            (amp, "GradScaler", scaled),
            (torch, "Generator", Generator),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_device_capability", lambda *_: capability),
            (torch, "is_autocast_enabled", lambda *_: own("cpu")),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(Functions(marks, seen))
        stack.enter_context(Operations(marks, seen))
        yield seen
