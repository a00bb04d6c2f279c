"""The recipe's training loop, resumed to the bit, and its averages against their definition."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn
from turbodistill.demo.recipe import averages, compact
from turbodistill.demo.recipe.fit import Training, fit, rate_scale, read_progress


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(128, 4))


def loss(model: nn.Module, step: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(5, 2, 4, 4, generator=draw)
    return (model(x) - x.flatten(1)[:, :4]).square().mean()


def train(path, updates, **settings):
    training = Training(network(), {"lr": 1e-2})
    fit(training, loss, path, 1e-2, 5, updates, save_every=10, **settings)
    return training


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
import test_fit as t
def slow(model, step):
    time.sleep(0.02)
    return t.loss(model, step)
t.fit(t.Training(t.network(), {{"lr": 1e-2}}), slow, Path({path!r}), 1e-2, 5, 60, save_every=10)
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    whole = train(tmp_path / "whole.pt", 60)
    path = tmp_path / "killed.pt"
    script = SCRIPT.format(here=str(__file__.rpartition("/")[0]), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(read_progress(path)) < 6
    resumed = train(path, 60)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for std in averages.TRACKED:
        assert all(torch.equal(v, resumed.averages[std][n]) for n, v in whole.averages[std].items())
    assert [row["step"] for row in read_progress(path)] == [10, 20, 30, 40, 50, 60]


def test_saving_often_does_not_hinder_learning(tmp_path):
    # What saving rounds away must not matter: the same training, saved every tenth update and never before its end.
    saved, free = train(tmp_path / "a.pt", 400), Training(network(), {})
    for step in range(400):
        free.update(loss(free.model, step), 1e-2 * rate_scale(step, None, 0))
    of_saved, of_free = (sum(loss(t.model, 10_000 + i).item() for i in range(20)) / 20 for t in (saved, free))
    before = sum(loss(network(), 10_000 + i).item() for i in range(20)) / 20
    assert of_free < 0.3 * before
    assert of_saved < 1.5 * of_free


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"settings": {"lr": 0.5}}, "other settings"),
        ({"settings": {}}, "other settings"),
        ({"weights": {}}, "another model"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, change, message):
    training = train(tmp_path / "a.pt", 10)
    with pytest.raises(ValueError, match=message):
        Training(network(), {"lr": 1e-2}).load(training.state() | change)


def test_a_line_of_progress_made_twice_counts_once(tmp_path):
    rows = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}, {"step": 20, "loss": 0.5}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_progress(tmp_path / "a.pt") == [rows[0], rows[2]]


def test_the_rate_rises_stays_and_falls():
    assert rate_scale(0, None, 0) == 1 / 200
    assert rate_scale(199, None, 0) == rate_scale(10**6, None, 0) == 1
    assert rate_scale(900, 1000, 100) == 1
    assert rate_scale(950, 1000, 100) == 0.5
    assert rate_scale(1000, 1000, 100) == 0


def test_rounding_in_rows_is_within_half_a_step():
    x = torch.randn(6, 3, 5) * torch.logspace(-6, 3, 6).view(6, 1, 1)
    x[2] = 0
    back = compact.rows(x).decode()
    assert ((back - x).abs() <= x.abs().amax((1, 2), keepdim=True) / 254 * 1.001).all()
    assert torch.equal(compact.rows(back).decode(), back)  # rounding what is rounded changes nothing


def test_second_moments_keep_their_size():
    x = torch.logspace(-18, 6, 500)
    back = compact.exponential(compact.logarithm(x))
    assert ((back / x).log2().abs() <= 0.2501).all()
    assert compact.exponential(compact.logarithm(torch.zeros(3))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
def test_an_average_has_the_width_that_it_is_named_after(std):
    # Weights of the running average, spelled out, against the standard deviation asked for, relative to the end.
    times, weight = np.arange(1, 20_001), np.ones(20_000)
    keep = np.array([averages.keep_of(std, t) for t in times])
    weight = (1 - keep) * np.append(np.cumprod(keep[:0:-1])[::-1], 1)
    assert weight.sum() == pytest.approx(1)
    mean = (weight * times).sum()
    assert ((weight * (times - mean) ** 2).sum() ** 0.5) / times[-1] == pytest.approx(std, rel=0.01)


@pytest.mark.parametrize("std", [0.07, 0.1, 0.15])
def test_an_average_put_together_afterwards_equals_one_that_was_tracked(std):
    values = np.cumsum(np.random.default_rng(0).normal(size=3000))
    running = dict.fromkeys((*averages.TRACKED, std), 0.0)
    kept, ended = {}, 0.0
    for t, value in enumerate(values, 1):
        for width in running:
            keep = averages.keep_of(width, t)
            running[width] = keep * running[width] + (1 - keep) * value
        if t % 150 == 0:
            kept |= {(t, width): running[width] for width in averages.TRACKED}
    ended = float(averages.solve(list(kept), 3000, std) @ np.array(list(kept.values())))
    assert ended == pytest.approx(running[std], abs=0.02 * values.std())


def test_what_was_kept_is_put_together_from_files(tmp_path):
    for step in (100, 200, 300):
        averages.write(tmp_path, step, {std: {"w": torch.full((2,), float(step))} for std in averages.TRACKED})
    found = averages.saved_files([tmp_path], 200)
    assert list(found) == [(100, 0.05), (100, 0.1), (200, 0.05), (200, 0.1)]
    # The weights of the sum add up to one, and the later averages count for more.
    assert 150 < averages.average(found, 200, 0.07)["w"][0] < 250
    with pytest.raises(ValueError, match="no average has been kept"):
        averages.average({}, 200, 0.07)
    with pytest.raises(ValueError, match="relative width"):
        averages.exponent(0.5)


@pytest.mark.parametrize(
    "content",
    [b"", b"rubbish", b"PK\3\4 rubbish", "cut", [1, 2], {"format": 1}, {"settings": 3}],
    ids=["empty", "rubbish", "no archive", "cut", "a list", "without settings", "odd settings"],
)
def test_a_file_that_is_no_state_is_named(tmp_path, content):
    path = tmp_path / "a.pt"
    if content == "cut":
        train(path, 10)
        path.write_bytes(path.read_bytes()[:-200])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"a\.pt is no state that was saved here, or is broken: begin in another"):
        Training(network(), {"lr": 1e-2}).load_file(path)


def test_lines_that_a_kill_has_cut_are_left_out_and_the_next_one_is_whole(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'{"step": 5, "loss": 1.0}\n\xff\xfe\n7\n[]\n{"step": 9}\n{"step": 31, "lo')
    train(tmp_path / "a.pt", 20)
    found = read_progress(tmp_path / "a.pt")
    assert found[0] == {"step": 5, "loss": 1.0} and found[1] == {"step": 9} and found[-1]["step"] == 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_update_that_it_came_in(tmp_path, number):
    before = signal.getsignal(number)

    def loss(model, step):
        if step == 7:
            os.kill(os.getpid(), number)
        return model(torch.ones(1, 3)).square().sum()

    training = Training(torch.nn.Linear(3, 1))
    with pytest.raises(KeyboardInterrupt, match="stopped at update 8, which is saved"):
        fit(training, loss, tmp_path / "a.pt", 1e-2, 1, None)
    other = Training(torch.nn.Linear(3, 1))
    other.load_file(tmp_path / "a.pt")
    assert other.step == 8 and torch.equal(other.model.weight, training.model.weight)
    assert signal.getsignal(number) == before
