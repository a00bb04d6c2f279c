"""LoRA files that others made: in anybody's names, with a rank of its own in each layer, and for some layers only.

Read are plain low-rank pairs of linear and convolution layers (arXiv 2106.09685), as kohya, diffusers and peft write
them. Whatever changes weights in another way is refused by its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from .architecture import architecture_of_file
from .card import KEY, CardError
from .exclusive import exclusive
from .header import read_header
from .lora import matching_layers, quantised
from .low_rank import Change
from .naming import is_diffusers, of_an_adapter, to_diffusers, to_single_file, without_adapter

# How the two halves of a pair and its alpha end, each behind the name of its layer.
DOWN = re.compile(r"(\.lora_(down|A)(\.[\w-]+)?|(\.lora(_linear_layer)?|_lora)\.down)\.weight$")
UP = re.compile(r"(\.lora_(up|B)(\.[\w-]+)?|(\.lora(_linear_layer)?|_lora)\.up)\.weight$")
ALPHA = re.compile(r"(\.lora|_lora)?\.(network_)?alpha$")
# What else a file may hold in place of plain pairs, or beside them -> what that is called.
OTHERS = {
    r"dora_scale|lora_magnitude_vector": "DoRA (weights of a magnitude of their own)",
    r"\.hada_": "LoHa (products of Hadamard)",
    r"\.lokr_": "LoKr (products of Kronecker)",
    r"\.(oft|boft)_|oft_(blocks|diag|R)": "OFT (rotations)",
    r"\.on_input$": "(IA)^3 (factors)",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.lora_mid\.": "LoCon in Tucker's form (lora_mid)",
    r"\.diff(_b)?$|\.set_weight$|\.[wb]_norm$": "patches of whole weights (diff)",
    r"\.lora_(up|B)(\.[\w-]+)?\.bias$": "pairs with a bias",
}
TEXT = re.compile(r"(base_model\.model\.)?(lora_te\d?_|text_encoders?(_\d)?\.|te\d?\.)")
PREFIXES = (
    "lora_unet_",
    "lora_transformer_",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "unet.",
    "transformer.",
)
FORMATS = {"^lora_": "kohya", r"diffusion_model\.": "ComfyUI", r"\.lora_[AB]\.": "peft"}  # else diffusers' own
CONFIG = "lora_adapter_metadata"  # peft's settings in a file of diffusers


class LoRAError(CardError):
    """A LoRA that cannot be used here: the message says why and what to do."""


@dataclass
class Pair:
    """Where a layer's two halves and its alpha stand in a file."""

    down: str = ""
    up: str = ""
    alpha: str = ""


@dataclass(frozen=True)
class Changes:
    """What a file changes in a model: by the model's layers, and the file's layers that are none of the model's."""

    layers: dict[str, Change]
    unknown: list[str] = field(default_factory=list)

    @contextmanager
    def merged(self, backbone: nn.Module, strength: float = 1.0) -> Iterator[None]:
        """Within, the backbone's weights are the changed ones; the very same tensors are put back at the end."""
        weights = dict(backbone.named_parameters())
        kept: dict[str, Tensor] = {}
        with exclusive(backbone):
            try:
                for name, change in self.layers.items():
                    key = weight_of(name, weights)
                    kept[key] = weight = weights[key].data
                    delta = strength * change.delta().to(weight.device)
                    weights[key].data = (weight.float() + delta).to(weight.dtype)
                yield
            finally:
                for key, value in kept.items():
                    weights[key].data = value


def weight_of(layer: str, weights: Mapping[str, Any]) -> str:
    """The name of a layer's weight among a backbone's parameters, with peft's LoRA around it or not."""
    return f"{layer}.weight" if f"{layer}.weight" in weights else f"{layer}.base_layer.weight"


