"""The header of a model's file; of a file that is no safetensors file, what it is and what to do."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from ...core import header
from ...core.header import Header
from .errors import ModelError

ENDINGS = (".safetensors", ".sft", "")  # the last for what the hub or a tool has renamed
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


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises ModelError for every other file, with what it is as far as its ending or first bytes tell.
    """
    if os.path.isfile(path):  # unlike Path's, false for what no file can be called
        if path.suffix.lower() in PICKLES:
            raise ModelError(f"{path} is a pickle file ({path.suffix}), which can run code and is not read: {CONVERT}")
        _check_beginning(path)
    return header.read_header(path, ModelError)


def _check_beginning(path: Path) -> None:
    """Raise ModelError for a file that another kind's first bytes give away."""
    try:
        with path.open("rb") as file:
            begin = file.read(32)
    except OSError:
        return  # the reader says why
    if not begin and path.suffix.lower() in ENDINGS:
        raise ModelError(f"{path} is no complete safetensors file: it is empty, get it again")
    for start, kind in BEGINNINGS.items():
        # A safetensors file begins with its header's length, and eight bytes on with a brace.
        if begin.startswith(start) and begin[8:9] != b"{":
            raise ModelError(f"{path} {kind}")
    if begin.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = any(name.endswith(".pkl") for name in archive.namelist())
        kind = BEGINNINGS[b"\x80"] if pickled else "is a zip archive: unpack it and give the model's file in it"
        raise ModelError(f"{path} {kind}")
    if path.suffix.lower() not in ENDINGS and begin[8:9] != b"{":
        raise ModelError(f"{path} is no model file: give a .safetensors file or a diffusers folder")
