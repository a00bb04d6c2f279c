"""Differentiable augmentation of what a discriminator sees: it is harder to learn by heart (arXiv 2006.10738)."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers that one picture's view is drawn by, each uniform in [0, 1): where it is cropped, and how it is augmented.
CROP, AUGMENT = 2, 7
NUMBERS = CROP + AUGMENT
SHIFT, CUT = 1 / 8, 1 / 2  # of the sides, the most that a picture is moved and the square that is left out
GREY = 0.5  # where there is no picture


def cropped(x: Tensor, side: int, view: Tensor | None = None) -> Tensor:
    """Parts (B, C, h, w) of x (B, C, H, W), `side` at most in both directions; 0 leaves it whole.

    `view` (B, NUMBERS), on the CPU, says where; None takes the middle.
    """
    height, width = x.shape[-2:]
    rows, columns = (min(side or length, length) for length in (height, width))
    if (rows, columns) == (height, width):
        return x
    places = torch.full((len(x), CROP), 0.5) if view is None else view[:, :CROP]
    room = torch.tensor([height - rows + 1, width - columns + 1])
    corners = (places * room).long().tolist()
    return torch.stack([each[:, i : i + rows, j : j + columns] for each, (i, j) in zip(x, corners, strict=True)])


def augmented(pictures: Tensor, view: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) about [0, 1] with other colours, moved, and with a square left out.

    `view` (B, NUMBERS) says how, on the pictures' device. The paper's three policies at its strengths.
    """
    brightness, saturation, contrast, *places = (n[:, None, None, None] for n in view[:, CROP:].unbind(1))
    x = pictures + (brightness - 0.5) / 2
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (contrast + 0.5)
    down, right, top, left = places
    return _cut(_moved(x, down, right), top, left)


def _moved(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Moved by whole pixels, up to SHIFT of the sides in each direction; `down` and `right` are (B, 1, 1, 1)."""
    height, width = x.shape[-2:]
    rows = _places(height, x.device) - _whole(2 * down - 1, SHIFT * height)
    columns = _places(width, x.device) - _whole(2 * right - 1, SHIFT * width)
    rows, columns = rows.reshape(-1, 1, height, 1), columns.reshape(-1, 1, 1, width)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    x = x.gather(2, rows.clamp(0, height - 1).expand_as(x)).gather(3, columns.clamp(0, width - 1).expand_as(x))
    return torch.where(inside, x, GREY)


def _cut(x: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """With a square of CUT of the sides left out, about a place anywhere in the picture."""
    height, width = x.shape[-2:]
    rows = (_places(height, x.device).reshape(1, 1, height, 1) - _whole(top, height)).abs() < CUT * height / 2
    columns = (_places(width, x.device).reshape(1, 1, 1, width) - _whole(left, width)).abs() < CUT * width / 2
    return torch.where(rows & columns, GREY, x)


def _places(length: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device)


def _whole(numbers: Tensor, length: float) -> Tensor:
    """Shares of a length as whole pixels."""
    return (numbers * length).round().long()
