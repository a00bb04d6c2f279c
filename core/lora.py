"""Low-rank adaptation (arXiv 2106.09685) of a module that stays as it is.

The low-rank branch rides on forward hooks, so that the weights, the host's own layer classes and
the switched-off output stay the same to the bit, and quantised layers can carry one too.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layouts import layout_of
from .naming import is_diffusers, of_an_adapter, suggestion, to_diffusers, to_single_file, without_adapter

# What is adapted, as patterns on module names; hosts' and diffusers' layouts, UNets and DiTs.
TARGETS = {
    "attention": r"attn\d?\.(to_[qkv](_t)?|to_out(\.0|_t)?|qkv|proj|([qkv]|output)_proj|w[qkvo])$|"
    r"attentions?\.(.*\.)?(to_[qkv]|to_out\.0|qkv|out)$",
    "transformer": r"transformer_blocks|attn|attention|mlp|feed_forward|proj_(in|out)$|"
    r"(single|double|joint)_?(stream_)?blocks",
    "all": r"",
}
SEPARATOR = re.compile(r",(?![^{]*})")  # {1,2} is a pattern's
NOT = "not "
# The prefix of layers in a LoRA file of each style. `kohya` and `comfy` have a UNet's single-file names; `diffusers` is
# kohya's with a UNet's diffusers names, as kohya itself writes Stable Diffusion 1 and 2; `peft` is for a transformer of
# diffusers, and diffusers and ComfyUI load it; `peft-unet` is what diffusers itself saves of a UNet.
FORMATS = {"kohya": "lora_unet_", "diffusers": "lora_unet_", "comfy": "diffusion_model.", "peft": "transformer."}
FORMATS |= {"peft-unet": "unet."}
PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
PEFT_PARTS = ("lora_A.weight", "lora_B.weight")  # without alpha: it is multiplied into B


def adaptable(module: nn.Module) -> bool:
    """Linear and 2-D convolution layers of any host's class, told by their weight and by room for a bias."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not hasattr(module, "bias") or next(module.children(), None) is not None:
        return False
    return weight.ndim == 2 or (weight.ndim == 4 and getattr(module, "groups", 1) == 1)


def quantised(weight: Tensor) -> bool:
    """Whether a weight's numbers are packed, in a host's own class or as whole ones: a branch can stand beside it."""
    return type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point()


def matching_layers(backbone: nn.Module, targets: str) -> dict[str, nn.Module]:
    """The layers by name that `targets` pick; raises ValueError for a part of them that picks none, or if none is left.

    They are keys of TARGETS, or patterns, separated by commas; those behind a "not" are left out. A pattern that fits
    no name is tried on a UNet's names of the other layout. Of a layer that carries a LoRA of peft's, which is the
    teacher's, it is the layer itself, by its own name.
    """
    idle = layout.idle if (layout := layout_of(backbone)) else ()
    layers = {without_adapter(n): m for n, m in backbone.named_modules() if adaptable(m) and not of_an_adapter(n)}
    layers = {n: m for n, m in layers.items() if not n.startswith(idle)}
    parts = [part.strip() for part in SEPARATOR.split(targets) if part.strip()]
    left_out = [part.removeprefix(NOT).strip() for part in parts if part.startswith(NOT)]
    picked = [part for part in parts if not part.startswith(NOT)] or ["all"]
    names = {name for part in picked for name in _matching(part, list(layers), backbone)}
    names -= {name for part in left_out for name in _matching(part, list(layers), backbone)}
    if not names:
        raise ValueError(f"LoRA targets {targets!r} leave no layer: leave out fewer")
    return {n: m for n, m in layers.items() if n in names}


def _matching(target: str, layers: Sequence[str], backbone: nn.Module) -> list[str]:
    """The names that one target picks; raises ValueError if there are none."""
    remedy = f"use {', '.join(TARGETS)}, the name of a block, or a regular expression that fits names of layers"
    # A block's number ends there: 1 is not 10.
    own = TARGETS.get(target, target + r"(?!\d)" if target[-1:].isdigit() else target)
    try:
        pattern = re.compile(own)
    except re.error as error:
        raise ValueError(f"LoRA targets {target!r} are no regular expression ({error}): {remedy}") from None
    if found := [name for name in layers if pattern.search(name)]:
        return found
    others = _other_names(backbone)
    if found := [name for name in layers if pattern.search(others.get(name, ""))]:
        return found
    names = [*layers, *others.values()]
    known = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    raise ValueError(
        f"LoRA targets {target!r} match no layer: {remedy}{suggestion(target, [*TARGETS, *sorted(known)])}"
    )


