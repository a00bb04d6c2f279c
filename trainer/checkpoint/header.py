"""The header of a weight file: all that is needed to tell what it is, and nothing that could run code."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import ModelError

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
CONVERT = (
    "load it once in ComfyUI and save it with the node Save Checkpoint, or in a WebUI with the tab Checkpoint Merger "
    "(one model, No interpolation, safetensors), and give the .safetensors file"
)
# How files begin that are often mistaken for weights -> what they are and what to do.
BEGINNINGS: dict[bytes, str] = {
    b"GGUF": "is a GGUF file, whose weights are quantised: give the .safetensors file in float16 or bfloat16",
    b"\x80": f"is a pickle file, which can run code and is not read: {CONVERT}",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: get it with git lfs pull",
    b"<": "is a web page, not the file: download it again, logged in if its site asks for it",
    b"\x89HDF": "is an HDF5 file of Keras: give the .safetensors file",
}


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its first weight.

    `shapes` and `dtypes` are by the weights' names; a dtype is safetensors' word, such as F16.
    """

    path: Path
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises ModelError for every other file, with what it is as far as its ending or first bytes tell.
    """
    if not os.path.isfile(path):  # unlike Path's, false for what no file can be called
        raise ModelError(f"model {path!s:.300} does not exist: check the name")
    if path.suffix.lower() in PICKLES:
        raise ModelError(f"{path} is a pickle file ({path.suffix}), which can run code and is not read: {CONVERT}")
    try:
        with path.open("rb") as file:
            begin = file.read(32)
        _check_beginning(path, begin)
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
            return Header(path, file.metadata() or {}, shapes, dtypes)
    except SafetensorError as error:
        raise ModelError(
            f"{path} is no complete safetensors file ({error}). If the download broke off, get it again; "
            "pickle files (.ckpt, .pt) are not loaded, since they can run code"
        ) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror or error}): check it") from None


def _check_beginning(path: Path, begin: bytes) -> None:
    """Raise ModelError for a file that another kind's first bytes give away."""
    if not begin:
        raise ModelError(f"{path} is no complete safetensors file: it is empty, get it again")
    for start, told in BEGINNINGS.items():
        # A safetensors file begins with its header's length, and eight bytes on with a brace.
        if begin.startswith(start) and begin[8:9] != b"{":
            raise ModelError(f"{path} {told}")
    if begin.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = any(name.endswith(".pkl") for name in archive.namelist())
        told = f"is a pickle file, which can run code and is not read: {CONVERT}" if pickled else "is a zip archive"
        raise ModelError(f"{path} {told}" + ("" if pickled else ": unpack it and give the model's file in it"))
