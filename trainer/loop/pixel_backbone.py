"""The vision transformer that judges decoded pictures: the one that comes with the clone, or one of your own."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from ...core.eight_bits import unpacked_state
from ...core.vision import IMAGENET, Eye
from ...demo.files import PACKED, VISION

EMBEDDED = "embedded"


HALF = (0.5, 0.5, 0.5)


def load_vision(name: str) -> Eye:
    """The network `name`, in float32: "embedded", a folder in transformers' layout, or a hub's name.

    Raises ValueError for one that cannot be had whole, that has no patches, or whose weights are a pickle.
    """
    try:
        from transformers import AutoModel

        with _without_progress():
            if name == EMBEDDED:
                network, info = _embedded()
            else:
                network, info = AutoModel.from_pretrained(name, output_loading_info=True, use_safetensors=True)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"pixel_backbone is {name!r:.300}, which cannot be loaded: {_why(name, error)}") from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"pixel_backbone is {name!r}, whose file lacks {len(missing)} weights ({missing[0]}, ...): get it anew"
        )
    network: Any = getattr(network, "vision_model", network)  # CLIP's and SigLIP's have one of texts beside it
    patch = getattr(network.config, "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(
            f"pixel_backbone is {name!r}, a {type(network).__name__} without patches: use a vision transformer"
        )
    mean, std = IMAGENET if name == EMBEDDED else _colours(name, network)
    if "interpolate_pos_encoding" in inspect.signature(network.forward).parameters:
        # Its places are those of one size of pictures, at which it sees best.
        return Eye(_AnySize(network.float()), patch, mean, std, network.config.image_size)
    return Eye(network.float(), patch, mean, std)


def _why(name: str, error: Exception) -> str:
    """What is wrong with a network's name, and what would do."""
    place = Path(name)
    if place.is_file():
        words = "it is a file"
    elif place.is_dir() and not (place / "config.json").exists():
        words = "the folder has no config.json"
    else:
        words = str(error).strip().partition("\n")[0].rstrip(".:")
    return f"{words}. Give {EMBEDDED!r}, a vision transformer's folder as transformers saves it, or its name on the hub"


class _AnySize(nn.Module):
    """A network of pictures of one size, that takes others."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.config = network, network.config

    def forward(self, pictures: Tensor) -> Any:
        return self.network(pictures, interpolate_pos_encoding=True)


def _colours(name: str, network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and spread of colours as the network's own settings have them; ImageNet's where they have none."""
    from transformers.utils import cached_file

    usual = (HALF, HALF) if "siglip" in type(network).__name__.lower() else IMAGENET
    try:
        path = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        said = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        found = [tuple(float(x) for x in said[f"image_{what}"]) for what in ("mean", "std")]
    except (OSError, ValueError, KeyError, TypeError):
        return usual
    return (found[0], found[1]) if all(len(each) == 3 for each in found) and min(found[1]) > 0 else usual


def _embedded() -> tuple[nn.Module, dict[str, Any]]:
    """The one that comes with the clone, and what transformers says of its weights."""
    state = unpacked_state(load_file(VISION / PACKED))
    try:
        from transformers import Dinov2Config, Dinov2Model
    except ImportError:  # AUTOMATIC1111's transformers is older
        return _embedded_as_vit(state)
    config = Dinov2Config.from_pretrained(str(VISION))
    made: Any = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    return made


# DINOv2's names of a block's parts -> those of transformers' older ViT, which computes the same without layer scales.
VIT = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
SCALED = {"layer_scale1.lambda1": "attention.output.dense", "layer_scale2.lambda1": "mlp.fc2"}  # what each scale is of


def _embedded_as_vit(state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Any]]:
    """The same network as a ViT: a layer scale goes into the weights before it."""
    from transformers import ViTConfig, ViTModel

    about = json.loads((VISION / "config.json").read_text(encoding="utf-8"))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps", "image_size", "patch_size")
    config = ViTConfig(**{n: about[n] for n in names}, intermediate_size=about["mlp_ratio"] * about["hidden_size"])
    made = dict(state)
    made.pop("embeddings.mask_token", None)
    for name in [n for n in state if "layer_scale" in n]:
        block, _, scale = name.partition(".layer_scale")
        lambdas, layer = made.pop(name), f"{block}.{SCALED['layer_scale' + scale]}"
        made[f"{layer}.weight"] = made[f"{layer}.weight"] * lambdas[:, None]
        made[f"{layer}.bias"] = made[f"{layer}.bias"] * lambdas
    for old, new in VIT.items():
        made = {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in made.items()}
    network: Any = ViTModel(config, add_pooling_layer=False)
    missing, _ = network.load_state_dict(made, strict=False)
    return network, {"missing_keys": missing}


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
