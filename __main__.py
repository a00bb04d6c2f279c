"""`python -m turbodistill`, and the command `turbodistill`."""

import os
import signal
import sys


def main() -> int:
    """Run the command line; Ctrl-C ends it in one line, also while it is imported."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from .app.cli import main as command

    signal.signal(signal.SIGINT, before)
    return command()


def _leave(_number: int, _frame: object) -> None:
    """End at once: an exception in the middle of torch's import is a traceback, or is swallowed; nothing is begun."""
    os.write(2, b"turbodistill: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
