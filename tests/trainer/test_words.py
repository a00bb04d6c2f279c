"""A run in words, the same on every page."""

import pytest
from turbodistill.trainer.run.words import duration, figures, headline, warning

BEST = {"update": 2, "score": 1.23456}


@pytest.mark.parametrize(
    ("kind", "state", "what", "best", "words"),
    [
        ("distill", "working", "training", None, "Training my-turbo"),
        ("distill", "working", "", None, "my-turbo: waiting for the model"),
        ("distill", "working", "teacher pairs", None, "Making teacher pairs for my-turbo"),
        ("distill", "done", "training", None, "my-turbo: done"),
        ("distill", "stopped", "training", BEST,
         "my-turbo: stopped as asked; the best student is that of update 2 (score 1.23)"),
        ("distill", "cancelled", "training", BEST, "my-turbo: cancelled; the next run goes on from there"),
        ("distill", "failed", "training", BEST, "my-turbo: failed"),
        ("pairs", "working", "teacher pairs", None, "Making teacher pairs"),
        ("pairs", "done", "teacher pairs", None, "Teacher pairs: done"),
        ("estimate", "working", "", None, "Estimate: waiting for the model"),
    ],
)  # fmt: skip
def test_what_it_is_at(kind, state, what, best, words):
    assert headline(kind, "my-turbo", state, what, best) == words


@pytest.mark.parametrize(
    ("state", "done", "rate", "left", "best", "words"),
    [
        ("working", 3, 2.0, 14.0, None, "3 of 10 updates · 2 s each · 14 s left"),
        ("working", 3, 2.0, 14.0, {"update": 2, "score": 1.5},
         "3 of 10 updates · 2 s each · 14 s left · best so far: update 2 (score 1.5)"),
        ("working", 3, 0.08, 4.8, None, "3 of 10 updates · 12.5 updates a second · 5 s left"),
        ("working", 0, None, None, None, "0 of 10 updates"),  # before the first
        ("working", 10, None, 0.0, None, "10 of 10 updates · 0 s left"),
        ("done", 10, 2.0, 0.0, BEST, "10 of 10 updates"),
        ("cancelled", 4, 2.0, 12.0, None, "4 of 10 updates"),
    ],
)  # fmt: skip
def test_how_far_how_fast_and_how_long_yet(state, done, rate, left, best, words):
    assert figures(state, done, 10, "updates", rate, left, best) == words
    assert figures(state, 0, 0, "", rate, left, best) == ""  # nobody knows how far


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"), (59, "59 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (599, "9 min 59 s"), (599.6, "10 min"),
        (3599, "59 min"), (3599.6, "1 h 00 min"), (3720, "1 h 02 min"), (90_000, "25 h 00 min"),
    ],
)  # fmt: skip
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_warnings_name_their_updates():
    assert warning(100, "grey") == "Update 100: grey" and warning(0, "little memory") == "little memory"
