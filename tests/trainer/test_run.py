"""What every front end shares: events in order, resuming bit for bit, and nothing lost when something fails."""

import csv
import errno
import gc
import json
import math
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from turbodistill.core import losses
from turbodistill.core.card import CardError, read_card
from turbodistill.core.student import load_student, student_bytes
from turbodistill.trainer import begin, cards, data, run
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.data import DataError
from turbodistill.trainer.distill import Diverged, Step, distill
from turbodistill.trainer.memory import OutOfMemory

CONFTEST = Path(__file__).with_name("conftest.py")


def names(events):
    return [type(e).__name__ for e in events]


def updates(folder):
    with (folder / run.HISTORY).open(newline="") as file:
        return [int(row["update"]) for row in csv.DictReader(file)]


def state_of(folder):
    return torch.serialization.load(folder / run.STATE, weights_only=True)


def test_events_come_in_order_and_nothing_is_printed(kit, host, tmp_path, capfd):
    settings = kit.config(updates=5, preview_every=2, select_every=3)
    events = kit.go(host, settings, tmp_path)
    assert names(events) == [
        *("PairsMade", "PairsMade", "PairsMade", "Begun", "Preview"),
        *("Step", "Step", "Preview", "Step", "Selected", "Step", "Preview", "Step"),
        *("Selected", "Preview", "Finished"),
    ]
    assert [e.update for e in events[3:-1]] == [0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5]
    assert capfd.readouterr() == ("", "")
    preview = events[4]
    assert preview.student.shape == preview.teacher.shape == (len(preview.prompts), *host.latent_shape)
    assert len(preview.seeds) == len(preview.prompts) and set(preview.seeds) <= set(range(12))
    assert updates(tmp_path) == [1, 2, 3, 4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.csv", "pairs", "state.pt", "student.safetensors"]


def test_the_student_file_says_how_it_was_made(kit, host, tmp_path):
    *_, finished = kit.go(host, kit.config(updates=3, steps=2, alpha=1.0), tmp_path)
    card = read_card(finished.path)
    assert card == finished.card and finished.score is None
    assert (card.kind, card.rank, card.alpha, card.base_hash) == ("lora", 2, 1.0, host.base_hash)
    assert card.timesteps == (999, 499) and card.training["updates"] == 3
    student, _, warning = load_student(finished.path, host.denoiser)
    assert warning == "" and student.generate(torch.randn(1, 4, 8, 8), host.encode_text(["a"])).isfinite().all()


def test_a_low_start_gives_a_schedule_as_long_as_it_can_be(kit, host, tmp_path):
    *_, finished = kit.go(host, kit.config(start=1, steps=2), tmp_path)
    assert finished.card.timesteps == (1, 0)


def test_the_best_student_is_the_one_with_the_lowest_score(kit, host, tmp_path):
    told = iter([3.0, 1.0, 2.0])
    kept = []

    def score(student, teacher):
        assert student.shape == teacher.shape
        return next(told)

    settings = kit.config(updates=6, select_every=2)
    for event in run.run(host, settings, tmp_path, kit.WORDS, score=score):
        if isinstance(event, run.Selected):
            kept.append((event.update, event.best, kit.tensors(tmp_path / run.BEST)))
    assert [(u, b) for u, b, _ in kept] == [(2, True), (4, True), (6, False)]
    assert not kit.same(kept[0][2], kept[1][2]) and kit.same(kept[1][2], kept[2][2])
    assert event.score == 1.0 and event.card.training["updates"] == 4
    assert event.card.metrics == {"score on held-out prompts": 1.0}


def test_the_last_measurement_counts_when_a_run_is_made_longer(kit, host, tmp_path):
    """It is taken after the last saved state."""
    settings = kit.config(updates=3, select_every=2)
    *_, first = kit.go(host, settings, tmp_path, score=lambda s, t: 1.0)
    assert first.score == 1.0
    *_, second = kit.go(host, settings.replace(updates=4), tmp_path, score=lambda s, t: 2.0)
    assert second.score == 1.0 and second.card.training["updates"] == 3


def test_without_selection_the_last_student_is_kept(kit, host, tmp_path):
    *_, finished = kit.go(host, kit.config(updates=3, select_every=0), tmp_path)
    assert finished.score is None and finished.card.training["updates"] == 3


def test_the_student_acts_with_its_average_within_and_as_before_after(kit, host, tmp_path):
    settings = kit.config(updates=3, ema=0.9)
    samples = kit.pairs(host, settings, tmp_path)
    state = kit.state(host, settings, samples)
    list(distill(state, samples, host.encode_text([""])))
    live, slow = kit.weights(state.student.trained), kit.weights(state.average)
    assert not kit.same(live, slow)
    with pytest.raises(KeyError), state.averaged():
        assert kit.same(kit.weights(state.student.trained), slow)
        raise KeyError
    assert kit.same(kit.weights(state.student.trained), live)
    state.student.release()


@pytest.mark.parametrize(
    "prompts", [[f"p{i % 40}" for i in range(100)], list("abcdefghijklmnopqrst"), ["a", "b"] * 15, ["a"] * 8]
)
def test_no_held_out_pair_is_trained_on(prompts):
    samples = data.Samples(torch.zeros(len(prompts), 1), None, prompts)
    train, held = run.split(samples)
    assert len(train) and len(held) >= 4  # fewer cannot be scored
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(prompts)))
    if len(set(prompts)) >= 20:
        assert not {prompts[i] for i in train} & {prompts[i] for i in held}


