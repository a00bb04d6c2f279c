"""`turbodistill ui`: pictures as you type and the training tab, on this machine alone, without a WebUI."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from .arguments import add_model, between, folder, model_options, place
from .interrupt import heard, leave_terminal

ADDRESS = "127.0.0.1"
MOST_PORT = 65535


def command(commands: Any) -> None:
    """Add `ui` to the command line's subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "ui", help="pages in the browser: pictures as you type, distil"
    )
    parser.add_argument("--port", type=between(1, MOST_PORT), default=7860, help=f"port on {ADDRESS} (default: 7860)")
    add_model(parser)
    parser.add_argument("--student", type=place, help="student file (default: the embedded model's)")
    parser.add_argument(
        "--out", type=folder, default=Path("runs/ui"), help="folder for runs, pairs and students (default: runs/ui)"
    )
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Serve the pages until Ctrl-C; a distillation that runs then is cancelled, with everything saved."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nobody is told that it runs
    try:
        import uvicorn

        from ..page import job
        from . import server
    except ImportError as error:
        raise ImportError(f"the pages need {error.name}: pip install 'turbodistill[ui]'") from None

    with listen(args.port) as listening:
        app = server.make_app(args.model, args.student, args.out, **model_options(args))
        print(f"TurboDistill: http://{ADDRESS}:{args.port} (Ctrl-C ends it)", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: else nothing below would be done
        if hasattr(signal, "SIGHUP") and heard(signal.SIGHUP):  # Windows has none
            signal.signal(signal.SIGHUP, _hang_up)
        try:
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
            with suppress(KeyboardInterrupt):  # Ctrl-C is how it ends
                uvicorn.Server(config).run(sockets=[listening])
        finally:
            if left := job.running():
                print("cancelling the distillation: Resume goes on from there", flush=True)
                left.cancel()
                left.wait()
    return 0


def _hang_up(_number: int, _frame: object) -> None:
    """A closed terminal is a SIGTERM, and nothing is written to it any more."""
    leave_terminal()
    signal.raise_signal(signal.SIGTERM)


def listen(port: int) -> socket.socket:
    """A socket that listens at the port, from before the model is loaded; raises OSError where it cannot be had."""
    made = socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
        made.bind((ADDRESS, port))
        made.listen()
    except OSError as error:
        made.close()
        taken = error.errno == errno.EADDRINUSE
        reason = "is taken, perhaps by another `turbodistill ui`" if taken else f"cannot be had ({error.strerror})"
        other = port + 1 if port < MOST_PORT else port - 1
        raise OSError(f"port {port} {reason}: choose another one, such as --port {other}") from None
    return made
