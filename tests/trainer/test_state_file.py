"""A state on disk: the same when it is read, wherever its folder lies by then; and no file of a run runs code."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pytest
import torch
from PIL import Image
from turbodistill.core.card import CardError, header, read_card, read_student, titles
from turbodistill.demo.recipe.fit import Training
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.data.files import DataError, read_tensors
from turbodistill.trainer.loop.distill import Step
from turbodistill.trainer.run import run, training
from turbodistill.trainer.run.events import Finished
from turbodistill.trainer.run.state_file import read_state, read_values, write_state


def test_what_is_read_is_what_was_written(tmp_path):
    tied = torch.randn(3, 4)
    state = {
        "config": {"lr": 1e-320, "name": "ü \ud800", "big": 2**70, "none": None, "yes": True},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 7: {}}, "param_groups": [{"betas": (0.9, 0.99)}]},
        "extra": {"best": float("inf"), "worst": float("-inf"), "score": np.float64(1 / 3), "empty": {}, "list": []},
        "a": {"0": tied, "1": tied, "turned": tied.T, "half": torch.randn(2).half(), "none": torch.zeros(0, 3)},
        "last": torch.randn(1, 2, 4, 4).contiguous(memory_format=torch.channels_last),
    }
    write_state(tmp_path / "state", state)
    found = read_state(tmp_path / "state")
    assert found["config"] == state["config"] and found["extra"] == state["extra"]
    assert found["optimizer"]["param_groups"] == [{"betas": [0.9, 0.99]}] and found["optimizer"]["state"][7] == {}
    assert torch.equal(found["optimizer"]["state"][0]["step"], torch.tensor(3.0))
    assert found["a"].keys() == state["a"].keys()
    for name, tensor in (state["a"] | {"last": state["last"]}).items():
        again = found["last"] if name == "last" else found["a"][name]
        assert torch.equal(again, tensor) and again.dtype == tensor.dtype
    values = read_values(tmp_path / "state")
    assert values["config"] == state["config"] and values["a"] == dict.fromkeys(state["a"])


def test_tied_weights_are_written_once(tmp_path):
    weight = torch.randn(1000)
    write_state(tmp_path / "one", {"a": weight})
    write_state(tmp_path / "two", {"a": weight, "b": weight.detach()})
    sizes = [(tmp_path / name).stat().st_size for name in ("one", "two")]
    assert sizes[1] - sizes[0] < 100


def test_what_is_read_outlives_its_file(tmp_path):
    write_state(tmp_path / "state", {"a": torch.ones(4)})
    found = read_state(tmp_path / "state")["a"]
    write_state(tmp_path / "state", {"a": torch.zeros(4)})
    found += 1
    assert found.tolist() == [2] * 4 and read_state(tmp_path / "state")["a"].tolist() == [0] * 4


# --- elsewhere ---


def pictures(folder):
    folder.mkdir()
    for k in range(5):
        Image.effect_noise((40, 40), 60).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"noise {k}")
    return folder


@pytest.mark.parametrize("move", [shutil.copytree, shutil.move])
def test_a_run_goes_on_elsewhere_to_the_same_student_bit_for_bit(kit, tmp_path, move):
    """Its folder and its pictures moved or copied, by another user's machine, which left its lock's file behind."""
    settings = kit.config(updates=6, save_every=2, evaluate_every=3, positives="both")
    images = pictures(tmp_path / "pictures")
    kit.go(kit.conv_host(), settings, tmp_path / "whole", images=images)
    for event in run.run(kit.conv_host(), settings, tmp_path / "cut", kit.WORDS, images):
        if isinstance(event, Step) and event.update == 3:
            break
    there = tmp_path / "another disk" / "ünder"
    there.mkdir(parents=True)
    for folder in (tmp_path / "cut", images):
        move(str(folder), there / folder.name)
    owner = {"pid": 1, "host": "another-machine", "since": "2020-01-01 00:00"}
    for folder in (there / "cut", there / "cut" / "pairs"):
        (folder / ".lock").write_text(json.dumps(owner))
    before = {p.name: p.stat().st_mtime_ns for p in (there / "cut").rglob("*-0000000.safetensors")}
    host, encoded = kit.conv_host(), []
    encode = host.encode_images
    host.encode_images = lambda images: [encoded.append(len(images)), encode(images)][1]
    events = kit.go(host, settings, there / "cut", images=there / images.name)
    assert [e.update for e in events if isinstance(e, Step)] == [4, 5, 6]
    # Nothing was made again: one picture is encoded to see that the autoencoder is the same.
    assert {p.name: p.stat().st_mtime_ns for p in (there / "cut").rglob("*-0000000.safetensors")} == before
    assert encoded == [1]
    ours, theirs = kit.saved(there / "cut"), kit.saved(tmp_path / "whole")
    for part in ("student", "average", "discriminator"):
        assert kit.same(ours[part], theirs[part])
    assert kit.same(kit.tensors(there / "cut" / training.BEST), kit.tensors(tmp_path / "whole" / training.BEST))


# --- pickles ---

PLACES = {
    "state": training.STATE, "student": training.BEST, "pairs": "pairs/pairs-0000000.safetensors",
    "their prompts": "pairs/prompts-0000000.safetensors", "pictures": "images/images-0000000.safetensors",
    "their captions": "images/prompts-0000000.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(kit, tmp_path_factory):
    """A run of three updates with pictures, to be copied."""
    folder = tmp_path_factory.mktemp("begun")
    settings = kit.config(updates=3, positives="both", evaluate_every=3)
    kit.go(kit.conv_host(), settings, folder / "run", images=pictures(folder / "pictures"))
    return folder, settings


@pytest.fixture(params=["plain", "archive", "stream", "tape", "array"])
def kind(request):
    """Of a pickle."""
    return request.param


@pytest.fixture
def evil(kit, kind, tmp_path):
    """Its bytes; whoever runs it makes the file `ran`."""
    yield kit.pickles.KINDS[kind](tmp_path / "ran")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", PLACES)
def test_no_pickle_in_a_run_s_folder_is_run(kit, begun, tmp_path, place, evil):
    """It is refused in words, or what it stands in the place of is made again."""
    folder, settings = begun
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / PLACES[place]).write_bytes(evil)
    go = lambda: kit.go(kit.conv_host(), settings, tmp_path / "run", images=folder / "pictures")  # noqa: E731
    if place == "state":
        with pytest.raises(ConfigError, match=Path(PLACES[place]).name):
            go()
    else:
        assert isinstance(go()[-1], Finished)


def test_a_state_of_torch_s_format_is_never_read(kit, begun, tmp_path, evil):
    folder, settings = begun
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "state.pt").write_bytes(evil)
    assert isinstance(kit.go(kit.conv_host(), settings, tmp_path / "run", images=folder / "pictures")[-1], Finished)


def test_no_pickle_that_a_setting_names_is_run(kit, host, tmp_path, evil):
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(evil)
    with pytest.raises(ConfigError, match=r"theirs\.safetensors is no complete safetensors file .*can run code"):
        kit.go(host, kit.config(init_student=str(path)), tmp_path / "run")


def test_no_pickle_is_run_by_what_reads_files_for_the_hosts(tmp_path, evil):
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(evil)
    for read in (read_student, read_card, read_tensors):
        with pytest.raises((CardError, DataError), match=r"theirs\.safetensors is"):
            read(path)
    assert header(path) == ({}, {}) and titles(path) == []


def test_no_pickle_is_run_by_the_recipe(tmp_path, kind, evil, monkeypatch):
    """Its states are torch's own; what torch below 2.6 would run does not reach it."""
    path = tmp_path / "teacher.pt"
    path.write_bytes(evil)
    if kind != "archive":
        monkeypatch.setattr(torch.serialization, "load", None)
    with pytest.raises((ValueError, UnpicklingError), match=r"is no state that was saved|Weights only load"):
        Training(torch.nn.Linear(1, 1)).load_file(path)


def test_they_would_run_by_one_who_trusts_them(kit, tmp_path, kind):
    """Or the tests above would show nothing."""
    path = tmp_path / "file"
    path.write_bytes(kit.pickles.KINDS[kind](tmp_path / "ran"))
    with suppress(UnpicklingError, RuntimeError, TypeError, AttributeError):  # there is nothing behind the pickle
        np.load(path, allow_pickle=True) if kind in ("plain", "array") else torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()
