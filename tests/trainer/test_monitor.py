"""A run as a page shows it: where it is, how long yet, its curves, warnings and pictures."""

import json
import math

import pytest
import torch
from turbodistill.trainer.config import Config
from turbodistill.trainer.loop.distill import Step
from turbodistill.trainer.loop.health import RANGES, Health
from turbodistill.trainer.run import history, monitor, run, training
from turbodistill.trainer.run.events import Begun, Finished, PairsMade, Preview, Selected, Warned
from turbodistill.trainer.run.memory import GB, Memory
from turbodistill.trainer.run.monitor import Monitor


def watch(**settings):
    """A monitor that shows latents as the words `mean of a picture`."""
    return Monitor("distill", "my-turbo", Config(**settings), lambda latents: [f"{x.mean():.0f}" for x in latents])


def step(update, seconds=0.5, spent=None, **losses):
    health = Health(0.5, 1.0, 1.0, 1.0, 1.0)
    spent = update * seconds if spent is None else spent
    return Step(update, losses or {"regression": 1.0}, health, seconds, spent)


def pictures(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)


def made(done, total=64):
    return PairsMade(done, total, "teacher pairs", None)


# --- where it is, and how long yet ---


def test_before_the_first_event_nothing_is_known():
    told = watch().snapshot()
    assert (told["state"], told["what"], told["total"]) == ("working", "", 0)
    assert told["rate"] is told["time_left"] is told["best"] is None
    assert (told["kind"], told["name"]) == ("distill", "my-turbo") and told["history"]["update"] == []
    assert told["ranges"] == {name: [low, high] for name, (low, _, high, _) in RANGES.items()}


def test_time_left_goes_by_the_pace_of_late():
    seen = watch()
    seen.follow(made(4), 9.0)  # the first also loads the model: it tells nothing of the pace
    assert seen.snapshot()["time_left"] is None
    seen.follow(made(8), 2.0)
    told = seen.snapshot()
    assert (told["what"], told["done"], told["total"], told["unit"]) == ("teacher pairs", 8, 64, "pairs")
    assert told["rate"] == pytest.approx(0.5) and told["time_left"] == pytest.approx(0.5 * 56)
    for done in range(12, 52, 2):  # twenty slower ones: the fast one is forgotten
        seen.follow(made(done), 4.0)
    assert seen.snapshot()["rate"] == pytest.approx((4.0 * 20) / (50 - 8), rel=0.05)


def test_training_has_a_pace_of_its_own():
    seen = watch(updates=100)
    for done in (4, 8):
        seen.follow(made(done), 60.0)
    seen.follow(Begun(10, Memory(1, 1, 1)), 30.0)
    assert seen.snapshot()["time_left"] is None and seen.running
    seen.follow(step(11), 99.0)  # not how long the page took to be told, but the update
    told = seen.snapshot()
    assert (told["what"], told["done"], told["total"], told["unit"]) == ("training", 11, 100, "updates")
    assert told["rate"] == 0.5 and told["time_left"] == pytest.approx(0.5 * 89)


def test_a_limit_in_minutes_is_the_most_that_is_left():
    seen = watch(updates=10_000, minutes=2.0)
    seen.follow(Begun(0, Memory(1, 1, 1)), 0.0)
    seen.follow(step(1, spent=0.5), 0.5)
    assert seen.snapshot()["time_left"] == pytest.approx(119.5)
    seen.follow(step(2, spent=130.0), 0.5)
    assert seen.snapshot()["time_left"] == 0
    short = watch(updates=10, minutes=2.0)
    short.follow(Begun(0, Memory(1, 1, 1)), 0.0)
    short.follow(step(1), 0.5)
    assert short.snapshot()["time_left"] == pytest.approx(4.5)


def test_a_run_of_so_many_minutes_is_done_after_them():
    seen = watch(updates=10_000, minutes=2.0)
    assert seen.snapshot()["share"] is None
    seen.follow(made(4), 1.0)
    assert seen.snapshot()["share"] == 4 / 64  # of the pairs
    seen.follow(Begun(0, Memory(1, 1, 1)), 0.0)
    seen.follow(step(1, spent=30.0), 0.5)
    assert seen.snapshot()["share"] == 0.25
    seen.follow(step(2, spent=119.0), 0.5)
    seen.follow(Finished(None, None, 1.0), 1.0)
    assert (seen.snapshot()["state"], seen.snapshot()["done"], seen.snapshot()["share"]) == ("done", 2, 1.0)


