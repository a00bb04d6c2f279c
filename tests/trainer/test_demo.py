"""The demonstration's trainings, each a command of its own: they share pairs, end as told, and fail together."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image
from turbodistill.app import demo
from turbodistill.core.card import read_card
from turbodistill.demo.files import PROMPTS
from turbodistill.trainer.config import Config
from turbodistill.trainer.data.pairs import make_pairs
from turbodistill.trainer.data.prompts import read_prompts
from turbodistill.trainer.pipeline.load import load_model
from turbodistill.trainer.run import training
from turbodistill.trainer.run.events import Interrupted

TINY = Config(
    rank=2,
    pairs=16,
    pair_steps=1,
    batch_size=4,
    regression_updates=1,
    head_channels=8,
    updates=2,
    evaluate_every=0,
    preview_every=0,
)


@pytest.mark.slow
def test_trainings_apart_are_commands_that_share_their_pairs(tmp_path):
    out = tmp_path / "runs with a space"
    pictures = out / demo.PICTURES
    pictures.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(pictures / "red.png")
    (pictures / "red.txt").write_text("red")
    judged = TINY.replace(positives="real")
    list(make_pairs(load_model(), TINY, read_prompts(PROMPTS), out / demo.PAIRS))  # as the demonstration does
    demo.train_apart({"student": judged, "regression": TINY.replace(adversarial_weight=0.0)}, out, [])
    assert (out / "student" / "images").exists() and not (out / "regression" / "images").exists()
    assert read_card(out / "student" / training.BEST).training["adversarial_weight"] == 1.0
    assert read_card(out / "regression" / training.BEST).training["adversarial_weight"] == 0.0
    assert list((out / demo.PAIRS).glob("*.safetensors")) and not (out / "student" / demo.PAIRS).exists()


@pytest.fixture
def stood_in(monkeypatch):
    """Names of trainings apart -> scripts that run in their place, with arguments."""
    popen = subprocess.Popen

    def stand_in(**scripts):
        def start(command, **how):
            script, *arguments = scripts[command[command.index("--title") + 1]]
            return popen([sys.executable, "-c", script, *map(str, arguments)], **how)

        monkeypatch.setattr(demo.subprocess, "Popen", start)

    return stand_in


FAILS = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.05)
sys.exit(1)
"""
# It saves when it is told to end, as `turbodistill distill` does: test_interrupting_saves_and_says_how_to_go_on.
WORKS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[2]).touch()
    sys.exit(143)
"""


def test_if_a_training_apart_fails_the_other_is_ended_and_it_is_told(tmp_path, stood_in):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    stood_in(student=(FAILS, ready), regression=(WORKS, ready, saved))
    with pytest.raises(demo.Failed, match="status 1"):
        demo.train_apart({"student": TINY, "regression": TINY}, tmp_path, [])
    assert saved.exists()


def test_trainings_apart_end_and_save_as_soon_as_they_are_told_to(tmp_path, stood_in):
    ready, saved, stop = tmp_path / "ready", tmp_path / "saved", []
    stood_in(student=(WORKS, ready, saved))
    threading.Timer(0.0, lambda: _when(ready.exists, stop)).start()
    with pytest.raises(Interrupted):
        demo.train_apart({"student": TINY}, tmp_path, stop)
    assert saved.exists()


# A training that does not hear the first of its signals.
DEAF = """
import pathlib, signal, sys, time
heard = []
def hear(*_):
    heard.append(1)
    if len(heard) > 1:
        sys.exit(143)
signal.signal(signal.SIGTERM, hear)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def test_a_training_that_did_not_hear_is_told_again(tmp_path, monkeypatch, stood_in):
    ready, stop = tmp_path / "ready", []
    stood_in(student=(DEAF, ready))
    monkeypatch.setattr(demo, "PATIENCE", 0.5)
    threading.Timer(0.0, lambda: _when(ready.exists, stop)).start()
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        demo.train_apart({"student": TINY}, tmp_path, stop)
    assert time.monotonic() - begun < 50


def test_a_training_that_the_system_kills_is_told(tmp_path, stood_in):
    stood_in(student=("import os, signal; os.kill(os.getpid(), signal.SIGKILL)",))
    with pytest.raises(demo.Failed, match=r"killed by the system \(SIGKILL\), probably since memory was short"):
        demo.train_apart({"student": TINY}, tmp_path, [])


# A demonstration whose training stands in, until it is killed; argv: of the training.
PARENT = """
import subprocess, sys, time
from turbodistill.app.demo import _end_with_parent
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], start_new_session=True, preexec_fn=_end_with_parent)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose processes can end with their parent")
def test_trainings_apart_save_when_the_demonstration_is_killed(tmp_path):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, WORKS, ready, saved])
    _when(ready.exists, [])
    parent.kill()
    parent.wait()
    _when(saved.exists, [])
    assert saved.exists()


def _when(true, stop, seconds=120):
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.05)
    stop.append(signal.SIGINT)