class ForeignLoRA:
    """A LoRA file by its header; `pairs` by the names of layers as the file has them, without those of text encoders.

    Raises LoRAError for a file that is none, that changes weights in another way, or that is a student of ours, whose
    card says how it is sampled, unless `of_ours`.
    """

    def __init__(self, path: str | Path, of_ours: bool = False):
        self.path = Path(path)
        header = read_header(path, CardError)
        self.metadata, self.shapes = header.metadata, header.shapes
        if not is_lora(self.shapes):
            raise LoRAError(
                f"{path} is no LoRA, none of its {len(self.shapes)} weights is half of a pair: check the name"
            )
        if KEY in self.metadata and not of_ours:
            raise LoRAError(f"{path} is a student of ours: give it as the student")
        for pattern, what in OTHERS.items():
            if found := [n for n in self.shapes if re.search(pattern, n)]:
                raise LoRAError(
                    f"{path} holds {what}, such as {found[0]:.100}: plain LoRAs are read (lora_down and lora_up). "
                    "Merge this one into the model elsewhere, or get another file"
                )
        self.pairs, self.texts, self.strange = self._sorted()
        found = (word for pattern, word in FORMATS.items() if any(re.search(pattern, n) for n in self.shapes))
        self.format = next(found, "diffusers")

    def _sorted(self) -> tuple[dict[str, Pair], int, list[str]]:
        """The pairs by layer, how many layers of text encoders there are beside them, and names of neither."""
        pairs: dict[str, Pair] = {}
        texts: set[str] = set()
        strange: list[str] = []
        for name in self.shapes:
            kind = next((k for k, p in (("down", DOWN), ("up", UP), ("alpha", ALPHA)) if p.search(name)), "")
            layer = re.sub({"down": DOWN, "up": UP, "alpha": ALPHA}[kind], "", name) if kind else name
            if TEXT.match(name):
                texts.add(layer)
            elif kind:
                setattr(pairs.setdefault(layer, Pair()), kind, name)
            else:
                strange.append(name)
        for layer, pair in pairs.items():
            if not (pair.down and pair.up):
                raise LoRAError(f"{self.path}: {layer} lacks one half of its pair: get the file again")
            down, up = self.shapes[pair.down], self.shapes[pair.up]
            if len(down) < 2 or len(up) < 2 or down[0] != up[1] or not down[0] or math.prod(up[2:]) != 1:
                raise LoRAError(f"{self.path}: the halves of {layer}, {down} and {up}, are no pair: get the file again")
        return pairs, len(texts), strange

    @property
    def ranks(self) -> list[int]:
        """The ranks of the layers, rising, each once."""
        return sorted({self.shapes[pair.down][0] for pair in self.pairs.values()})

    @property
    def architecture(self) -> str:
        """The architecture that it is for, in ModelSpec's words; "" where its names do not tell."""
        return architecture_of_file(self.shapes)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """The settings that peft keeps, in the header or in a file beside its own; {} where there are none."""
        text = self.metadata.get(CONFIG, "")
        beside = self.path.with_name("adapter_config.json")
        try:
            if not text and self.path.name == "adapter_model.safetensors" and beside.is_file():
                text = beside.read_text(encoding="utf-8")
            found = dict(json.loads(text)) if text else {}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise LoRAError(f"{self.path}: peft's settings of it cannot be read ({error!s:.200})") from None
        own = {k.partition(".")[2]: v for k, v in found.items() if k.startswith(("unet.", "transformer."))}
        settings = own or found
        if settings.get("use_dora"):
            raise LoRAError(f"{self.path} is a DoRA by its settings: plain LoRAs are read")
        return settings

    def _scale(self, layer: str, rank: int, alpha: float | None) -> float:
        """The factor of a pair: alpha / rank, where nothing says alpha 1."""
        settings = self._settings
        patterns = settings.get("alpha_pattern") or {}
        if alpha is None and settings.get("lora_alpha") is not None:
            alpha = next((a for p, a in patterns.items() if re.search(rf"(^|\.){p}$", layer)), settings["lora_alpha"])
        if alpha is None:
            return 1.0
        scale = float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
        if not math.isfinite(scale):
            raise LoRAError(f"{self.path}: alpha of {layer} is {alpha}, no number: get the file again")
        return scale

    def match(self, backbone: nn.Module) -> tuple[dict[str, str], list[str]]:
        """The backbone's layers with the file's names for them, and the file's layers that are none of them.

        Raises LoRAError for a file of which no layer is the backbone's, and for a layer of another shape.
        """
        layers, places = matching_layers(backbone, "all"), places_of(backbone)
        found: dict[str, str] = {}
        unknown = list(self.strange)
        for layer in self.pairs:
            place = places.get(_bare(layer))
            if place is None or place in found:
                unknown.append(layer)
            else:
                found[place] = layer
        if not found:
            raise LoRAError(
                f"{self.path} does not fit this model: none of its {len(self.pairs)} layers is in it, such as "
                f"{next(iter(self.pairs), 'those of text encoders')!s:.100}. It was made for another architecture"
            )
        for place, layer in found.items():
            own: Any = layers[place].weight
            pair = self.pairs[layer]
            down, up = self.shapes[pair.down], self.shapes[pair.up]
            # A 1 x 1 convolution is a linear layer, and some write it as such.
            if up[0] != own.shape[0] or not _same(down[1:], tuple(own.shape[1:])):
                raise LoRAError(
                    f"{self.path} does not fit this model: {layer} is for a layer of shape {(up[0], *down[1:])}, here "
                    f"it is {tuple(own.shape)}. It was made for another architecture"
                )
            if quantised(own):
                raise LoRAError(f"{self.path} cannot be merged: the model's {place} is quantised, load it in float16")
        return found, unknown

    def changes(self, backbone: nn.Module) -> Changes:
        """What the file changes in a backbone; raises LoRAError as `match`, and for weights that are no numbers."""
        found, unknown = self.match(backbone)
        layers = matching_layers(backbone, "all")
        made: dict[str, Change] = {}
        with safe_open(self.path, "pt") as file:
            for place, layer in found.items():
                pair = self.pairs[layer]
                own: Any = layers[place].weight
                down, up = (file.get_tensor(name).float().clone() for name in (pair.down, pair.up))
                if not (down.isfinite().all() and up.isfinite().all()):
                    raise LoRAError(f"{self.path} is of no use: weights of {layer} are no numbers (NaN or infinity)")
                alpha = float(file.get_tensor(pair.alpha).float().flatten()[0]) if pair.alpha else None
                scale = self._scale(_dotted(layer), len(down), alpha)
                made[place] = Change(down.reshape(len(down), *own.shape[1:]), up, scale)
        return Changes(made, unknown)

    def remarks(self, unknown: Sequence[str]) -> list[str]:
        """What of the file is left out, in words."""
        said = []
        if unknown:
            some = ", ".join(f"{n:.80}" for n in unknown[:2])
            said.append(f"{len(unknown)} of {self.path.name}'s layers are none of this model's and left out: {some}.")
        if self.texts:
            said.append(f"{self.path.name} changes {self.texts} layers of text encoders, too: they are left out.")
        return said


