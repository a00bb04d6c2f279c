"""How a command is ended from outside: what is noted, what breaks off, and that handlers come back."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import turbodistill
from turbodistill.app import interrupt
from turbodistill.app.interrupt import interruptible
from turbodistill.demo import files

NUMBERS = [getattr(signal, name) for name in interrupt.ENDING if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def written(monkeypatch):
    """What is written to file descriptors; a terminal is never left."""
    found = []
    monkeypatch.setattr(interrupt.os, "write", lambda stream, text: found.append(text))
    monkeypatch.setattr(interrupt, "leave_terminal", lambda: None)
    return found


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_noted_and_its_handler_comes_back(number):
    before = signal.getsignal(number)
    with interruptible() as signals:
        signal.raise_signal(number)
        assert signals == [number]
    assert signal.getsignal(number) is before


def test_ctrl_c_again_breaks_off_unless_it_is_the_same_press(monkeypatch, written):
    with pytest.raises(KeyboardInterrupt), interruptible() as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert len(signals) == 3 and written == [interrupt.STOPPING]
        monkeypatch.setattr(interrupt, "GRACE", -1.0)
        signal.raise_signal(signal.SIGTERM)  # as services send it, some time after the first
        assert len(signals) == 4
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs a system with SIGHUP")
def test_under_nohup_a_closed_terminal_stays_unheard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert not signals
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_changed():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with interruptible() as signals:
            seen.append((signal.getsignal(signal.SIGINT), signals))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, [])]


# It goes on until it is told to end, and then writes to the terminal that is gone.
ON_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from pathlib import Path
from turbodistill.app.interrupt import interruptible
with interruptible() as signals:
    Path(sys.argv[1]).touch()
    while not signals:
        os.sched_yield()
    print("saved", flush=True)
    Path(sys.argv[2]).write_text(str(signals))
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a system with terminals")
def test_a_closed_terminal_ends_a_command_in_order(tmp_path):
    ours, theirs = os.openpty()
    ready, ended = tmp_path / "ready", tmp_path / "ended"
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, ready, ended],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    while not ready.exists():
        assert process.poll() is None
    os.close(ours)
    assert process.wait(60) == 0 and ended.read_text() == str([signal.SIGHUP.value])


# In torch's place: what comes while it is imported is swallowed, as in callbacks of its own.
SWALLOWS = """
import os, pathlib, time
pathlib.Path(os.environ["READY"]).touch()
try:
    while True:
        time.sleep(0.05)  # a pause could miss a signal that comes just before it
except BaseException:
    pass
raise ImportError("torch was imported to its end")
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a system where a program can send Ctrl-C to another")
def test_ctrl_c_while_torch_is_imported_ends_in_one_line(tmp_path):
    (tmp_path / "torch.py").write_text(SWALLOWS)
    ready, package = tmp_path / "ready", Path(turbodistill.__file__).parents[1]
    more = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(package)]), "READY": str(ready)}
    process = subprocess.Popen(
        [sys.executable, "-m", "turbodistill", "info", "x"],
        env=os.environ | more,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in a shell's background ignore it
    )
    while not ready.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "turbodistill: interrupted\n" and process.returncode == 130


@pytest.mark.skipif(os.name == "nt", reason="needs pipes that tell of their reader")
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(unbuffered):
    more = {"PYTHONPATH": str(Path(turbodistill.__file__).parents[1]), "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "turbodistill", "info", str(files.STUDENT)]
    done = subprocess.run(command, env=os.environ | more, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
