"""A base model with the student's weights in it, as one file in the layout that all hosts load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...core.architecture import SD1, SD2, SDXL, WHOLE
from ...core.low_rank import Change
from ...core.naming import is_single_file
from ...core.student import FULL_PREFIX
from ...trainer.checkpoint.identify import TEXTS
from ...trainer.checkpoint.layout import Piece
from ...trainer.checkpoint.merged import BESIDE
from ...trainer.data.tensor_file import Entry
from . import layout, transformers
from .checkpoint import Checkpoint
from .student import StudentFile
from .tensors import ExportError, Weights, cast

# What of a whole checkpoint is weights: the rest (noise schedules, marks of v-prediction) stays as it is stored.
PARTS = (WHOLE, *BESIDE)
EMA = "model_ema."
# Where the single file of an architecture has its text encoders; `identify.TEXTS` says of which kind they are.
TEXT_ENCODERS = {
    SD1: {"text_encoder": "cond_stage_model.transformer."},
    SD2: {"text_encoder": "cond_stage_model.model."},
    SDXL: {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
}


class Merge:
    """The denoiser's weights with a student in them, by their single-file names.

    Raises ExportError for a student that does not fit.
    """

    def __init__(self, student: StudentFile, base: Checkpoint):
        self.student, self.base = student, base
        self.layers: dict[str, Change] = {}
        self._parts: dict[str, list[tuple[Tensor, Change]]] = {}  # of layers that diffusers splits: rows, and theirs
        if student.full is None and student.splits_layers() and not base.folder:
            self._match_rows(transformers.rows_of(base.network, base.architecture))
        elif student.full is None:
            self.layers = student.of(base.network)
            self._check({f"{module}.weight": layer.shape for module, layer in self.layers.items()})
        elif student.splits_layers() and not base.folder:
            raise ExportError(
                f"{student.path} is a full student in diffusers' names, of which {base.path} has other layers: give "
                "its base as a diffusers folder, as pipe.save_pretrained writes it"
            )
        else:
            own = {n: student.full.shapes[key] for n, key in student.full.starting(FULL_PREFIX).items()}
            self._check(own)
            if missing := [n for n in base.network if n not in own]:
                raise ExportError(f"{student.path} lacks {len(missing)} weights of this base ({missing[0]})")

    def _match_rows(self, rows: Mapping[str, tuple[str, Tensor]]) -> None:
        """A LoRA in diffusers' names on a single file's weights."""
        for module, layer in self.student.of(f"{name}.weight" for name in rows).items():
            source, numbers = rows[module]
            self._check({f"{source}.weight": (self.base.network[f"{source}.weight"][0], *layer.shape[1:])})
            if len(numbers) != layer.shape[0]:
                raise ExportError(f"{self.student.path} does not fit {self.base.path}: {module} has another size")
            self._parts.setdefault(source, []).append((numbers, layer))

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if (there := self.base.network.get(name)) != shape:
                raise ExportError(
                    f"{self.student.path} does not fit {self.base.path}: {name} is {shape} in the student, "
                    f"{'missing' if there is None else there} in the base. Its base is {self.student.card.base_model}"
                )

    def weight(self, name: str) -> Tensor:
        """One weight: the student's own, or the base's with the LoRA's change, which is float32."""
        if self.student.full is not None:
            return self.student.full[FULL_PREFIX + name]
        weight, module = self.base.read(name), name.removesuffix(".weight")
        if module != name and module in self.layers:
            return weight.float() + self.layers[module].delta()
        if module != name and module in self._parts:
            weight = weight.to(torch.float32, copy=True)
            for numbers, layer in self._parts[module]:
                weight[numbers] += layer.delta()
        return weight


def entry(name: str, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor]) -> Entry:
    """A weight of a file, in `dtype`."""
    return Entry(name, shape, dtype, lambda: cast(read(), dtype, name))


def from_pieces(pieces: Sequence[Piece], weights: Weights, prefix: str, dtype: torch.dtype, given: str = ""):
    """Entries of the pieces: named `prefix` and the piece's name, read from those called `given` and its sources."""
    made = []
    for piece in pieces:
        whole = [weights.dtypes[given + s] for s in piece.sources if not weights.dtypes[given + s].is_floating_point]
        read = lambda p=piece: p.make([weights[given + s] for s in p.sources])  # noqa: E731
        made.append(entry(prefix + piece.name, piece.shape, whole[0] if whole else dtype, read))
    return made


def single_file(merge: Merge, dtype: torch.dtype) -> list[Entry]:
    """Every tensor of the merged file; the base's average weights (EMA) are left out."""
    if merge.base.folder:
        return _from_folder(merge, dtype)
    return _from_file(merge, dtype)


def _from_file(merge: Merge, dtype: torch.dtype) -> list[Entry]:
    base = merge.base.denoiser
    names, made = merge.base.single_names(), []
    for key, shape in base.shapes.items():
        stored = base.dtypes[key]
        if key.startswith(EMA):
            continue
        if key in names:
            made.append(entry(key, shape, dtype, lambda n=names[key]: merge.weight(n)))
        elif key.startswith(PARTS) and stored.is_floating_point:
            made.append(entry(key, shape, dtype, lambda k=key: base[k]))
        else:
            made.append(Entry(key, shape, stored, lambda k=key: base[k]))
    return made


def _from_folder(merge: Merge, dtype: torch.dtype) -> list[Entry]:
    base = merge.base
    if not is_single_file(base.network):
        raise ExportError(
            f"{base.path} is a folder of {base.index.get('_class_name')!s:.60}: its merged single file is made from a "
            "base that is one. Give that, or use --to diffusers"
        )
    encoders = TEXT_ENCODERS.get(base.architecture)
    if encoders is None or any(e not in base.parts for e in (*encoders, "vae")):
        lacks = "its text encoder or autoencoder is missing" if encoders else "its architecture is not known"
        raise ExportError(f"{base.path} cannot be made a single file: {lacks}. Give the base as a single file")
    made = [entry(WHOLE + n, s, dtype, lambda n=n: merge.weight(n)) for n, s in base.network.items()]
    vae = base.parts["vae"]
    made += from_pieces(layout.vae_to_single(vae.shapes), vae, "first_stage_model.", dtype)
    for name, prefix in encoders.items():
        weights = base.parts[name]
        if TEXTS[prefix] == "clip_l":
            pieces = layout.clip_to_single(weights.shapes)
        else:
            pieces = layout.open_clip_to_single(weights.shapes, complete=True)
        made += from_pieces(pieces, weights, prefix, dtype)
    return made + _marks(base)


def _marks(base: Checkpoint) -> list[Entry]:
    """The empty tensors by which hosts tell an SDXL that predicts v, and one whose last step is pure noise."""
    if base.architecture != SDXL or base.prediction != "v":
        return []
    marks = ["v_pred"]
    if base.config("scheduler").get("rescale_betas_zero_snr"):
        marks.append("ztsnr")
    return [Entry(n, (0,), torch.float32, lambda: torch.empty(0)) for n in marks]
