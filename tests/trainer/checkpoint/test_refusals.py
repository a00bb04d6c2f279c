"""What is no model to distil is told in one sentence that names it and says what to do; nothing is unpickled."""

import importlib.util
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from turbodistill.core.card import KEY, StudentCard
from turbodistill.trainer.checkpoint.errors import ModelError
from turbodistill.trainer.checkpoint.header import read_header
from turbodistill.trainer.checkpoint.identify import identify
from turbodistill.trainer.checkpoint.load import load_pipeline

_spec = importlib.util.spec_from_file_location("turbodistill_refused", Path(__file__).with_name("refused.py"))
refused = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refused)
FLUX, channels, whole = refused.FLUX, refused.channels, refused.whole
CARD = StudentCard("lora", "my model", "0" * 16, "toy", "eps", "eps", (999,), 1.0, (64, 64), rank=4, alpha=4.0)


@pytest.mark.parametrize(("shapes", "told"), refused.FILES)
def test_a_file_is_refused_by_its_name(shapes, told, layouts, tmp_path):
    path = layouts.sparse(tmp_path / "mine.safetensors", shapes)
    with pytest.raises(ModelError, match=told) as error:
        load_pipeline(path)
    words = str(error.value)
    assert words.startswith(str(path)) and "\n" not in words and len(words) < len(str(path)) + 320
    assert ": " in words.removeprefix(str(path))  # what it is, and what to do


def test_weights_in_whole_numbers_are_quantised(tmp_path, layouts):
    path = layouts.sparse(tmp_path / "mine.safetensors", channels(4), "U8")
    with pytest.raises(ModelError, match=r"holds quantised weights \(in whole numbers\)"):
        load_pipeline(path)


def test_a_student_of_ours_is_no_base(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "mine.safetensors", CARD.to_metadata())
    with pytest.raises(ModelError, match=r"is a student .* of my model: give it as the student, and my model"):
        load_pipeline(tmp_path / "mine.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "mine.safetensors", {KEY: "{}"})
    with pytest.raises(ModelError, match="is a student that TurboDistill made of its base"):
        load_pipeline(tmp_path / "mine.safetensors")


class Trap:
    """What does something when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin", ".pkl", ".safetensors"])
@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_is_refused_unread_whatever_it_is_called(ending, new, tmp_path):
    trap = Trap()
    trap.place = tmp_path / "sprung"
    path = tmp_path / f"mine{ending}"
    torch.save({"state_dict": trap}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(ModelError, match=r"is a pickle file.* not read: load it once in ComfyUI .* safetensors"):
        load_pipeline(path)
    assert not trap.place.exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.place.exists()  # so it does something


@pytest.mark.parametrize(("content", "told"), refused.BROKEN)
def test_a_file_that_is_broken_or_something_else_is_told(content, told, tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=told):
        load_pipeline(path)


def test_a_header_that_begins_like_another_kind_of_file_is_read(tmp_path, layouts):
    """A safetensors file begins with its header's length, which may be any bytes."""
    for length, first in ((0x3C, b"<"), (0x80, b"\x80")):
        header = json.dumps({"a": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}, separators=(",", ":"))
        path = tmp_path / "mine.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + header.ljust(length).encode())
        assert path.read_bytes().startswith(first) and read_header(path).shapes == {"a": (0,)}


@pytest.mark.parametrize("source", ["nowhere.safetensors", "a\0b", "x" * 5000, "", "a/b/c/d", "../a/b", "~/x"])
def test_what_does_not_exist_is_told(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="does not exist: check the name"):
        load_pipeline(source)


def test_files_of_odd_shapes_never_end_in_a_traceback(tmp_path, fuzz_shapes):
    path = tmp_path / "mine.safetensors"
    refused = 0
    for tensors in fuzz_shapes:
        save_file(tensors, path)
        with pytest.raises(ModelError, match="mine"):
            load_pipeline(path)
        refused += 1
    assert refused > 300


@pytest.fixture
def fuzz_shapes(layouts):
    """Checkpoints of which one weight has another shape or is missing."""
    made = (layouts.sd3(1, 64), layouts.sana(1, 112), channels(4), channels(4, 2048), whole(FLUX))

    def damaged():
        for shapes in made:
            for name in list(shapes)[:: max(1, len(shapes) // 25)]:
                for shape in ((), (1,), (3, 0), (2, 2, 2), None):
                    changed = shapes | ({} if shape is None else {name: shape})
                    if shape is None:
                        del changed[name]
                    yield {n: torch.zeros(s) for n, s in changed.items()}

    return damaged()


def test_a_base_is_told_with_a_ControlNet_beside_it(layouts, tmp_path):
    beside = channels(4) | {"control_model.input_blocks.0.0.weight": (4, 4, 3, 3)}
    header = read_header(layouts.sparse(tmp_path / "mine.safetensors", beside))
    assert identify(header).architecture == "stable-diffusion-v1"
