"""Pictures as a page shows them without a file of their own."""

from __future__ import annotations

import base64
import io

from PIL import Image
from torch import Tensor

from ..trainer.data.images import to_image

SMALL = 128  # pixels; smaller pictures are kept without loss
MOST = 384  # pixels; larger ones are shown as large as this


def data_urls(pictures: Tensor) -> list[str]:
    """Pictures (N, 3, H, W) in [0, 1] -> a data URL each."""
    return [data_url(picture) for picture in pictures]


def data_url(picture: Tensor) -> str:
    """A picture (3, H, W) in [0, 1] as a data URL: a PNG if it is small, else a JPEG of moderate size."""
    image = to_image(picture)
    small = max(image.size) <= SMALL
    if not small:
        image.thumbnail((MOST, MOST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "png" if small else "jpeg", quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
