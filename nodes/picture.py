"""Pictures with words on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..trainer.data.images import to_image

LEAST = 256  # pixels to which small pictures are enlarged


def side_by_side(columns: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Columns of (title, pictures (B, H, W, 3) in [0, 1]) -> rows (B, H', W', 3) with the titles above."""
    height, width = columns[0][1].shape[1:3]
    scale = max(1, -(-LEAST // min(height, width)))
    font = ImageFont.load_default(14)
    gap, band = 8, 26
    rows = []
    for k in range(len(columns[0][1])):
        sheet = Image.new("RGB", (len(columns) * (width * scale + gap) - gap, height * scale + band), "white")
        pen = ImageDraw.Draw(sheet)
        for i, (title, pictures) in enumerate(columns):
            picture = to_image(pictures[k].movedim(-1, 0))
            picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            left = i * (width * scale + gap)
            sheet.paste(picture, (left, band))
            pen.text((left + 2, 5), title, "black", font)
        rows.append(torch.from_numpy(np.asarray(sheet).copy()).float() / 255)
    return torch.stack(rows)
