"""A student's file in another format: LoRA files, a merged checkpoint, a diffusers folder, a LoRA of a full student."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...core.card import StudentCard
from ...core.fit import check_fit
from ...core.low_rank import Change
from ...core.naming import is_single_file, layers_of
from ...core.precision import PRECISIONS
from ...core.schedule import LAST_TIMESTEP
from ...trainer.checkpoint.merged import CARD, as_full
from ...trainer.data.files import check_space, whole_file, whole_folder
from ...trainer.data.tensor_file import Entry, write_safetensors
from . import folder, merge, transformers
from .checkpoint import Checkpoint
from .extract import Errors, extract
from .lora_files import lora_tensors
from .student import StudentFile
from .tensors import ExportError

LORAS = ("kohya", "comfy", "peft")
FORMATS = (*LORAS, "merged", "diffusers", "lora")
RANKS = 1, 1024
SLACK = 2**22  # bytes of headers and JSON


@dataclass(frozen=True)
class Progress:
    """How far it is, in bytes."""

    done: int
    total: int


class Export:
    """One export: everything is checked when it is made, `run` does it, `report` then says what came of it.

    `to` is one of FORMATS, `base` the base model's file or diffusers folder: merged, diffusers and lora need it, and
    peft where the denoiser is no UNet. `rank` is that of `lora`, `dtype` a key of PRECISIONS. `tokenizer` is a file or
    folder of CLIP's vocabulary for `diffusers` of a single file, else it is looked for. An `out` that is there is
    replaced only with `force`. `remarks` are warnings.
    Raises ExportError, CardError, DataError or ModelError, which say what to do.
    """

    def __init__(
        self,
        student: Path,
        to: str,
        out: Path,
        base: Path | None = None,
        rank: int | None = None,
        dtype: str = "float16",
        tokenizer: Path | None = None,
        force: bool = False,
    ):
        if to not in FORMATS:
            raise ExportError(f"format is {to!r:.80}: use one of {', '.join(FORMATS)}")
        if dtype not in PRECISIONS:
            raise ExportError(f"dtype is {dtype!r:.80}: use one of {', '.join(PRECISIONS)}")
        self.to, self.out, self.dtype, self.rank = to, out, PRECISIONS[dtype], rank
        self.report: list[str] = []
        _check_out(out, to, force, student, base)
        self.student = StudentFile(student)
        self.card = self.student.card
        self._check_options(base)
        self.base = None if base is None else Checkpoint(base)
        self.remarks = [] if self.base is None else check_fit(self.card, self.base.as_base(), student.name)
        self.remarks += _unknown_elsewhere(self.card, to)
        self._prepare(tokenizer)

    def _check_options(self, base: Path | None) -> None:
        kind, to = self.card.kind, self.to
        if kind == "full" and to in LORAS:
            raise ExportError(
                f"{self.student.path} is a full student, no LoRA: use --to lora with --rank, or --to merged"
            )
        if kind == "lora" and to == "lora":
            raise ExportError(
                f"{self.student.path} is a LoRA already: use --to {', '.join(LORAS)}, merged or diffusers"
            )
        if to not in LORAS and base is None:
            raise ExportError(f"--to {to} needs --base: the file or the diffusers folder of {self.card.base_model}")
        if (self.rank is not None) != (to == "lora"):
            raise ExportError(
                "--to lora needs --rank: 64 is a good start" if to == "lora" else "--rank belongs to --to lora alone"
            )
        if self.rank is not None and not RANKS[0] <= self.rank <= RANKS[1]:
            raise ExportError(f"rank is {self.rank}: give {RANKS[0]} to {RANKS[1]}")

    def _prepare(self, tokenizer: Path | None) -> None:
        """Plan what is written, and check that there is room for it."""
        if self.to in LORAS:
            self._tensors = self._lora()
            size = sum(t.nbytes for t in self._tensors.values())
        else:
            assert self.base is not None
            self._merge = merge.Merge(self.student, self.base)
            if self.to == "merged":
                self._entries = merge.single_file(self._merge, self.dtype)
                size = sum(e.nbytes for e in self._entries)
            elif self.to == "diffusers":
                self._folder = folder.plan(self._merge, self.dtype, tokenizer)
                size = self._folder.nbytes()
            else:
                size = sum(
                    4 * (self.rank or 0) * (s[0] + math.prod(s[1:])) for s in self.base.network.values() if len(s) > 1
                )
        check_space(self.out, size + SLACK)

    def _lora(self) -> dict[str, torch.Tensor]:
        if self.to != "peft" and self.student.splits_layers():
            raise ExportError(f"{self.student.path} is in diffusers' names: use --to peft, which ComfyUI reads as well")
        if self.base is not None:
            layers = merge.Merge(self.student, self.base).layers
            if not self.base.folder and self.student.splits_layers():
                layers = self.student.layers  # in diffusers' names already
            elif self.to == "peft" and not self.base.folder and not is_single_file(self.base.network):
                layers = transformers.split(layers, transformers.rows_of(self.base.network, self.base.architecture))
        elif self.to == "kohya" and not self.student.of_a_unet():
            layers = self.student.layers  # in the names of the host that it was made in
        else:
            layers = self.student.of(None)
        return self._in_format(layers, self.to)

    def _in_format(self, layers: Mapping[str, Change], style: str) -> dict[str, torch.Tensor]:
        per_block = layers_of(self.base.network) if self.base is not None and is_single_file(self.base.network) else 0
        return lora_tensors(layers, style, self.dtype, self.card.architecture, per_block)

    def run(self) -> Generator[Progress, None, None]:
        """Write it; yields Progress. An error, or closing the generator, leaves nothing half-written."""
        if self.to == "diffusers":
            yield from self._write_folder()
        elif self.to == "lora":
            yield from self._extract()
        elif self.to == "merged":
            yield from self._write(self._entries, self._merged_metadata())
        else:
            if self.to == "peft":  # its scale is in its numbers
                self.card = replace(self.card, alpha=float(self.card.rank))
            yield from self._write(_stored(self._tensors), self.card.to_metadata())

    def _write(self, entries: list[Entry], metadata: Mapping[str, str]) -> Iterator[Progress]:
        total, done = sum(e.nbytes for e in entries), 0
        with whole_file(self.out) as part:
            for nbytes in write_safetensors(part, entries, metadata):
                done += nbytes
                yield Progress(done, total)
        self.report = [f"{self.out} ({total / 1e6:.1f} MB, {len(entries)} tensors)"]

    def _merged_metadata(self) -> dict[str, str]:
        """The base's own metadata, which its loaders may need, but for what it is called; and the card."""
        assert self.base is not None
        self.card = as_full(self.card)
        kept = {k: v for k, v in self.base.denoiser.metadata.items() if not k.startswith("modelspec.")}
        return kept | self.card.to_metadata()

    def _extract(self) -> Iterator[Progress]:
        assert self.base is not None and self.rank is not None
        errors, layers, done = Errors(), {}, 0
        total = 4 * sum(math.prod(s) for s in self.base.network.values())
        for name, layer, nbytes in extract(self._merge, self.rank, errors):
            if layer is not None:
                layers[name] = layer
            done += nbytes
            yield Progress(done, total)
        error = errors.relative()["all"]
        self.card = replace(
            self.card,
            kind="lora",
            rank=self.rank,
            alpha=float(self.rank),
            targets="all",
            method=f"{self.card.method}; a LoRA extracted from the full student by SVD",
            training=self.card.training | {"extracted_rank": self.rank, "extraction_error": round(error, 4)},
        )
        for _ in self._write(_stored(self._in_format(layers, "kohya")), self.card.to_metadata()):
            pass
        self.report += ["relative error of the change (0 is exact, 1 is nothing of it):", *errors.in_words()]

    def _write_folder(self) -> Iterator[Progress]:
        self.card = as_full(self.card)
        made, done = self._folder, 0
        total = made.nbytes()
        with whole_folder(self.out) as part:
            for path, entries in made.weights.items():
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                own = self.card.to_metadata() if path.startswith(("unet/", "transformer/")) else {}
                for nbytes in write_safetensors(part / path, entries, own):
                    done += nbytes
                    yield Progress(done, total)
            for path, source in made.copies.items():
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, part / path)
                done += source.stat().st_size
                yield Progress(done, total)
            for path, value in made.texts.items():
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False) + "\n"
                (part / path).write_text(text, encoding="utf-8")
        self.report = [f"{self.out}/ ({total / 1e6:.1f} MB)"]


