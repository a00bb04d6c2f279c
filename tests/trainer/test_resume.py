"""A run that is killed, closed, cancelled or made longer goes on to the same student, bit for bit."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from turbodistill.core.card import read_card
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.data import pairs
from turbodistill.trainer.loop.distill import Step
from turbodistill.trainer.run import run, training
from turbodistill.trainer.run.events import Begun, Control, PairsMade, Preview, Selected, Warned

CONFTEST = Path(__file__).with_name("conftest.py")


# The script of a run in its own process, that tells its updates; argv: conftest, folder, settings, pause.
SCRIPT = """
import importlib.util, json, sys, time
import torch
from turbodistill.trainer.loop.distill import Step
spec = importlib.util.spec_from_file_location("toys", sys.argv[1])
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)
torch.set_num_threads(1)
for event in toys.run.run(toys.conv_host(), toys.config(**json.loads(sys.argv[3])), sys.argv[2], toys.WORDS):
    if isinstance(event, Step):
        print(event.update, flush=True)
        time.sleep(float(sys.argv[4]))
"""


def start(folder, settings, pause):
    command = [sys.executable, "-c", SCRIPT, str(CONFTEST), str(folder), json.dumps(settings), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_student_bit_for_bit(kit, tmp_path):
    settings = {
        "updates": 20,
        "save_every": 3,
        "evaluate_every": 4,
        "student_steps": 2,
        "regression_updates": 2,
        "discriminator_updates": 2,
    }
    settings |= {"distillation": "matching", "distillation_weight": 0.5}
    killed = start(tmp_path / "killed", settings, 0.2)
    for line in killed.stdout:
        if int(line) == 8:
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    saved = kit.saved(tmp_path / "killed")["update"]
    assert 3 <= saved < 20
    told = start(tmp_path / "killed", settings, 0).communicate()[0].split()
    assert told == [str(u) for u in range(saved + 1, 21)]
    assert kit.updates(tmp_path / "killed") == list(range(1, 21))

    whole = tmp_path / "whole"
    torch.rand(5)  # the caller's own draws do not matter
    kit.go(kit.conv_host(), kit.config(**settings), whole)
    assert kit.same(kit.tensors(tmp_path / "killed" / training.BEST), kit.tensors(whole / training.BEST))
    ours, theirs = kit.saved(tmp_path / "killed"), kit.saved(whole)
    assert ours["extra"] == theirs["extra"] and ours["update"] == theirs["update"] == 20
    for part in ("student", "average", "discriminator"):
        assert kit.same(ours[part], theirs[part])
    assert kit.same(ours["fake_score"]["lora"], theirs["fake_score"]["lora"])


def without_time(folder):
    with (folder / training.HISTORY).open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("stop_at", ["Preview", "Step", "Selected"])
def test_a_closed_run_goes_on_to_the_same_student_bit_for_bit(kit, host, tmp_path, stop_at):
    settings = kit.config(updates=8, save_every=100, preview_every=3, evaluate_every=4, regression_updates=2)
    kit.go(host, settings, tmp_path / "whole")
    events = run.run(host, settings, tmp_path / "closed", kit.WORDS)
    for event in events:
        if type(event).__name__ == stop_at and event.update >= 3:
            break
    events.close()
    assert kit.saved(tmp_path / "closed")["update"] == event.update
    assert not any(m._forward_hooks for m in host.denoiser.backbone.modules())
    kit.go(host, settings, tmp_path / "closed")
    assert kit.same(kit.tensors(tmp_path / "closed" / training.BEST), kit.tensors(tmp_path / "whole" / training.BEST))
    assert without_time(tmp_path / "closed") == without_time(tmp_path / "whole")


def test_closing_while_pairs_are_made_keeps_them(kit, host, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "SHARD", 4)
    events = run.run(host, kit.config(), tmp_path, kit.WORDS)
    assert next(events).done == 4
    events.close()
    assert len(list((tmp_path / "pairs").glob("pairs-*"))) == 1
    assert [e.done for e in kit.go(host, kit.config(), tmp_path) if isinstance(e, PairsMade)] == [4, 8, 12]


def test_a_finished_run_can_be_made_longer(kit, host, tmp_path):
    kit.go(host, kit.config(updates=4), tmp_path / "short")
    events = kit.go(host, kit.config(updates=6, preview_every=1), tmp_path / "short")
    assert [e.update for e in events if isinstance(e, Step)] == [5, 6]
    kit.go(host, kit.config(updates=6), tmp_path / "long")
    assert kit.same(kit.tensors(tmp_path / "short" / training.BEST), kit.tensors(tmp_path / "long" / training.BEST))
    # And one that is complete only tells so.
    assert "Step" not in kit.names(kit.go(host, kit.config(updates=6), tmp_path / "short"))


def test_a_row_of_the_history_that_was_cut_short_is_made_again(kit, host, tmp_path):
    settings = kit.config(updates=3, save_every=2)
    kit.go(host, settings, tmp_path)
    path = tmp_path / training.HISTORY
    with path.open("a") as file:
        file.write("2,0.1")
    kit.go(host, settings.replace(updates=4), tmp_path)
    assert kit.updates(tmp_path) == [1, 2, 3, 4]


def test_a_run_can_be_ended_early_and_goes_on_to_the_same_student(kit, host, tmp_path):
    settings = kit.config(updates=6, evaluate_every=2)
    kit.go(host, settings, tmp_path / "whole")
    control, events = Control(), []
    for event in run.run(host, settings, tmp_path / "early", kit.WORDS, control=control):
        events.append(event)
        control.stop = isinstance(event, Step) and event.update == 3
    assert [e.update for e in events if isinstance(e, Step)] == [1, 2, 3]
    # It ends as others do: measured, previewed, finished.
    assert kit.names(events)[-3:] == ["Selected", "Preview", "Finished"]
    assert events[-1].score == min(e.score for e in events if isinstance(e, Selected))
    assert events[-1].card == read_card(tmp_path / "early" / training.BEST)
    assert kit.saved(tmp_path / "early")["update"] == 3
    kit.go(host, settings, tmp_path / "early")
    ours, theirs = kit.saved(tmp_path / "early"), kit.saved(tmp_path / "whole")
    assert kit.same(ours["average"], theirs["average"]) and kit.same(ours["student"], theirs["student"])


def test_a_run_that_is_scored_otherwise_begins_to_choose_anew_and_says_so(kit, host, tmp_path):
    def near(student, teacher):
        return 1.0

    def far(student, teacher):
        return 100.0

    settings = kit.config(updates=4, evaluate_every=2)
    kit.go(host, settings, tmp_path, score=near)
    done = kit.go(host, settings, tmp_path, score=far)
    assert "Selected" not in kit.names(done) and done[-1].score == 1.0  # of a finished training all stays
    events = kit.go(host, settings.replace(updates=6), tmp_path, score=far)
    assert "by near, which is not comparable with far: the choice begins anew" in told(events)
    assert events[-1].score == 100.0 and events[-1].card.training["updates"] == 6
    assert "anew" not in told(kit.go(host, settings.replace(updates=8), tmp_path, score=far))


@pytest.mark.parametrize("content", [b"", b"no student"])
@pytest.mark.parametrize("updates", [4, 6])
def test_a_broken_best_student_is_written_anew(kit, host, tmp_path, content, updates):
    """Whether the training goes on or is finished, and whatever scored best before."""
    told = iter([0.0, 1.0, 2.0, 3.0])
    settings = kit.config(updates=4, evaluate_every=2)
    kit.go(host, settings, tmp_path, score=lambda *_: next(told))
    (tmp_path / training.BEST).write_bytes(content)
    *_, finished = kit.go(host, settings.replace(updates=updates), tmp_path, score=lambda *_: next(told))
    assert finished.card == read_card(tmp_path / training.BEST) and finished.card.training["updates"] == updates


def test_a_folder_in_the_students_place_is_told_before_anything_is_made(kit, host, tmp_path):
    (tmp_path / training.BEST).mkdir()
    with pytest.raises(ConfigError, match=r"student.safetensors is a folder, and the student is written there"):
        kit.go(host, kit.config(), tmp_path)
    assert not (tmp_path / "pairs").exists()


def test_a_preview_that_was_due_when_a_run_was_ended_is_made_when_it_goes_on(kit, host, tmp_path):
    settings = kit.config(updates=5, preview_every=2)
    assert previews(run.run(host, settings, tmp_path, kit.WORDS), 2) == [0]
    assert previews(run.run(host, settings, tmp_path, kit.WORDS), 3) == [2]
    assert [e.update for e in kit.go(host, settings, tmp_path) if isinstance(e, Preview)] == [4, 5]


def previews(events, last):
    """The updates of previews, up to an update after which the run is ended."""
    made = []
    for event in events:
        if isinstance(event, Preview):
            made.append(event.update)
        if isinstance(event, Step) and event.update == last:
            events.close()
    return made


def told(events):
    return " ".join(event.text for event in events if isinstance(event, Warned))


def fail_and_go_on(host, settings, folder, kit, first):
    """A run that fails at pass `first`, goes on and fails once more, and then goes on to its end."""
    for number in (first, 8):
        handle = kit.fail_at(host, number)
        with pytest.raises(kit.Refused):
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
    ours, theirs = kit.saved(tmp_path / "cut"), kit.saved(tmp_path / "whole")
    for part in ("student", "average", "discriminator"):
        assert kit.same(ours[part], theirs[part]), part
    assert without_time(tmp_path / "cut") == without_time(tmp_path / "whole")
    assert kit.same(kit.tensors(tmp_path / "cut" / training.BEST), kit.tensors(tmp_path / "whole" / training.BEST))


@pytest.mark.parametrize(
    ("changes", "first"),
    [({"gradient_accumulation": 2}, 20), ({"distillation": "matching", "distillation_weight": 0.5}, 22)],
    ids=["gradient_accumulation", "fake score"],
)
def test_it_does_where_an_update_judges_before_its_last_pass(kit, host, tmp_path, changes, first):
    settings = kit.config(updates=3, **changes)
    kit.go(host, settings, tmp_path / "whole")
    handle = kit.fail_at(host, first)
    with pytest.raises(kit.Refused):
        kit.go(host, settings, tmp_path / "cut")
    handle.remove()
    kit.go(host, settings, tmp_path / "cut")
    assert kit.same(kit.saved(tmp_path / "cut")["student"], kit.saved(tmp_path / "whole")["student"])


def test_a_state_in_the_middle_of_an_update_is_not_saved(kit, host, tmp_path, monkeypatch):
    settings = kit.config(updates=4, discriminator_updates=2)
    events = run.run(host, settings, tmp_path, kit.WORDS)
    for event in events:
        if isinstance(event, Step) and event.update == 2:
            break
    seen = []
    save = training.save_state
    monkeypatch.setattr(training, "save_state", lambda state, folder: seen.append(state.update) or save(state, folder))
    handle = kit.fail_at(host, 4)  # the discriminator's own update has three passes; this is the student's first
    with pytest.raises(kit.Refused):
        next(events)
    handle.remove()
    assert seen == [] and not (tmp_path / training.STATE).exists()  # what it would hold no whole run ever was
    kit.go(host, settings, tmp_path / "whole")
    kit.go(host, settings, tmp_path)
    assert kit.same(kit.saved(tmp_path)["student"], kit.saved(tmp_path / "whole")["student"])


def test_a_measurement_that_was_cut_off_is_taken_when_the_run_goes_on(kit, host, tmp_path):
    settings, scores = kit.config(updates=6, evaluate_every=2), {2: 2.0, 4: 1.0, 6: 3.0}
    now = []

    def go(stop=None):
        events = run.run(host, settings, tmp_path, kit.WORDS, score=lambda s, t: scores[now[-1]])
        for event in events:
            if isinstance(event, (Step, Begun)):
                now.append(event.update)
            if isinstance(event, Step) and event.update == stop:
                return events.close()
        return event

    go(stop=4)  # as by Cancel, after the update and before its measurement
    assert go().card.training["updates"] == 4


def test_the_last_measurement_counts_when_a_run_is_made_longer(kit, host, tmp_path):
    """It is taken after the last saved state."""
    settings = kit.config(updates=3, evaluate_every=2)
    *_, first = kit.go(host, settings, tmp_path, score=lambda s, t: 1.0)
    assert first.score == 1.0
    *_, second = kit.go(host, settings.replace(updates=4), tmp_path, score=lambda s, t: 2.0)
    assert second.score == 1.0 and second.card.training["updates"] == 3