@pytest.mark.parametrize("count", [4, 7])
def test_of_very_few_pairs_all_are_trained_on_and_scored(kit, host, tmp_path, count):
    settings = kit.config(pairs=count, select_every=1)
    assert isinstance(kit.go(host, settings, tmp_path)[-1].score, float)


# The script of a run in its own process, that tells its updates; argv: conftest, folder, settings, pause.
SCRIPT = """
import importlib.util, json, sys, time
import torch
spec = importlib.util.spec_from_file_location("toys", sys.argv[1])
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)
torch.set_num_threads(1)
for event in toys.run.run(toys.conv_host(), toys.config(**json.loads(sys.argv[3])), sys.argv[2], toys.WORDS):
    if isinstance(event, toys.run.Step):
        print(event.update, flush=True)
        time.sleep(float(sys.argv[4]))
"""


def start(folder, settings, pause):
    command = [sys.executable, "-c", SCRIPT, str(CONFTEST), str(folder), json.dumps(settings), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_student_bit_for_bit(kit, tmp_path):
    settings = {"updates": 20, "save_every": 3, "select_every": 4, "steps": 2, "warmup": 2, "discriminator_updates": 2}
    settings |= {"distillation": "matching", "distillation_weight": 0.5}
    killed = start(tmp_path / "killed", settings, 0.2)
    for line in killed.stdout:
        if int(line) == 8:
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    saved = state_of(tmp_path / "killed")["update"]
    assert 3 <= saved < 20
    told = start(tmp_path / "killed", settings, 0).communicate()[0].split()
    assert told == [str(u) for u in range(saved + 1, 21)]
    assert updates(tmp_path / "killed") == list(range(1, 21))

    whole = tmp_path / "whole"
    torch.rand(5)  # the caller's own draws do not matter
    kit.go(kit.conv_host(), kit.config(**settings), whole)
    assert kit.same(kit.tensors(tmp_path / "killed" / run.BEST), kit.tensors(whole / run.BEST))
    ours, theirs = state_of(tmp_path / "killed"), state_of(whole)
    assert ours["extra"] == theirs["extra"] and ours["update"] == theirs["update"] == 20
    for part in ("student", "average", "discriminator"):
        assert kit.same(ours[part], theirs[part])
    assert kit.same(ours["score"]["lora"], theirs["score"]["lora"])


def without_time(folder):
    with (folder / run.HISTORY).open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("stop_at", ["Preview", "Step", "Selected"])
def test_a_closed_run_goes_on_to_the_same_student_bit_for_bit(kit, host, tmp_path, stop_at):
    settings = kit.config(updates=8, save_every=100, preview_every=3, select_every=4, warmup=2)
    kit.go(host, settings, tmp_path / "whole")
    events = run.run(host, settings, tmp_path / "closed", kit.WORDS)
    for event in events:
        if type(event).__name__ == stop_at and event.update >= 3:
            break
    events.close()
    assert state_of(tmp_path / "closed")["update"] == event.update
    assert not any(m._forward_hooks for m in host.denoiser.backbone.modules())
    kit.go(host, settings, tmp_path / "closed")
    assert kit.same(kit.tensors(tmp_path / "closed" / run.BEST), kit.tensors(tmp_path / "whole" / run.BEST))
    assert without_time(tmp_path / "closed") == without_time(tmp_path / "whole")


def test_closing_while_pairs_are_made_keeps_them(kit, host, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 4)
    events = run.run(host, kit.config(), tmp_path, kit.WORDS)
    assert next(events).done == 4
    events.close()
    assert len(list((tmp_path / "pairs").iterdir())) == 1
    assert [e.done for e in kit.go(host, kit.config(), tmp_path) if isinstance(e, run.PairsMade)] == [4, 8, 12]


def test_a_finished_run_can_be_made_longer(kit, host, tmp_path):
    kit.go(host, kit.config(updates=4), tmp_path / "short")
    events = kit.go(host, kit.config(updates=6, preview_every=1), tmp_path / "short")
    assert [e.update for e in events if isinstance(e, Step)] == [5, 6]
    kit.go(host, kit.config(updates=6), tmp_path / "long")
    assert kit.same(kit.tensors(tmp_path / "short" / run.BEST), kit.tensors(tmp_path / "long" / run.BEST))
    # And one that is complete only tells so.
    assert "Step" not in names(kit.go(host, kit.config(updates=6), tmp_path / "short"))


def test_other_settings_are_refused_with_the_reason_and_nothing_is_lost(kit, host, tmp_path):
    settings = kit.config(updates=3)
    kit.go(host, settings, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"other settings: lr was 0.01 and is 0.02.*or use another folder"):
        kit.go(host, settings.replace(lr=0.02, updates=9), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_pairs_of_another_model_are_refused_before_training(kit, host, tmp_path):
    kit.go(host, kit.config(), tmp_path)
    with pytest.raises(DataError, match="another model"):
        kit.go(kit.conv_host(seed=1), kit.config(), tmp_path)


def test_pairs_can_be_shared_between_runs(kit, host, tmp_path):
    kit.go(host, kit.config(), tmp_path / "a", pairs_folder=tmp_path / "pairs")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pairs").iterdir()}
    kit.go(host, kit.config(adversarial_weight=0.0), tmp_path / "b", pairs_folder=tmp_path / "pairs")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pairs").iterdir()} == before
    assert not (tmp_path / "b" / "pairs").exists()


def test_real_pictures_are_encoded_and_trained_with(kit, host, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((40, 40), 60).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("noise")
    events = kit.go(host, kit.config(positives="both"), tmp_path / "out", images=folder)
    assert [(e.what, e.done, e.total) for e in events if isinstance(e, run.PairsMade)] == [
        *(("teacher pairs", done, 12) for done in (4, 8, 12)),
        ("pictures", 3, 3),
    ]
    assert isinstance(events[-1], run.Finished)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"positives": "real"}, "positives is 'real' but there are no images"),
        ({"targets": "nothing"}, "targets 'nothing' match no layer"),
        ({"targets": "("}, "missing \\)"),
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
        kit.go(host, kit.config(), tmp_path / "out", images=tmp_path / "images")
    assert not (tmp_path / "out" / "pairs").exists()


def test_a_folder_that_cannot_be_written_is_told_at_once(kit, host, tmp_path):
    (tmp_path / "file").write_text("a file, where a folder should be")
    with pytest.raises(OSError, match=r"cannot write .*: free some space or choose another folder"):
        next(run.run(host, kit.config(), tmp_path / "file" / "out", kit.WORDS))


def test_a_broken_state_is_told_and_deleting_it_begins_anew(kit, host, tmp_path):
    kit.go(host, kit.config(), tmp_path)
    path = tmp_path / run.STATE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"state.pt cannot be read .*delete it to begin anew; the teacher pairs stay"):
        kit.go(host, kit.config(), tmp_path)
    path.unlink()
    assert isinstance(kit.go(host, kit.config(), tmp_path)[-1], run.Finished)
    assert updates(tmp_path) == [1, 2]


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


