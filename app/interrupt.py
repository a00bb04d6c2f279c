"""How a command is ended before its time: by Ctrl-C, by a closed terminal, by whoever stops a service."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ENDING = ("SIGINT", "SIGTERM", "SIGHUP")  # of which Windows lacks the last
GRACE = 1.0  # seconds in which a second Ctrl-C is taken for the first: a key that bounces, or was held
STOPPING = b"\nstopping, and saving what is done; Ctrl-C again breaks off at once ...\n"


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Within, Ctrl-C, SIGTERM and SIGHUP are only noted: the list gets the signals, for the run to end by.

    A second Ctrl-C breaks off, if it comes more than GRACE seconds after the first signal. Only the main thread hears
    signals: in another one nothing is noted. What is ignored stays so, such as SIGHUP under nohup.
    """
    signals: list[int] = []
    first = 0.0

    def note(number: int, _frame: object) -> None:
        nonlocal first
        again, first = bool(signals), first if signals else time.monotonic()
        signals.append(number)
        if number not in (signal.SIGINT, signal.SIGTERM):
            leave_terminal()
        elif number == signal.SIGINT and not again:
            with suppress(OSError):  # not by print: it may be in the middle of another one
                os.write(2, STOPPING)
        elif number == signal.SIGINT and time.monotonic() - first > GRACE:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ENDING if main and hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    taken = [n for n, handler in before.items() if handler is not None and (n == signal.SIGINT or heard(n))]
    try:
        for number in taken:
            signal.signal(number, note)
        yield signals
    finally:
        for number in taken:
            signal.signal(number, before[number])


def heard(number: int) -> bool:
    """Whether a signal is not ignored."""
    return signal.getsignal(number) != signal.SIG_IGN


def leave_terminal() -> None:
    """Write no more to a terminal, since it may be gone: each line would be an error. Files and pipes stay."""
    for stream in (1, 2):
        with suppress(OSError):
            if os.name == "posix" and stat.S_ISCHR(os.fstat(stream).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)