def test_pairs_do_not_go_by_the_training_s_limit():
    seen = watch(minutes=1.0)
    for done in (4, 8):
        seen.follow(made(done), 60.0)
    assert seen.snapshot()["time_left"] == pytest.approx(15 * 56)


def test_only_a_training_can_be_asked_for_something():
    seen = watch()
    assert not seen.running
    seen.follow(made(4), 1.0)
    assert not seen.running
    seen.follow(step(1), 1.0)
    assert seen.running
    seen.end("cancelled")
    assert not seen.running


@pytest.mark.parametrize(("updates", "state"), [(3, "stopped"), (5, "done")])
def test_a_run_that_was_stopped_says_so_unless_it_was_at_its_end(updates, state):
    seen = watch(updates=5)
    seen.follow(step(updates), 1.0)
    seen.control.stop = True
    seen.follow(Finished(None, None, 1.0), 1.0)
    assert seen.snapshot()["state"] == state


def test_an_end_is_told_with_what_went_wrong():
    seen = watch()
    seen.end("failed", "no room")
    assert (seen.snapshot()["state"], seen.snapshot()["error"]) == ("failed", "no room")


def test_memory_is_told_against_what_is_there():
    seen = Monitor("distill", "a", Config(), list, free=2 * GB)
    seen.follow(Begun(0, Memory(GB, GB, GB)), 0.0)
    assert "only 2.0 GB are there" in seen.snapshot()["memory"]


# --- what it shows ---


def test_the_best_is_the_last_that_was():
    seen = watch()
    for update, score, best in ((2, 3.0, True), (4, 1.0, True), (6, 2.0, False)):
        seen.follow(Selected(update, score, best), 1.0)
    told = seen.snapshot()
    assert told["best"] == {"update": 4, "score": 1.0}
    assert told["history"]["scores"] == {"update": [2, 4, 6], "score": [3.0, 1.0, 2.0]}


def test_warnings_are_kept():
    seen = watch()
    seen.warn("looks like a turbo")
    seen.follow(Warned(100, "pictures turn grey"), 1.0)
    assert seen.snapshot()["warnings"] == ["looks like a turbo", "Update 100: pictures turn grey"]


def test_previews_are_shown_beside_the_teacher_which_is_drawn_once():
    drawn = []
    seen = Monitor("distill", "a", Config(), lambda latents: drawn.append(1) or [f"{x.mean():.0f}" for x in latents])
    for update in range(monitor.SHOWN + 3):
        seen.follow(Preview(update, pictures(update, 1), pictures(7, 8), ["a", "b"], [0, 1]), 1.0)
    previews = seen.snapshot()["previews"]
    assert len(drawn) == 1 + monitor.SHOWN + 3
    assert [p["update"] for p in previews] == list(range(3, monitor.SHOWN + 3))  # the newest
    last = previews[-1]
    assert last["student"] == [f"{monitor.SHOWN + 2}", "1"] and last["teacher"] == ["7", "8"]
    assert last["prompts"] == ["a", "b"] and last["seeds"] == [0, 1]


def test_the_newest_pairs_are_shown():
    seen = watch()
    seen.newest(pictures(*range(12)))
    assert seen.snapshot()["pictures"] == [str(k) for k in range(12 - monitor.NEWEST, 12)]
    seen.newest(pictures(50, 51))
    assert seen.snapshot()["pictures"] == [*(str(k) for k in range(14 - monitor.NEWEST, 12)), "50", "51"]


# --- curves ---


def test_a_loss_that_comes_later_is_nothing_before():
    seen = watch()
    seen.follow(step(1, regression=1.0), 1.0)
    seen.follow(step(2, regression=0.5, discriminator=-0.25), 1.0)
    told = seen.snapshot()
    assert told["history"]["losses"] == {"regression": [1.0, 0.5], "discriminator": [None, -0.25]}