@pytest.mark.parametrize("name", [run.STATE, run.BEST])
def test_a_full_disk_leaves_the_earlier_state_and_the_run_goes_on(kit, host, tmp_path, monkeypatch, name):
    settings = kit.config(updates=8, save_every=2, select_every=2)
    kit.go(host, settings, tmp_path / "whole", score=lambda s, t: 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk(name, 2))
        with pytest.raises(OSError, match=r"cannot write .*No space left on device.*: free some space"):
            kit.go(host, settings, tmp_path / "full", score=lambda s, t: 1.0)
    # Of a state that cannot be written the one before is left, of a student that cannot, all but that.
    assert state_of(tmp_path / "full")["update"] == (4 if name == run.STATE else 6)
    assert load_student(tmp_path / "full" / run.BEST, host.denoiser)[0]
    assert not list((tmp_path / "full").glob("*.part"))
    kit.go(host, settings, tmp_path / "full", score=lambda s, t: 1.0)
    assert kit.same(kit.tensors(tmp_path / "full" / run.BEST), kit.tensors(tmp_path / "whole" / run.BEST))
    assert updates(tmp_path / "full") == list(range(1, 9))


def test_a_row_of_the_history_that_was_cut_short_is_made_again(kit, host, tmp_path):
    settings = kit.config(updates=3, save_every=2)
    kit.go(host, settings, tmp_path)
    path = tmp_path / run.HISTORY
    with path.open("a") as file:
        file.write("2,0.1")
    kit.go(host, settings.replace(updates=4), tmp_path)
    assert updates(tmp_path) == [1, 2, 3, 4]


