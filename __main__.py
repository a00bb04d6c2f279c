"""`python -m turbodistill`, and the command `turbodistill`."""

import os
import signal
import sys

BROKEN_PIPE = 128 + 13  # as a shell tells of SIGPIPE, which Windows has not


def main() -> int:
    """Run the command line; Ctrl-C ends it in one line, also while it is imported."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from .app.cli import main as command

    signal.signal(signal.SIGINT, before)
    try:
        try:
            return command()
        finally:
            if sys.stdout:  # None where it was closed
                sys.stdout.flush()  # what fails later, at the end of Python, is a traceback
    except OSError as error:
        seen = isinstance(error, BrokenPipeError)  # its reader has seen enough, such as `head`
        if not seen:
            print(f"turbodistill: {error}", file=sys.stderr)
        nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is left, which would fail again
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        return BROKEN_PIPE if seen else 1


def _leave(_number: int, _frame: object) -> None:
    """End at once: an exception in the middle of torch's import is a traceback, or is swallowed; nothing is begun."""
    os.write(2, b"turbodistill: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
