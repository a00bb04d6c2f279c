"""`turbodistill ui`: pictures as you type or draw, and the training tab, without a WebUI."""

from __future__ import annotations

import argparse
import errno
import os
import secrets
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from .arguments import add_model, between, folder, model_options, place
from .interrupt import heard, leave_terminal

ADDRESS = "127.0.0.1"
PASSWORD = "TURBODISTILL_PASSWORD"
LONGEST = 8 << 20  # bytes of a message of the Live page
MOST_PORT = 65535


def command(commands: Any) -> None:
    """Add `ui` to the command line's subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "ui", help="pages in the browser: pictures as you type, distil"
    )
    parser.add_argument("--port", type=between(1, MOST_PORT), default=7860, help="port (default: 7860)")
    parser.add_argument(
        "--listen",
        metavar="ADDRESS",
        help="address for other machines too, such as 0.0.0.0; the pages then ask for a password, which is that of "
        f"{PASSWORD} in the environment, or a new one that is printed (default: {ADDRESS}, this machine alone)",
    )
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
        import websockets  # noqa: F401 - uvicorn takes it for the Live page, and says nothing where it is missing

        from ..page import job
        from . import server
    except ImportError as error:
        raise ImportError(f"the pages need {error.name}: pip install 'turbodistill[ui]'") from None

    address, password = args.listen or ADDRESS, _password(args.listen)
    with listen(args.port, address) as listening:
        app = server.make_app(args.model, args.student, args.out, password, **model_options(args))
        print(f"TurboDistill: http://{address}:{args.port} (Ctrl-C ends it)", flush=True)
        if password and not os.environ.get(PASSWORD):
            print(f"password: {password} (set {PASSWORD} for one of your own)", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: else nothing below would be done
        if hasattr(signal, "SIGHUP") and heard(signal.SIGHUP):  # Windows has none
            signal.signal(signal.SIGHUP, _hang_up)
        try:
            # A frame is a picture's file: packing it again would only take time.
            config = uvicorn.Config(
                app, log_level="warning", timeout_graceful_shutdown=1, ws_max_size=LONGEST, ws_per_message_deflate=False
            )
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


def _password(address: str | None) -> str:
    """What the pages ask for: "" on this machine alone."""
    if address is None:
        return ""
    return os.environ.get(PASSWORD) or secrets.token_urlsafe(9)


def listen(port: int, address: str = ADDRESS) -> socket.socket:
    """A socket that listens at the port, from before the model is loaded; raises OSError where it cannot be had."""
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
        made.bind((address, port))
        made.listen()
    except OSError as error:
        made.close()
        if error.errno in (errno.EADDRNOTAVAIL, None) or isinstance(error, socket.gaierror):
            raise OSError(
                f"address {address!r:.60} is none of this machine's: give one that it has, or 0.0.0.0 for all"
            ) from None
        taken = error.errno == errno.EADDRINUSE
        reason = "is taken, perhaps by another `turbodistill ui`" if taken else f"cannot be had ({error.strerror})"
        other = port + 1 if port < MOST_PORT else port - 1
        raise OSError(f"port {port} {reason}: choose another one, such as --port {other}") from None
    return made