def test_the_history_gains_the_columns_of_losses_that_come_later(kit, host, tmp_path):
    kit.go(host, kit.config(updates=4, warmup=2), tmp_path)
    with (tmp_path / run.HISTORY).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["adversarial"] == "" and float(rows[3]["adversarial"])
    assert {"update", "seconds", "accuracy", "regression", "discriminator", "r1"} <= set(rows[0])


@pytest.mark.parametrize("select_every", [0, 2])
def test_a_loss_that_is_no_number_leaves_the_last_good_student_and_state(
    kit, host, tmp_path, monkeypatch, select_every
):
    settings = kit.config(updates=8, save_every=3, select_every=select_every)
    kit.go(host, settings, tmp_path / "whole")
    inner, calls = losses.regression, []

    def broken(*args):
        calls.append(1)
        return inner(*args) * (math.nan if len(calls) == 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(losses, "regression", broken)
        with pytest.raises(Diverged, match=r"update 5: regression is not finite. Lower lr .*student.safetensors"):
            kit.go(host, settings, tmp_path / "nan")
    student, card, _ = load_student(tmp_path / "nan" / run.BEST, host.denoiser)
    assert card.training["updates"] == 4
    assert all(p.isfinite().all() for p in student.trained.parameters())
    student.release()
    assert state_of(tmp_path / "nan")["update"] == 3
    # What made it diverge being gone, the run goes on from there.
    kit.go(host, settings, tmp_path / "nan")
    assert kit.same(kit.tensors(tmp_path / "nan" / run.BEST), kit.tensors(tmp_path / "whole" / run.BEST))


def test_a_run_out_of_health_warns_in_words(kit, host, tmp_path):
    events = kit.go(host, kit.config(updates=100, adversarial_weight=0.0, lr=0.0), tmp_path)
    warned = [e for e in events if isinstance(e, run.Warned)]
    assert warned and all(e.update == 100 and "healthy" in e.text for e in warned)


@pytest.mark.parametrize("changes", [{}, {"rank": 0}, {"output": "x0"}], ids=["lora", "full", "x0"])
def test_a_student_file_gives_the_same_pictures(kit, host, tmp_path, changes):
    settings = kit.config(updates=3, **changes)
    samples = kit.pairs(host, settings, tmp_path)
    state = kit.state(host, settings, samples)
    list(distill(state, samples, host.encode_text([""])))
    card = cards.make_card(host, state, {})
    path = tmp_path / "student.safetensors"
    path.write_bytes(student_bytes(state.student, card, torch.float32))
    again, told, warning = load_student(path, host.denoiser)
    noise, cond = torch.randn(3, 4, 8, 8), host.encode_text(["a", "b", "c"])
    for steps in (1, 3):
        ours, theirs = (s.generate(noise, cond, steps) for s in (state.student, again))
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert told == card and warning == "" and told.kind == ("full" if "rank" in changes else "lora")
    # Over another model it is told, not refused: fine-tunes of one base take each other's students.
    other = kit.conv_host(seed=1)
    assert "the loaded model is another" in load_student(path, other.denoiser)[2]
    state.student.release()
    again.release()


def test_a_student_of_another_architecture_is_refused_and_leaves_no_hook(kit, host, tmp_path):
    *_, finished = kit.go(host, kit.config(), tmp_path)
    unet = kit.unet_host().denoiser
    with pytest.raises(CardError, match=r"student\.safetensors does not fit this model"):
        load_student(finished.path, unet)
    assert not any(m._forward_hooks for m in unet.backbone.modules())
    unet.prediction = "v"
    with pytest.raises(CardError, match="predicts eps, this one predicts v: load toy, its base"):
        load_student(finished.path, unet)


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "LADD"),
        ({"adversarial_weight": 0.0}, "regression to the teacher's pictures"),
        ({"distillation_weight": 1.0}, "LADD, ADD's distillation"),
        ({"distillation_weight": 1.0, "distillation": "matching"}, "LADD, distribution matching"),
        ({"distillation_weight": 1.0, "distillation": "nfsd", "adversarial_weight": 0.0}, "NFSD"),
    ],
)
def test_the_card_says_by_what_it_was_made(kit, host, tmp_path, changes, method):
    *_, finished = kit.go(host, kit.config(updates=1, **changes), tmp_path)
    assert finished.card.method == method


