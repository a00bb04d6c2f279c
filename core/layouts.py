"""How hosts' transformers hold picture and text: a row for each kind, known by the name of its class.

Networks that are not here are a UNet, or read by the names of their blocks alone (`denoiser.picture_part`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where the picture's tokens stand in what a block puts out.

    `part` is theirs of several tensors. In one that the text shares they come last, or `first`; behind them it is
    filled up to a multiple of what the network's attribute `multiple` says.
    """

    part: int = 0
    first: bool = False
    multiple: str = ""


@dataclass(frozen=True)
class Layout:
    """A kind of transformer.

    `blocks` are its lists of blocks, from the first. `patch` is the network's attribute for the side of a picture
    token. With `frame` its latents are a video's, of which a picture is one frame: (B, C, 1, H, W). `texts` are tensors
    of a text beside the context, (B, ..., T, D) with T tokens of their own. Its forward takes their number as `count`.
    What begins with one of `idle` is not run with a text and a picture alone, and gets no LoRA.
    """

    blocks: Mapping[str, Place]
    patch: str = "patch_size"
    frame: bool = False
    texts: tuple[str, ...] = ()
    count: str = ""
    idle: tuple[str, ...] = ()

    def picture(self, network: nn.Module, tap: str, output: Any, x: Tensor) -> Tensor:
        """What the module `tap` put out for latents x (B, C, H, W) -> the picture's tokens (B, N, C'), by rows."""
        place = self.blocks.get(tap.partition(".")[0], Place())
        tokens = output[place.part] if isinstance(output, (tuple, list)) else output
        if tokens.ndim == 5:  # (B, 1, H', W', C')
            tokens = tokens.flatten(1, 3)
        side: Any = getattr(network, self.patch)
        count = math.prod(math.ceil(size / side) for size in x.shape[-2:])
        if place.first or tokens.shape[1] == count:
            return tokens[:, :count]
        multiple: Any = getattr(network, place.multiple, None) if place.multiple else None
        begin = tokens.shape[1] - count - (-count) % (multiple or 1)
        return tokens[:, begin : begin + count]


FLUX = Layout({"double_blocks": Place(), "single_blocks": Place()})
LAYOUTS = {
    "Flux": FLUX,
    "Chroma": FLUX,
    "OpenAISignatureMMDITWrapper": Layout({"joint_blocks": Place(-1)}),  # Stable Diffusion 3 and 3.5
    "NextDiT": Layout(  # Lumina 2, and Z-Image, which fills up text and picture
        {"layers": Place(multiple="pad_tokens_multiple")},
        count="num_tokens",
        idle=("siglip_", "clip_text_", "time_text_"),
    ),
    "QwenImageTransformer2DModel": Layout({"transformer_blocks": Place(-1)}, frame=True),
    "HiDreamImageTransformer2DModel": Layout(
        {"double_stream_blocks": Place(), "single_stream_blocks": Place(first=True)},
        texts=("encoder_hidden_states_llama3",),
    ),
    "OmniGen2Transformer2DModel": Layout({"layers": Place()}, count="num_tokens", idle=("ref_image_",)),
    "SingleStreamDiT": Layout({"blocks": Place()}, patch="patch", frame=True),  # Krea 2
    # Its text adapter has run before a training begins.
    "Anima": Layout({"blocks": Place()}, patch="patch_spatial", frame=True, idle=("llm_adapter.",)),
}


def layout_of(network: nn.Module) -> Layout | None:
    """The row of a network; None for a kind that is not here."""
    return LAYOUTS.get(type(network).__name__)
