"""A base model on disk, as an export reads it: a single file or a diffusers folder, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.architecture import WHOLE, architecture_of, architecture_of_file
from ...core.card import fingerprint
from ...core.fit import Base
from ...core.naming import is_diffusers, to_single_file
from .tensors import ExportError, Weights

DENOISERS = ("unet", "transformer")
PARTS = (*DENOISERS, "vae", "text_encoder", "text_encoder_2")
# Weights of numbers that are packed have others beside them.
PACKED = (
    "scale_weight",
    "weight_scale",
    "comfy_quant",
    "scaled_fp8",
    "absmax",
    "quant_map",
    "weight_scale_inv",
    "qweight",
)
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


class Checkpoint:
    """A base model: `network` has the shapes of its denoiser's weights by their single-file names.

    Of a folder whose denoiser is no UNet the names are diffusers' own. Raises ExportError for what is no base model.
    """

    def __init__(self, path: Path):
        self.path, self.folder = path, path.is_dir()
        self.parts: dict[str, Weights] = self._components() if self.folder else {"": Weights(path)}
        where = next((d for d in DENOISERS if d in self.parts), "")
        self.denoiser = self.parts[where]
        self.component = where
        self._keys = self._network()
        self.network = {name: self.denoiser.shapes[key] for name, key in self._keys.items()}
        self._check()

    def _components(self) -> dict[str, Weights]:
        try:
            self.index: dict[str, Any] = dict(json.loads((self.path / "model_index.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ExportError(
                f"{self.path} is no diffusers folder: its model_index.json cannot be read ({error!s:.200}). Give the "
                "folder that holds it, or a single .safetensors file"
            ) from None
        parts = {name: weight_files(self.path / name) for name in PARTS if (self.path / name).is_dir()}
        found = {name: Weights(*files) for name, files in parts.items() if files}
        if not any(d in found for d in DENOISERS):
            raise ExportError(
                f"{self.path} holds no weights of a unet or a transformer: give a whole pipeline's folder"
            )
        return found

    def _network(self) -> dict[str, str]:
        """The single-file names of the denoiser's weights -> their keys."""
        shapes = self.denoiser.shapes
        if not self.folder:
            keys = self.denoiser.starting(WHOLE)
            return keys or ({n: n for n in shapes} if architecture_of(shapes) else {})
        try:
            names = to_single_file(shapes) if is_diffusers(shapes) else {n: n for n in shapes}
        except (ValueError, KeyError) as error:
            raise ExportError(f"{self.path} holds another kind of UNet ({error}): give the base as a file") from None
        return {single: name for name, single in names.items()}

    def _check(self) -> None:
        names = list(self.denoiser)
        if not self._keys:
            raise ExportError(f"{self.path} {_kind(names)}: give the checkpoint that the student was made from")
        packed = [n for n in names if n.rpartition(".")[2] in PACKED]
        if packed or any(not self.denoiser.dtypes[k].is_floating_point for k in self._keys.values()):
            raise ExportError(
                f"{self.path} is quantised ({(packed or names)[0]}): give a file of it in float16, bfloat16 or float32"
            )

    def read(self, name: str) -> Tensor:
        """One of the denoiser's weights, by its single-file name."""
        return self.denoiser[self._keys[name]]

    def key(self, name: str) -> str:
        """What the file or folder calls it."""
        return self._keys[name]

    def single_names(self) -> dict[str, str]:
        """The inverse of `key`."""
        return {key: name for name, key in self._keys.items()}

    def as_base(self) -> Base:
        """What is known of it, for `core.fit.check_fit`."""
        weights = {self._keys[n] if self.folder else n: self.read(n) for n in self._keys}
        return Base(self.architecture, self.prediction, (fingerprint(weights),), self.path.name)

    @property
    def architecture(self) -> str:
        return architecture_of_file(self.network)

    @property
    def prediction(self) -> str:
        """What the denoiser predicts, as far as it is said."""
        if self.folder:
            return PREDICTIONS.get(self.config("scheduler", "scheduler_config.json").get("prediction_type", ""), "")
        return "v" if "v_pred" in self.denoiser else ""

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """A folder's configuration of a part; nothing where it has none."""
        try:
            return dict(json.loads((self.path / component / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one part of a diffusers folder: one, or shards; of variants the one without a name."""
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16", ".bf16", ".non_ema"):
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if (whole := folder / f"{stem}{variant}.safetensors").exists():
                return [whole]
            if index.exists():
                try:
                    table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                    return [folder / name for name in sorted(set(table.values()))]
                except (OSError, ValueError, KeyError, AttributeError) as error:
                    raise ExportError(f"{index} cannot be read ({error!s:.200}): get it again") from None
    if pickled := next(folder.glob("*.bin"), None):
        raise ExportError(
            f"{pickled} holds pickled weights, which are not loaded, since they can run code: save the folder again "
            "with safe_serialization=True"
        )
    return []


def _kind(names: list[str]) -> str:
    """What a file without a denoiser is, in words."""
    if any(".lora_down." in n or ".lora_A." in n or ".lora_up." in n for n in names):
        return "is a LoRA"
    if any(n.startswith(("control_model.", "controlnet_")) or ".zero_convs." in n for n in names):
        return "is a ControlNet"
    if any(n.startswith(("decoder.", "encoder.", "first_stage_model.")) for n in names):
        return "is an autoencoder (VAE)"
    return "holds no diffusion network that is known"