# --- what a front end asks of a run while it goes ---


def test_a_run_can_be_ended_early_and_goes_on_to_the_same_student(kit, host, tmp_path):
    settings = kit.config(updates=6, select_every=2)
    kit.go(host, settings, tmp_path / "whole")
    control, events = run.Control(), []
    for event in run.run(host, settings, tmp_path / "early", kit.WORDS, control=control):
        events.append(event)
        control.stop = isinstance(event, Step) and event.update == 3
    assert [e.update for e in events if isinstance(e, Step)] == [1, 2, 3]
    # It ends as others do: measured, previewed, finished.
    assert names(events)[-3:] == ["Selected", "Preview", "Finished"]
    assert events[-1].score == min(e.score for e in events if isinstance(e, run.Selected))
    assert events[-1].card == read_card(tmp_path / "early" / run.BEST)
    assert state_of(tmp_path / "early")["update"] == 3
    kit.go(host, settings, tmp_path / "early")
    ours, theirs = state_of(tmp_path / "early"), state_of(tmp_path / "whole")
    assert kit.same(ours["average"], theirs["average"]) and kit.same(ours["student"], theirs["student"])


def test_a_preview_can_be_asked_for(kit, host, tmp_path):
    control, made = run.Control(), []
    for event in run.run(host, kit.config(updates=5), tmp_path, kit.WORDS, control=control):
        if isinstance(event, Step) and event.update == 2:
            control.preview = True
        if isinstance(event, run.Preview):
            made.append(event.update)
    assert made == [0, 2, 5] and not control.preview


