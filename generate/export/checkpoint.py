"""A base model on disk, as an export reads it: a single file or a diffusers folder, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.architecture import WHOLE, architecture_of, architecture_of_file
from ...core.card import fingerprint
from ...core.fit import Base
from ...core.naming import is_diffusers, to_single_file
from ...core.schedule import prediction_of_name
from ...trainer.checkpoint.folder import component_config, read_index, weight_files
from ...trainer.checkpoint.refusals import addition, part, quantised
from .tensors import ExportError, Weights

DENOISERS = ("unet", "transformer")
PARTS = (*DENOISERS, "vae", "text_encoder", "text_encoder_2")


class Checkpoint:
    """A base model: `network` has the shapes of its denoiser's weights by their single-file names.

    Of a folder whose denoiser is no UNet the names are diffusers' own. Raises ExportError or ModelError for what is no
    base model.
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
        self.index = read_index(self.path)
        files = {name: weight_files(self.path, name)[1] for name in PARTS}
        found = {name: Weights(*paths) for name, paths in files.items() if paths}
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
        headers = self.denoiser.headers
        if not self._keys:
            kind = addition(headers[0]) or part(headers[0].shapes)
            raise ExportError(f"{self.path} {kind}. Give the checkpoint that the student was made from")
        if packed := next(filter(None, map(quantised, headers)), ""):
            raise ExportError(f"{self.path} {packed}")

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
        """What the denoiser predicts; "" where nothing says it."""
        if self.folder:
            return prediction_of_name(str(self.config("scheduler").get("prediction_type", "")))
        return "v" if "v_pred" in self.denoiser else ""

    def config(self, component: str) -> dict[str, Any]:
        """A folder's configuration of a part; {} where it has none."""
        return component_config(self.path, component)