def _other_names(backbone: nn.Module) -> dict[str, str]:
    """A UNet's modules by their names -> those of the other layout, diffusers' or the single files'."""
    parameters = [without_adapter(n) for n, _ in backbone.named_parameters() if not of_an_adapter(n)]
    try:
        table = to_single_file(parameters) if is_diffusers(parameters) else to_diffusers(parameters)
    except ValueError:  # no UNet of Stable Diffusion
        return {}
    return {name.rpartition(".")[0]: other.rpartition(".")[0] for name, other in table.items()}


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device."""
    try:
        return torch.is_autocast_enabled(device.type)
    except TypeError:  # torch before 2.4 has a function for each kind
        return torch.is_autocast_cpu_enabled() if device.type == "cpu" else torch.is_autocast_enabled()


class Branch(nn.Module):
    """up(down(x)) alpha / rank beside one layer; down is (r, in, ...), up (out, r, ...)."""

    def __init__(self, layer: nn.Module, rank: int, alpha: float, seed: int, device: torch.device | None = None):
        super().__init__()
        weight = cast(Tensor, layer.weight)
        rank = min(rank, weight.shape[0], math.prod(weight.shape[1:]))
        self.scale = alpha / rank
        spatial = weight.shape[2:]
        device = weight.device if device is None else device
        down = torch.empty(rank, *weight.shape[1:], dtype=torch.float32)
        bound = math.prod(weight.shape[1:]) ** -0.5  # Kaiming's for a linear layer, as torch begins one
        down.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, *(1 for _ in spatial), device=device))
        self.options = {k: getattr(layer, k) for k in ("stride", "padding", "dilation")} if spatial else None

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down, self.up
        if not autocasts(x.device):
            down, up = down.to(x.dtype), up.to(x.dtype)
        if self.options is None:
            return F.linear(F.linear(x, down), up) * self.scale
        return F.conv2d(F.conv2d(x, down, **self.options), up) * self.scale

    def delta(self) -> Tensor:
        """The change of the weight that equals this branch, in the weight's shape, float32."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return (product * self.scale).reshape(self.up.shape[0], *self.down.shape[1:])