def test_the_discriminator_s_health_is_nothing_before_there_is_one():
    seen = watch()
    seen.follow(step(1, regression=1.0), 1.0)
    seen.follow(step(2, regression=1.0, discriminator=2.0), 1.0)
    health = seen.snapshot()["history"]["health"]
    assert set(health) == {name for name in RANGES if not name.startswith("pixel_")}  # of one discriminator
    assert {name for name, values in health.items() if None in values} == {"accuracy", "logit_gap"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_nothing(value):
    seen = watch()
    seen.follow(step(1, regression=value, r1=1.0), 1.0)
    told = json.loads(json.dumps(seen.snapshot(), allow_nan=False))
    assert told["history"]["losses"] == {"regression": [None], "r1": [1.0]}


@pytest.mark.parametrize(
    ("updates", "width"), [(30, 1), (31, 2), (150, 5), (151, 6), (1999, 67), (2000, 34), (9000, 38)]
)
def test_a_long_curve_is_sent_as_few_means(updates, width):
    seen = watch(updates=updates)
    for update in range(1, updates + 1):
        seen.follow(step(update, regression=float(update)), 1.0)
    told = seen.snapshot()
    every = 1 if updates < 2000 else 2 if updates < 4000 else 4 if updates < 8000 else 8
    shown, values = told["history"]["update"], told["history"]["losses"]["regression"]
    assert told["mean_of"] == width
    assert len(shown) == len(values) == min(updates // every, monitor.POINTS)
    assert shown == sorted(set(shown)) and shown[-1] == updates // every * every  # the newest is among them
    # The mean of an even slope lies half of its part before its end.
    whole = [k for k, update in enumerate(shown) if update >= width * every]
    assert whole and all(values[k] == pytest.approx(shown[k] - every * (width - 1) / 2, rel=1e-4) for k in whole)


def test_a_mean_leaves_out_what_is_no_number_and_a_gap_stays_one():
    seen = watch()
    for update in range(1, 61):  # means over two
        regression = math.nan if update % 4 == 1 else float(update)
        seen.follow(step(update, regression=regression, **({"r1": 0.0} if update > 30 else {"r1": 0.1})), 1.0)
    losses = seen.snapshot()["history"]["losses"]
    assert losses["regression"][:8] == [None, 2.0, 2.5, 3.5, None, 6.0, 6.5, 7.5]
    assert losses["r1"][31:] == [0.0] * 29  # a loss that has come to 0 is drawn as 0


def test_the_history_of_a_run_that_goes_on_is_taken_from_its_file(kit, host, tmp_path):
    settings = kit.config(updates=4, regression_updates=2, evaluate_every=2)
    whole = watch()
    for event in run.run(host, settings, tmp_path, kit.WORDS):
        whole.follow(event, 1.0)
    again = watch()
    again.recall(history.read_rows(tmp_path / training.HISTORY, 3))
    told, before = again.snapshot()["history"], whole.snapshot()["history"]
    assert told["update"] == [1, 2, 3]
    for kind in ("losses", "health"):
        assert told[kind] == {name: values[:3] for name, values in before[kind].items()}
    assert again.snapshot()["what"] == ""  # it tells where the run was, not where it is


def test_a_long_history_is_thinned_out_as_it_is_recalled():
    seen = watch()
    health = dict.fromkeys(RANGES, "1.0")
    seen.recall([{"update": str(u), "seconds": "0.1", "regression": "0.5"} | health for u in range(1, 5001)])
    told = seen.snapshot()["history"]
    assert len(told["update"]) == monitor.POINTS and told["update"][-1] == 5000
    assert set(told["losses"]) == {"regression"} and {u % 4 for u in told["update"]} == {0}
    seen.follow(step(5001), 1.0)
    assert seen.snapshot()["history"]["update"][-1] == 5000
    seen.follow(step(5004), 1.0)
    assert seen.snapshot()["history"]["update"][-1] == 5004


def test_no_file_is_no_history(tmp_path):
    assert history.read_rows(tmp_path / training.HISTORY, 100) == []


@pytest.mark.parametrize(
    "content", [b"", b"a,b\n1,2\n", b"update\nx\n", b"\xff\xfe\x00", b"update,loss\n1,many\n", b"{}"]
)
def test_a_file_of_other_content_is_no_history(tmp_path, content):
    (tmp_path / "history.csv").write_bytes(content)
    assert history.read_rows(tmp_path / "history.csv", 100) == []


def test_one_row_that_is_no_number_costs_no_other(tmp_path):
    (tmp_path / "history.csv").write_text("update,loss\n1,0.5\n2,many\n3,0.25\n")
    assert [row["update"] for row in history.read_rows(tmp_path / "history.csv", 100)] == ["1", "3"]
