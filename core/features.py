"""Frozen features for the discriminator: taps on the teacher's own blocks (LADD, arXiv 2403.12015)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor, nn

from .denoiser import Cond, Denoiser

# Residual blocks of a UNet's encoder and middle, in diffusers' layout and in the hosts'.
DIFFUSERS_BLOCK = re.compile(r"^(down_blocks\.\d+|mid_block)\.resnets\.\d+$")
HOSTS_BLOCK = re.compile(r"^(input_blocks|middle_block)\.\d*[1-9]\d*(?:\.0)?$")
TRANSFORMER_TAPS = re.compile(r"^(?:joint_blocks|double_blocks|transformer_blocks|blocks|layers)\.\d+$")
COUNT = 5
# Blocks of text and picture: where the picture stands in what they put out (first, where none is named),
# and those whose tokens may come as one sequence, the text's before the picture's.
PICTURE_AT = {"joint_blocks": -1, "transformer_blocks": -1, "single_transformer_blocks": -1}
ONE_SEQUENCE = ("single_blocks", "single_transformer_blocks")


class _Collected(Exception):
    """Raised inside the backbone's forward when the last tap has fired: the rest is not needed."""


def default_taps(backbone: nn.Module) -> list[str]:
    """Names of the modules to tap: a UNet's last residual block at every size, a transformer's blocks evenly.

    At most five; a UNet's are the same in every layout. Raises ValueError for an architecture that is
    not known; name the taps in the settings then.
    """
    names = _unet_taps(backbone) or [n for n, _ in backbone.named_modules() if TRANSFORMER_TAPS.match(n)]
    if not names:
        raise ValueError(
            f"no known blocks in {type(backbone).__name__}: name the modules to tap with the setting 'taps'"
        )
    if len(names) <= COUNT:
        return names
    return [names[round((i + 1) * len(names) / COUNT) - 1] for i in range(COUNT)]


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


class TeacherFeatures:
    """Features (B, C_k, H_k, W_k) of the frozen teacher at K tapped modules, with gradients to the input.

    The forward pass ends at the last tap. Token features (B, H W, C) are laid out as pictures; the
    text's tokens, where they go through the same block, are left out.
    """

    def __init__(self, teacher: Denoiser, taps: Sequence[str] | None = None):
        self.teacher = teacher
        self.taps = list(taps or default_taps(teacher.backbone))
        modules = dict(teacher.backbone.named_modules())
        unknown = [t for t in self.taps if t not in modules]
        if unknown:
            raise ValueError(f"taps {unknown} are no modules of {type(teacher.backbone).__name__}")
        self.modules = [modules[t] for t in self.taps]

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> list[Tensor]:
        """x (B, C, H, W), already noised to sigma (B,) -> K feature maps, float32.

        Raises RuntimeError if a tap never fires.
        """
        found: dict[int, Tensor] = {}

        def collect(index: int):
            def hook(_module, _args, output):
                part = picture_part(self.taps[index], output, cond.context.shape[1])
                found[index] = part.clone()  # the next block may add to it in place
                if len(found) == len(self.modules):
                    raise _Collected

            return hook

        hooks = [m.register_forward_hook(collect(i)) for i, m in enumerate(self.modules)]
        try:
            self.teacher(x, sigma, cond)
        except _Collected:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        silent = [t for i, t in enumerate(self.taps) if i not in found]
        if silent:
            raise RuntimeError(f"taps {silent} never fire in this backbone's forward: choose others")
        return [as_picture(found[i], x).float() for i in range(len(self.modules))]


def picture_part(tap: str, output: Tensor | tuple, text: int) -> Tensor:
    """What a tapped module put out -> its part of the picture, without the `text` tokens that went through beside."""
    kind = tap.split(".")[-2] if "." in tap else ""
    if isinstance(output, tuple):
        return output[PICTURE_AT.get(kind, 0)]
    return output[:, text:] if kind in ONE_SEQUENCE else output


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