class LoRA(nn.Module):
    """Branches on the chosen layers of a backbone; `enabled` switches all of them.

    `targets` are keys of TARGETS or regular expressions on module names, as `matching_layers` takes them. The branches
    lie on `device`, where the backbone computes: with little memory its weights lie elsewhere. Call `remove` to take
    the hooks out of the backbone again.
    """

    def __init__(
        self,
        backbone: nn.Module,
        rank: int = 16,
        alpha: float | None = None,
        targets: str = "all",
        device: torch.device | None = None,
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA rank is {rank}: give at least 1")
        self.rank, self.alpha, self.targets = rank, float(alpha if alpha is not None else rank), targets
        self.enabled = False
        self._folded = False
        layers = matching_layers(backbone, targets)
        self.names = list(layers)
        # A layer's beginning is told by its name in a file, so that it is the same in every host's layout.
        drawn = int(torch.randint(2**31, (1,)))
        seeds = [drawn + zlib.crc32(name.encode()) for name in self.file_names(backbone)]
        self.branches = nn.ModuleList(
            Branch(m, rank, self.alpha, seed, device) for m, seed in zip(layers.values(), seeds, strict=True)
        )
        self._hooks = [
            m.register_forward_hook(self._hook(b)) for m, b in zip(layers.values(), self.each(), strict=True)
        ]

    def _hook(self, branch: Branch):
        def add(_module, args, output):
            return output + branch(args[0]) if self.enabled and not self._folded else None

        return add

    def __getstate__(self) -> dict:
        # A copy holds the parameters alone: its hooks would sit in no backbone.
        return self.__dict__ | {"_hooks": []}

    def each(self) -> list[Branch]:
        """The branches, in the order of `names`."""
        return [cast(Branch, b) for b in self.branches]

    def remove(self) -> None:
        """Take every hook out of the backbone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def file_names(self, backbone: nn.Module, style: str = "kohya") -> list[str]:
        """The key prefix of each branch in a LoRA file of a style in FORMATS."""
        names, parameters = self.names, [without_adapter(n) for n, _ in backbone.named_parameters()]
        theirs = style in ("diffusers", "peft", "peft-unet")
        if is_diffusers(parameters):
            table = {} if theirs else to_single_file(parameters)
        else:
            table = to_diffusers(parameters) if theirs else {}
        modules = {k.rpartition(".")[0]: v.rpartition(".")[0] for k, v in table.items()}
        names = [modules.get(n, n) for n in names]
        underscored = FORMATS[style] == FORMATS["kohya"]
        return [FORMATS[style] + (n.replace(".", "_") if underscored else n) for n in names]

    def export(
        self, backbone: nn.Module, style: str = "kohya", dtype: torch.dtype = torch.float16
    ) -> dict[str, Tensor]:
        """Tensors of a LoRA file: `<name>.lora_down.weight`, `.lora_up.weight`, `.alpha`, or as peft names them."""
        tensors = {}
        for name, branch in zip(self.file_names(backbone, style), self.each(), strict=True):
            down, up = branch.down.detach(), branch.up.detach()
            if parts_of(style) == PEFT_PARTS:
                values = (down, up * branch.scale)
            else:
                values = (down, up, torch.tensor(branch.scale * down.shape[0]))
            for part, value in zip(parts_of(style), values, strict=True):
                tensors[f"{name}.{part}"] = value.to(dtype).cpu().contiguous()
        return tensors

    @torch.no_grad()
    def load(self, backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Fill the branches from a LoRA file's tensors, of any style in FORMATS.

        Raises ValueError if a key of the file, or a branch, has no counterpart.
        """
        shapes = {k: v.shape for k, v in tensors.items()}
        a, b, *alpha = parts_of(self._style(backbone, shapes))
        for name, branch in self.check(backbone, shapes).items():
            down, up = tensors[f"{name}.{a}"], tensors[f"{name}.{b}"]
            branch.down = nn.Parameter(down.to(branch.down))
            branch.up = nn.Parameter(up.to(branch.up))
            branch.scale = float(tensors[f"{name}.{alpha[0]}"]) / down.shape[0] if alpha else 1.0

    def _style(self, backbone: nn.Module, names: Iterable[str]) -> str:
        """The style whose names most of a file's are."""
        names = set(names)

        def found(style: str) -> int:
            if not any(n.startswith(FORMATS[style]) for n in names):
                return 0
            first = parts_of(style)[0]
            return sum(f"{name}.{first}" in names for name in self.file_names(backbone, style))

        return max(FORMATS, key=found)  # the first, where none fits

    def check(self, backbone: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, Branch]:
        """The branches by their names in a file with tensors of these shapes; raises as `load`."""
        style = self._style(backbone, shapes)
        parts = parts_of(style)
        wanted = dict(zip(self.file_names(backbone, style), self.each(), strict=True))
        check_match("LoRA", shapes, [f"{name}.{part}" for name in wanted for part in parts])
        for name, branch in wanted.items():
            down, up = shapes[f"{name}.{parts[0]}"], shapes[f"{name}.{parts[1]}"]
            found, own = (up[0], *down[1:]), (branch.up.shape[0], *branch.down.shape[1:])
            if found != own:
                raise ValueError(
                    f"{name} in the file is for a layer of shape {found}, this model's is {own}: it was made for "
                    "another base"
                )
        return wanted

    def merged(self, backbone: nn.Module) -> dict[str, Tensor]:
        """The adapted weights by the backbone's parameter names: weight + delta, in the weight's dtype."""
        weights = dict(backbone.named_parameters())
        merged = {}
        for name, branch in zip(self.names, self.each(), strict=True):
            key = f"{name}.weight" if f"{name}.weight" in weights else f"{name}.base_layer.weight"
            weight = weights[key]
            delta = branch.delta().detach().to(weight.device)
            merged[key] = (weight.detach().float() + delta).to(weight.dtype)
        return merged

    @contextmanager
    def folded(self, backbone: nn.Module) -> Iterator[None]:
        """The backbone's weights are the merged ones within, so that a pass costs no more than the base's.

        The very same tensors are put back at the end. Within, the backbone is the student whether
        `enabled` or not.
        """
        weights = dict(backbone.named_parameters())
        merged = self.merged(backbone)
        kept = {name: weights[name].data for name in merged}
        try:
            for name, value in merged.items():
                weights[name].data = value
            self._folded = True
            yield
        finally:
            self._folded = False
            for name, value in kept.items():
                weights[name].data = value


def parts_of(style: str) -> tuple[str, ...]:
    """How the tensors of one layer end in a file of a style: down, up and, but for peft's, alpha."""
    return PEFT_PARTS if style.startswith("peft") else PARTS


def check_match(what: str, given: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise ValueError unless both sets of names are the same; the message counts and shows them."""
    given, wanted = set(given), set(wanted)
    matched = given & wanted
    if given != wanted:
        stray, missing = sorted(given - wanted), sorted(wanted - given)
        raise ValueError(
            f"{what}: {len(matched)} of {len(wanted)} names match; "
            f"{len(stray)} in the file are unknown here {stray[:2]}, {len(missing)} are missing {missing[:2]}. "
            "It was made for another architecture: check the base model."
        )
