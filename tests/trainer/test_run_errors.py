"""What a run refuses, and that nothing is lost when something fails."""

import errno
import gc
import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from turbodistill.core import losses
from turbodistill.core.card import read_card
from turbodistill.core.student import load_student
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.data.files import DataError, whole_file, write_whole, writing
from turbodistill.trainer.data.tensor_file import write_safetensors
from turbodistill.trainer.loop import start
from turbodistill.trainer.loop.distill import Diverged, Step
from turbodistill.trainer.run import run, state_file, training
from turbodistill.trainer.run.events import Finished, PairsMade, Selected, Warned
from turbodistill.trainer.run.memory import OutOfMemory


def test_other_settings_are_refused_with_the_reason_and_nothing_is_lost(kit, host, tmp_path):
    settings = kit.config(updates=3)
    kit.go(host, settings, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"other settings: lr was 0.01 and is 0.02.*or use another folder"):
        kit.go(host, settings.replace(lr=0.02, updates=9), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_pairs_of_another_model_are_refused_before_training(kit, host, tmp_path):
    kit.go(host, kit.config(), tmp_path)
    (tmp_path / training.STATE).unlink()
    with pytest.raises(DataError, match="another model"):
        kit.go(kit.conv_host(seed=1), kit.config(), tmp_path)


@pytest.mark.parametrize("changes", [{"rank": 3}, {"guidance": 3.0}])
def test_a_run_that_cannot_go_on_is_told_before_more_pairs_are_made(kit, host, tmp_path, changes):
    kit.go(host, kit.config(), tmp_path)
    making = run.run(host, kit.config(pairs=99, **changes), tmp_path, kit.WORDS)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        next(making)


def test_a_finished_run_says_so(kit, host, tmp_path):
    kit.go(host, kit.config(updates=3), tmp_path)
    warned = [e.text for e in kit.go(host, kit.config(updates=3), tmp_path) if isinstance(e, Warned)]
    assert warned == ["this training is finished, at update 3: raise updates or minutes to go on"]


def test_a_run_of_regression_alone_is_told_and_its_card_says_so(kit, host, tmp_path):
    events = kit.go(host, kit.config(updates=3, regression_updates=5), tmp_path)
    (warned,) = [e.text for e in events if isinstance(e, Warned)]
    assert warned.startswith("regression_updates is 5 and updates 3") and "discriminator never trains" in warned
    assert events[-1].card.method == "regression to the teacher's pictures"
    assert events[-1].card.training["adversarial_weight"] == 0


def test_pictures_that_no_setting_uses_are_told(kit, host, tmp_path):
    with pytest.raises(ConfigError, match=r"positives is 'teacher', which takes no images: .*set positives to 'both'"):
        kit.go(host, kit.config(), tmp_path / "out", images=tmp_path)


@pytest.mark.parametrize(
    ("changes", "prompts", "seed"), [({}, ("other", "words"), 0), ({"guidance": 3.0}, None, 0), ({}, None, 1)]
)
def test_a_run_is_not_gone_on_with_by_another_model_or_other_prompts(kit, host, tmp_path, changes, prompts, seed):
    """Also where the pairs lie elsewhere, as ComfyUI's do: by their own key."""
    kit.go(host, kit.config(), tmp_path / "run", pairs_folder=tmp_path / "pairs")
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    other = kit.config(updates=9, **changes)
    events = run.run(
        kit.conv_host(seed), other, tmp_path / "run", prompts or kit.WORDS, pairs_folder=tmp_path / "other pairs"
    )
    told = "guidance was 2.0 and is 3.0" if changes else "another model" if seed else "with other pairs .other prompts"
    with pytest.raises(ConfigError, match=told):
        list(events)
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"positives": "real"}, "positives is 'real' but there are no images"),
        ({"targets": "nothing"}, "targets 'nothing' match no layer"),
        (
            {"targets": "atention"},
            "match no layer: use attention, .* regular expression .*; the nearest is 'attention'$",
        ),
        (
            {"targets": "("},
            r"targets .\(. are no regular expression \(missing .*\): use attention, transformer, all, the name",
        ),
        ({"taps": "blocks.0, blocks.7"}, r"taps \['blocks.7'\] are no modules"),
    ],
)
def test_what_does_not_fit_is_told_before_pairs_are_made(kit, host, tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        kit.go(host, kit.config(**changes), tmp_path)
    assert not (tmp_path / "pairs").exists()


def test_an_empty_image_folder_is_told_before_pairs_are_made(kit, host, tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        kit.go(host, kit.config(positives="both"), tmp_path / "out", images=tmp_path / "images")
    assert not (tmp_path / "out" / "pairs").exists()


def test_a_folder_that_cannot_be_written_is_told_at_once(kit, host, tmp_path):
    (tmp_path / "file").write_text("a file, where a folder should be")
    with pytest.raises(OSError, match=r"cannot write .*: choose another folder"):
        next(run.run(host, kit.config(), tmp_path / "file" / "out", kit.WORDS))


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_folder_that_is_deleted_while_it_trains_is_made_anew(kit, host, tmp_path, rounds):
    """The training holds all that it needs: the student is the same, and its curves begin where the folder does."""
    settings = kit.config(updates=6, save_every=2, evaluate_every=rounds)
    kit.go(host, settings, tmp_path / "whole", score=lambda s, t: 1.0)
    for event in run.run(host, settings, tmp_path / "run", kit.WORDS, score=lambda s, t: 1.0):
        if isinstance(event, Step) and event.update == 3:
            shutil.rmtree(tmp_path / "run")
    assert isinstance(event, Finished) and event.path.exists()
    assert kit.same(kit.tensors(event.path), kit.tensors(tmp_path / "whole" / training.BEST))
    assert kit.updates(tmp_path / "run") == [4, 5, 6] and kit.saved(tmp_path / "run")["update"] == 6


def test_a_better_student_that_was_deleted_is_no_longer_the_best(kit, host, tmp_path):
    settings, scores = kit.config(updates=4, evaluate_every=2), iter([1.0, 2.0])
    kept = []
    for event in run.run(host, settings, tmp_path / "run", kit.WORDS, score=lambda s, t: next(scores)):
        if isinstance(event, Selected):
            kept.append(event.best)
            if len(kept) == 1:
                shutil.rmtree(tmp_path / "run")
    assert kept == [True, True] and read_card(event.path).training["updates"] == 4


@pytest.mark.parametrize("left", [0, 1])
def test_pairs_that_are_deleted_while_they_are_made_are_told_and_made_again(kit, host, tmp_path, left):
    settings = kit.config(pairs=130)
    events = run.run(host, settings, tmp_path, kit.WORDS)
    told = (
        "holds no teacher pairs" if left == 0 else "holds 66 of 130 teacher pairs, others were deleted while this ran"
    )
    with pytest.raises(DataError, match=rf"{told}.*: run (it )?again"):
        for event in events:
            if isinstance(event, PairsMade) and event.done == (130 if left == 0 else 64):
                shutil.rmtree(tmp_path / "pairs")
    assert isinstance(kit.go(host, settings, tmp_path)[-1], Finished)


def test_a_file_whose_folder_goes_while_it_is_written_says_so(tmp_path):
    path = tmp_path / "run" / training.STATE
    told = pytest.raises(
        OSError, match=r"cannot write .*state\.safetensors .*folder was deleted or moved .*run it again"
    )
    with told, whole_file(path) as part:
        part.write_bytes(b"half")
        shutil.rmtree(path.parent)
    write_whole(path, b"whole")
    assert path.read_bytes() == b"whole"


def test_a_broken_state_is_told_and_deleting_it_begins_anew(kit, host, tmp_path):
    kit.go(host, kit.config(), tmp_path)
    path = tmp_path / training.STATE
    for length in (1000, 0):
        path.write_bytes(path.read_bytes()[:length])
        told = r"state\.safetensors cannot be read \(.+\): delete it to begin anew; the teacher pairs stay"
        with pytest.raises(ConfigError, match=told):
            kit.go(host, kit.config(), tmp_path)
    path.unlink()
    assert isinstance(kit.go(host, kit.config(), tmp_path)[-1], Finished)
    assert kit.updates(tmp_path) == [1, 2]


def full_disk(name, room):
    """A Path.write_bytes that finds no room for files of this name after a few."""
    writes = []

    def write_bytes(path, content):
        writes.append(path.name.startswith(name))
        full = writes[-1] and sum(writes) > room
        with path.open("wb") as file:
            file.write(content[: len(content) // 2] if full else content)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    return write_bytes


def full_for_states(room):
    """The writer of a state's tensors, which finds no room after a few states, half way through the next."""
    written = []

    def write(path, entries, about):
        written.append(path)
        for done, size in enumerate(write_safetensors(path, entries, about)):
            if len(written) > room and done:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield size

    return write


@pytest.mark.parametrize("name", [training.STATE, training.BEST])
def test_a_full_disk_leaves_the_earlier_state_and_the_run_goes_on(kit, host, tmp_path, monkeypatch, name):
    settings = kit.config(updates=8, save_every=2, evaluate_every=2)
    kit.go(host, settings, tmp_path / "whole", score=lambda s, t: 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk(name, 2))
        if name == training.STATE:
            patch.setattr(state_file, "write_safetensors", full_for_states(2))
        with pytest.raises(OSError, match=r"cannot write .*No space left on device.*: free some space"):
            kit.go(host, settings, tmp_path / "full", score=lambda s, t: 1.0)
    # Of a state that cannot be written the one before is left, of a student that cannot, all but that.
    assert kit.saved(tmp_path / "full")["update"] == (4 if name == training.STATE else 6)
    assert load_student(tmp_path / "full" / training.BEST, host.denoiser)[0]
    assert not list((tmp_path / "full").glob("*.part"))
    kit.go(host, settings, tmp_path / "full", score=lambda s, t: 1.0)
    assert kit.same(kit.tensors(tmp_path / "full" / training.BEST), kit.tensors(tmp_path / "whole" / training.BEST))
    assert kit.updates(tmp_path / "full") == list(range(1, 9))


def test_a_student_that_could_not_be_written_is_not_the_best(kit, host, tmp_path, monkeypatch):
    settings = kit.config(updates=6, evaluate_every=2)
    scores = iter([3.0, 1.0])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk(training.BEST, 1))
        with pytest.raises(OSError, match="No space left on device"):
            kit.go(host, settings, tmp_path, score=lambda s, t: next(scores))
    *_, finished = kit.go(host, settings, tmp_path, score=lambda s, t: 2.0)
    assert finished.score == 2.0 == finished.card.metrics["score on held-out prompts"]


@pytest.mark.parametrize("evaluate_every", [0, 2])
def test_a_loss_that_is_no_number_leaves_the_last_good_student_and_state(
    kit, host, tmp_path, monkeypatch, evaluate_every
):
    settings = kit.config(updates=8, save_every=3, evaluate_every=evaluate_every)
    kit.go(host, settings, tmp_path / "whole")
    inner, calls = losses.regression, []

    def broken(*args):
        calls.append(1)
        return inner(*args) * (math.nan if len(calls) == 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(losses, "regression", broken)
        with pytest.raises(Diverged, match=r"update 5: regression is not finite. Lower lr .*student.safetensors"):
            kit.go(host, settings, tmp_path / "nan")
    student, card, _ = load_student(tmp_path / "nan" / training.BEST, host.denoiser)
    assert card.training["updates"] == 4
    assert all(p.isfinite().all() for p in student.trained.parameters())
    student.release()
    assert kit.saved(tmp_path / "nan")["update"] == 3
    # What made it diverge being gone, the run goes on from there.
    kit.go(host, settings, tmp_path / "nan")
    assert kit.same(kit.tensors(tmp_path / "nan" / training.BEST), kit.tensors(tmp_path / "whole" / training.BEST))


def test_an_error_before_the_first_update_leaves_no_hook(kit, host, tmp_path):
    handle = kit.fail_at(host, 7)  # the pass that finds the features' shapes
    with pytest.raises(kit.Refused):
        kit.go(host, kit.config(), tmp_path)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.denoiser.backbone.modules())
    assert [p.name for p in tmp_path.iterdir()] == ["pairs"]


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
    ids=["cuda", "cpu", "another"],
)
def test_out_of_memory_is_told_with_what_to_change(kit, host, tmp_path, error, ours):
    handle = kit.fail_at(host, 20, error)
    with pytest.raises(OutOfMemory if ours else RuntimeError) as told:
        kit.go(host, kit.config(updates=9), tmp_path)
    handle.remove()
    if ours:
        assert str(told.value).startswith("out of memory while training (batch_size 4, latents of 8 x 8, rank 2): ")
        assert "set gradient_checkpointing to true" in str(told.value) and told.value.__cause__ is None
    else:
        assert told.value is error
    assert isinstance(kit.go(host, kit.config(updates=9), tmp_path)[-1], Finished)


@pytest.mark.parametrize("number", [1, 5])
def test_out_of_memory_while_pairs_are_made_is_told_too(kit, host, tmp_path, number):
    handle = kit.fail_at(host, number, torch.cuda.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(OutOfMemory, match="out of memory while making teacher pairs: make fewer at once"):
        kit.go(host, kit.config(), tmp_path)
    handle.remove()


def test_what_was_trained_is_free_once_out_of_memory_is_told(kit, host, tmp_path, monkeypatch):
    made, create = [], start.create
    monkeypatch.setattr(start, "create", lambda *args: made.append(create(*args)) or made[-1])
    handle = kit.fail_at(host, 20, torch.cuda.OutOfMemoryError)
    gc.disable()  # a front end empties the device's cache at once
    try:
        with pytest.raises(OutOfMemory):
            kit.go(host, kit.config(updates=9), tmp_path)
        alive = [weakref.ref(s) for s in made] + [weakref.ref(s.lora) for s in made]
        made.clear()
        assert len(alive) == 2 and [ref() for ref in alive] == [None] * 2
    finally:
        gc.enable()
        handle.remove()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc, in which no folder can be made")
def test_a_folder_that_cannot_be_made_was_not_deleted():
    told = pytest.raises(OSError, match=r"cannot write /proc/run/file .*: choose another folder")
    with told, whole_file(Path("/proc/run/file")):
        pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "full"), "free some space or choose another folder"),
        (OSError(errno.EDQUOT, "full"), "free some space or choose another folder"),
        (OSError(errno.EACCES, "closed"), "choose a folder that you may write to"),
        (OSError(errno.EROFS, "closed"), "choose a folder that you may write to"),
        (OSError(errno.EIO, "broken"), "choose another folder"),
    ],
)
def test_a_full_disk_alone_asks_for_space(tmp_path, error, told):
    with pytest.raises(OSError, match=rf"cannot write .*\): {told}$"), writing(tmp_path / "file"):
        raise error
