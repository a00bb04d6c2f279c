"""Frozen features of noisy latents for the discriminator, from the teacher's own blocks (LADD, arXiv 2403.12015)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .denoiser import Cond, Denoiser, by_length
from .layouts import layout_of
from .naming import suggestion

# Residual blocks of a UNet's encoder and middle, in diffusers' layout and in the hosts'.
DIFFUSERS_BLOCK = re.compile(r"^(down_blocks\.\d+|mid_block)\.resnets\.\d+$")
HOSTS_BLOCK = re.compile(r"^(input_blocks|middle_block)\.\d*[1-9]\d*(?:\.0)?$")
TRANSFORMER_TAPS = re.compile(r"^(?:joint_blocks|double_blocks|transformer_blocks|blocks|layers)\.\d+$")
COUNT = 5


class _Collected(Exception):
    """Raised inside a network's forward when the last tap has fired: the rest is not needed."""


def default_taps(backbone: nn.Module) -> list[str]:
    """Names of the modules to tap: a UNet's last residual block at every size, a transformer's blocks evenly.

    At most five; a UNet's are the same in every layout. Raises ValueError for an architecture that is
    not known; name the taps in the settings then.
    """
    names = _unet_taps(backbone) or _transformer_taps(backbone)
    if not names:
        raise ValueError(
            f"no known blocks in {type(backbone).__name__}: name the modules to tap with the setting 'taps'"
        )
    if len(names) <= COUNT:
        return names
    return [names[round((i + 1) * len(names) / COUNT) - 1] for i in range(COUNT)]


def _transformer_taps(backbone: nn.Module) -> list[str]:
    """A transformer's blocks: of several kinds those of the first, unless they are a quarter of all or less."""
    if (layout := layout_of(backbone)) is None:
        return [n for n, _ in backbone.named_modules() if TRANSFORMER_TAPS.match(n)]
    kinds: list[Any] = [getattr(backbone, kind) for kind in layout.blocks]
    names = [f"{kind}.{i}" for kind, found in zip(layout.blocks, kinds, strict=True) for i in range(len(found))]
    return names[: len(kinds[0])] if 4 * len(kinds[0]) > len(names) else names


def _unet_taps(backbone: nn.Module) -> list[str]:
    """The last residual block at every size on the way down, and in the middle; none for other architectures."""
    last: dict[str, str] = {}
    level = 0
    for name, module in backbone.named_modules():
        if match := DIFFUSERS_BLOCK.match(name):
            last[match[1]] = name
        elif match := HOSTS_BLOCK.match(name):
            if hasattr(module, "op"):  # a downsampling: what follows is smaller
                level += 1
            elif name.endswith(".0") or match[1] == "middle_block":
                last[f"{match[1]} {level}"] = name
    return list(last.values())


def tapped(network: nn.Module, taps: Sequence[str]) -> dict[str, nn.Module]:
    """The modules to tap by name; raises ValueError for a name that is none of the network's."""
    modules = dict(network.named_modules())
    if unknown := [t for t in taps if t not in modules]:
        parts = ", ".join(name for name, _ in network.named_children())
        raise ValueError(
            f"taps {unknown} are no modules of {type(network).__name__}: leave taps empty, or name modules of it "
            f"({parts}, and what is in them){suggestion(unknown[0], list(modules))}"
        )
    return {t: modules[t] for t in taps}


def outputs(
    modules: dict[str, nn.Module], take: Callable[[str, Any], Tensor], forward: Callable[[], Any]
) -> list[Tensor]:
    """What `take(name, output)` makes of the outputs of K modules, in their order, while `forward()` runs.

    The pass ends at the last of them. Raises ValueError for a module that it never comes by.
    """
    found: dict[str, Tensor] = {}

    def collect(name: str):
        def hook(_module, _args, output):
            found[name] = take(name, output)
            if len(found) == len(modules):
                raise _Collected

        return hook

    hooks = [m.register_forward_hook(collect(name)) for name, m in modules.items()]
    try:
        forward()
    except _Collected:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if silent := [name for name in modules if name not in found]:
        raise ValueError(f"taps {silent} never fire in this network's forward: leave taps empty, or choose others")
    return [found[name] for name in modules]


class TeacherFeatures:
    """Features (B, C_k, H_k, W_k) of the frozen teacher at K tapped modules.

    Token features (B, H W, C) are laid out as pictures; the text's tokens, where they go through the
    same block, are left out.
    """

    name = "latents"
    conditional = True  # it is told the noise level, at which it looks, and the text
    varies = False
    networks: Sequence[nn.Module] = ()  # besides the teacher's

    def __init__(self, teacher: Denoiser, taps: Sequence[str] | None = None):
        """Raises ValueError for taps that the teacher's backbone lacks, or where none are known."""
        self.teacher = teacher
        self.taps = list(taps or default_taps(teacher.backbone))
        self.modules = tapped(teacher.backbone, self.taps)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond, view: Tensor | None = None) -> list[Tensor]:
        """Latents x (B, C, H, W), already noised to sigma (B,) -> K feature maps, float32.

        Raises ValueError if a tap never fires.
        """
        return by_length(self._maps, x, sigma, cond)  # here, since a pass ends at its last tap

    def _maps(self, x: Tensor, sigma: Tensor, cond: Cond) -> list[Tensor]:
        def take(tap: str, output: Any) -> Tensor:
            return self.teacher.picture_part(tap, output, x, cond).clone()  # the next block may add to it in place

        maps = outputs(self.modules, take, lambda: self.teacher(x, sigma, cond))
        return [as_picture(m, x).float() for m in maps]


def as_picture(features: Tensor, x: Tensor) -> Tensor:
    """(B, N, C) tokens -> (B, C, H', W') in the aspect of x (B, _, H, W); pictures pass."""
    if features.ndim == 4:
        return features
    batch, tokens, channels = features.shape
    height, width = x.shape[-2:]
    for patch in range(1, min(height, width) + 1):
        rows, columns = math.ceil(height / patch), math.ceil(width / patch)
        if rows * columns == tokens:
            return features.transpose(1, 2).reshape(batch, channels, rows, columns)
    raise ValueError(f"{tokens} tokens do not tile a picture of {height} x {width}")