def test_the_last_preview_is_of_the_student_that_is_kept(kit, host, tmp_path):
    scores = iter([1.0, 2.0])
    settings = kit.config(updates=4, select_every=2, preview_every=2)
    events = kit.go(host, settings, tmp_path, score=lambda s, t: next(scores))
    at_two, at_four, last = [e for e in events if isinstance(e, run.Preview)][1:]
    assert events[-1].card.training["updates"] == 2
    assert torch.allclose(last.student, at_two.student, atol=1e-2)  # the file is in half precision
    assert not torch.allclose(last.student, at_four.student, atol=1e-2)


# --- errors ---


class Refused(Exception):
    """What a host raises in a pass, when the user cancels there."""


def fail_at(host, number, error=Refused):
    """Raise in a pass of the network, the first being 1; returns the hook's handle."""
    passes = iter(range(1, 10**6))

    def look(*_):
        if next(passes) == number:
            raise error

    return host.denoiser.backbone.register_forward_pre_hook(look)


def fail_and_go_on(host, settings, folder, kit, first):
    """A run that fails at pass `first`, goes on and fails once more, and then goes on to its end."""
    for number in (first, 8):
        handle = fail_at(host, number)
        with pytest.raises(Refused):
            kit.go(host, settings, folder)
        handle.remove()
        assert not any(m._forward_hooks for m in host.denoiser.backbone.modules())
    kit.go(host, settings, folder)


# Passes of a run here: 6 for the pairs, 1 to find the features' shapes, 2 to measure memory, 1 for the first preview,
# then 3 an update, or 6 with two updates of the discriminator.
@pytest.mark.parametrize("first", [9, 12, 14, 22])
@pytest.mark.parametrize(
    "changes", [{}, {"discriminator_updates": 2}, {"save_every": 2}], ids=["plain", "two", "saved"]
)
def test_a_run_goes_on_bit_for_bit_after_an_error_in_any_pass(kit, host, tmp_path, changes, first):
    settings = kit.config(updates=6, **changes)
    kit.go(host, settings, tmp_path / "whole")
    fail_and_go_on(host, settings, tmp_path / "cut", kit, first)
    ours, theirs = state_of(tmp_path / "cut"), state_of(tmp_path / "whole")
    for part in ("student", "average", "discriminator"):
        assert kit.same(ours[part], theirs[part]), part
    assert without_time(tmp_path / "cut") == without_time(tmp_path / "whole")
    assert kit.same(kit.tensors(tmp_path / "cut" / run.BEST), kit.tensors(tmp_path / "whole" / run.BEST))


@pytest.mark.parametrize(
    ("changes", "first"),
    [({"accumulate": 2}, 20), ({"distillation": "matching", "distillation_weight": 0.5}, 22)],
    ids=["accumulate", "score"],
)
def test_it_does_where_an_update_judges_before_its_last_pass(kit, host, tmp_path, changes, first):
    settings = kit.config(updates=3, **changes)
    kit.go(host, settings, tmp_path / "whole")
    handle = fail_at(host, first)
    with pytest.raises(Refused):
        kit.go(host, settings, tmp_path / "cut")
    handle.remove()
    kit.go(host, settings, tmp_path / "cut")
    assert kit.same(state_of(tmp_path / "cut")["student"], state_of(tmp_path / "whole")["student"])