def is_lora(shapes: Iterable[str]) -> bool:
    """Whether some of these names are a LoRA's, or of its kin that is refused by name."""
    others = re.compile("|".join(OTHERS))
    return any(DOWN.search(n) or UP.search(n) or others.search(n) for n in shapes)


def places_of(backbone: nn.Module) -> dict[str, str]:
    """A backbone's layers by all the names that LoRA files have for them, with _ for each dot."""
    layers = matching_layers(backbone, "all")
    parameters = [without_adapter(n) for n, _ in backbone.named_parameters() if not of_an_adapter(n)]
    try:
        table = to_single_file(parameters) if is_diffusers(parameters) else to_diffusers(parameters)
    except ValueError:  # a UNet of another kind has its own names alone
        table = {}
    found: dict[str, str] = {}
    for name in layers:
        for alias in (name, table.get(f"{name}.weight", "").rpartition(".")[0]):
            if alias:
                plain = alias.replace(".", "_")
                found[plain] = name
                found.setdefault(re.sub(r"to_out_0$", "to_out", plain), name)  # as diffusers' processors call it
    return found


def _dotted(layer: str) -> str:
    """A layer's name without what stands before and inside it for LoRA's sake."""
    while prefix := next((p for p in PREFIXES if layer.startswith(p)), ""):
        layer = layer.removeprefix(prefix)
    return layer.replace(".processor.", ".")


def _bare(layer: str) -> str:
    return _dotted(layer).replace(".", "_")


def _same(there: tuple[int, ...], here: tuple[int, ...]) -> bool:
    """Whether (in, ...) of a file is that of a layer; trailing ones may be left out."""
    longest = max(len(there), len(here))
    return there + (1,) * (longest - len(there)) == here + (1,) * (longest - len(here))
