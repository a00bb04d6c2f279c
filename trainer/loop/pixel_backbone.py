"""The vision transformer that judges decoded pictures: the one that comes with the clone, or one of your own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors.torch import load_file
from torch import nn

from ...core.eight_bits import unpacked_state
from ...demo.files import PACKED, VISION

EMBEDDED = "embedded"


def load_vision(name: str) -> tuple[nn.Module, int]:
    """A vision transformer in float32, and the side of its patches in pixels.

    `name` is "embedded", a folder in transformers' layout, or a hub's name. Raises ValueError for one
    that cannot be had whole, that has no patches, or whose weights are a pickle.
    """
    try:
        from transformers import AutoModel

        with _without_progress():
            if name == EMBEDDED:
                network, info = _embedded()
            else:
                network, info = AutoModel.from_pretrained(name, output_loading_info=True, use_safetensors=True)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"pixel_backbone is {name!r}, which cannot be loaded: {error}") from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"pixel_backbone is {name!r}, whose file lacks {len(missing)} weights ({missing[0]}, ...): get it anew"
        )
    patch = getattr(network.config, "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(
            f"pixel_backbone is {name!r}, a {type(network).__name__} without patches: use a vision transformer"
        )
    return network.float(), patch


def _embedded() -> tuple[nn.Module, dict[str, Any]]:
    """The one that comes with the clone, and what transformers says of its weights."""
    from transformers import Dinov2Config, Dinov2Model

    state = unpacked_state(load_file(VISION / PACKED))
    config = Dinov2Config.from_pretrained(str(VISION))
    made: Any = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    return made


@contextmanager
def _without_progress() -> Iterator[None]:
    """Within, transformers draws no bar of its own: a front end has one."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