def test_a_state_in_the_middle_of_an_update_is_not_saved(kit, host, tmp_path, monkeypatch):
    settings = kit.config(updates=4, discriminator_updates=2)
    events = run.run(host, settings, tmp_path, kit.WORDS)
    for event in events:
        if isinstance(event, Step) and event.update == 2:
            break
    seen = []
    save = run.save_state
    monkeypatch.setattr(run, "save_state", lambda state, folder: seen.append(state.update) or save(state, folder))
    handle = fail_at(host, 4)  # the discriminator's own update has three passes; this is the student's first
    with pytest.raises(Refused):
        next(events)
    handle.remove()
    assert seen == [] and not (tmp_path / run.STATE).exists()  # what it would hold no whole run ever was
    kit.go(host, settings, tmp_path / "whole")
    kit.go(host, settings, tmp_path)
    assert kit.same(state_of(tmp_path)["student"], state_of(tmp_path / "whole")["student"])


def test_an_error_before_the_first_update_leaves_no_hook(kit, host, tmp_path):
    handle = fail_at(host, 7)  # the pass that finds the features' shapes
    with pytest.raises(Refused):
        kit.go(host, kit.config(), tmp_path)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.denoiser.backbone.modules())
    assert [p.name for p in tmp_path.iterdir()] == ["pairs"]


def test_a_student_that_could_not_be_written_is_not_the_best(kit, host, tmp_path, monkeypatch):
    settings = kit.config(updates=6, select_every=2)
    scores = iter([3.0, 1.0])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk(run.BEST, 1))
        with pytest.raises(OSError, match="No space left on device"):
            kit.go(host, settings, tmp_path, score=lambda s, t: next(scores))
    *_, finished = kit.go(host, settings, tmp_path, score=lambda s, t: 2.0)
    assert finished.score == 2.0 == finished.card.metrics["score on held-out prompts"]


def test_a_measurement_that_was_cut_off_is_taken_when_the_run_goes_on(kit, host, tmp_path):
    settings, scores = kit.config(updates=6, select_every=2), {2: 2.0, 4: 1.0, 6: 3.0}
    now = []

    def go(stop=None):
        events = run.run(host, settings, tmp_path, kit.WORDS, score=lambda s, t: scores[now[-1]])
        for event in events:
            if isinstance(event, (Step, run.Begun)):
                now.append(event.update)
            if isinstance(event, Step) and event.update == stop:
                return events.close()
        return event

    go(stop=4)  # as by Cancel, after the update and before its measurement
    assert go().card.training["updates"] == 4


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
    told = "guidance was 2.0 and is 3.0" if changes else "a training of another model, or with other prompts or pairs"
    with pytest.raises(ConfigError, match=told):
        list(events)
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


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
    handle = fail_at(host, 20, error)
    with pytest.raises(OutOfMemory if ours else RuntimeError) as told:
        kit.go(host, kit.config(updates=9), tmp_path)
    handle.remove()
    if ours:
        assert str(told.value).startswith("out of memory while training (batch 4, latents of 8 x 8, rank 2): ")
        assert "set checkpointing to true" in str(told.value) and told.value.__cause__ is None
    else:
        assert told.value is error
    assert isinstance(kit.go(host, kit.config(updates=9), tmp_path)[-1], run.Finished)


@pytest.mark.parametrize("number", [1, 5])
def test_out_of_memory_while_pairs_are_made_is_told_too(kit, host, tmp_path, number):
    handle = fail_at(host, number, torch.cuda.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(OutOfMemory, match="out of memory while making teacher pairs: make fewer at once"):
        kit.go(host, kit.config(), tmp_path)
    handle.remove()


def test_what_was_trained_is_free_once_out_of_memory_is_told(kit, host, tmp_path, monkeypatch):
    made, create = [], begin.create
    for module in (begin, run):
        monkeypatch.setattr(module, "create", lambda *args: made.append(create(*args)) or made[-1])
    handle = fail_at(host, 20, torch.cuda.OutOfMemoryError)
    gc.disable()  # a front end empties the device's cache at once
    try:
        with pytest.raises(OutOfMemory):
            kit.go(host, kit.config(updates=9), tmp_path)
        alive = [weakref.ref(s) for s in made] + [weakref.ref(s.lora) for s in made]
        made.clear()
        assert len(alive) == 4 and [ref() for ref in alive] == [None] * 4
    finally:
        gc.enable()
        handle.remove()