def _stored(tensors: Mapping[str, torch.Tensor]) -> list[Entry]:
    return [Entry(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()]


def _unknown_elsewhere(card: StudentCard, to: str) -> list[str]:
    """What a program that does not read the card gets wrong of a student, in words."""
    differences = []
    if card.prediction != card.base_prediction and to != "diffusers":
        differences.append(f"predicts {card.prediction} where its base predicts {card.base_prediction}")
    if card.timesteps[0] != LAST_TIMESTEP:
        differences.append(f"begins at timestep {card.timesteps[0]}")
    words = " and ".join(differences)
    return [f"the student {words}: of ComfyUI and the WebUIs only our nodes and samplers know that."] if words else []


def _check_out(out: Path, to: str, force: bool, *sources: Path | None) -> None:
    """Raise ExportError for an output that may not be written."""
    if to != "diffusers" and out.suffix != ".safetensors":
        raise ExportError(f"out is {out!s:.300}: give a file's name that ends in .safetensors")
    if to == "diffusers" and out.suffix == ".safetensors":
        raise ExportError(f"out is {out!s:.300}, a file's name, and diffusers is a folder: give one without the ending")
    if not out.exists():
        return
    if any(s is not None and s.exists() and (out.samefile(s) or s.resolve() in out.resolve().parents) for s in sources):
        raise ExportError(f"out is {out!s:.300}, which the export reads: give another name")
    if out.is_dir() != (to == "diffusers"):
        raise ExportError(f"out is {out!s:.300}, a {'folder' if out.is_dir() else 'file'}: give another name")
    if not force:
        raise ExportError(f"{out!s:.300} is there already: give another name, or --force to replace it")
    if to == "diffusers" and any(out.iterdir()) and not (out / CARD).exists():
        raise ExportError(f"{out!s:.300} is no folder that an export wrote, so it is not replaced: give another name")
