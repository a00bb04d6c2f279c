"""One run at a time in a folder: between processes and threads, after SIGKILL, and where a folder knows no locks."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing

import pytest
from turbodistill.trainer.data import lock
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.lock import InUse, locked
from turbodistill.trainer.data.pairs import make_pairs
from turbodistill.trainer.loop.distill import Step
from turbodistill.trainer.run import run
from turbodistill.trainer.run.events import Finished

HOLDER = """
import sys, time
from pathlib import Path
from turbodistill.trainer.data.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_another_process_is_named_and_its_death_by_sigkill_frees_the_folder(tmp_path, other):
    told = rf"{tmp_path} is in use by process {other.pid} on {socket.gethostname()} since 20..-..-.. ..:..: wait until"
    with pytest.raises(InUse, match=told), locked(tmp_path):
        pass
    other.send_signal(signal.SIGKILL)
    assert other.wait() == -signal.SIGKILL
    with locked(tmp_path), pytest.raises(InUse, match=f"process {os.getpid()} on"), locked(tmp_path):
        pass


def test_threads_of_one_process_are_told_apart(tmp_path):
    found = []

    def ask():
        try:
            with locked(tmp_path):
                found.append("free")
        except DataError as error:
            found.append(str(error))

    def in_thread():
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    with locked(tmp_path):
        in_thread()
    in_thread()
    assert found[0].startswith(f"{tmp_path} is in use by process {os.getpid()} on") and found[1:] == ["free"]


def test_an_error_frees_it_and_a_lock_file_without_words_says_another_run(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        (tmp_path / lock.LOCK).write_text("[nothing")
        with pytest.raises(InUse, match="in use by another run: wait"), locked(tmp_path):
            pass


def test_a_folder_that_knows_no_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def unknown(_file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", unknown)
    with locked(tmp_path):
        assert "cannot be locked (No locks available): let no two runs use it at once" in caplog.text


def test_a_lock_file_that_was_removed_between_opening_and_locking_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    inner, calls = lock._lock, []

    def slow(file):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / lock.LOCK).unlink()  # by the owner before, in its end
        inner(file)

    monkeypatch.setattr(lock, "_lock", slow)
    with locked(tmp_path):
        with pytest.raises(InUse), locked(tmp_path):
            pass
        assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(kit, host, tmp_path):
    settings = kit.config(updates=3)
    with closing(run.run(host, settings, tmp_path / "run", kit.WORDS)) as events:
        next(event for event in events if isinstance(event, Step))
        before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
        with pytest.raises(InUse, match=f"run is in use by process {os.getpid()}"):
            kit.go(kit.conv_host(), settings, tmp_path / "run")
        assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
        assert isinstance(list(events)[-1], Finished)
    assert kit.updates(tmp_path / "run") == [1, 2, 3]
    kit.go(kit.conv_host(), kit.config(updates=4), tmp_path / "run")
    assert kit.updates(tmp_path / "run") == [1, 2, 3, 4]


def test_pairs_are_made_by_one_at_a_time_and_read_by_many(kit, host, tmp_path):
    settings = kit.config()
    with closing(make_pairs(host, settings, kit.WORDS, tmp_path)) as first:
        next(first)
        with pytest.raises(InUse, match="in use by process"):
            next(make_pairs(host, settings, kit.WORDS, tmp_path))
    assert len(kit.pairs(host, settings, tmp_path)) == 12
    with locked(tmp_path):  # all there: nothing is made
        assert [done for done, _ in make_pairs(host, settings, kit.WORDS, tmp_path)] == [12]
