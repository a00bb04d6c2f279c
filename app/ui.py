"""`turbodistill ui`: pictures as you type and the training tab, on this machine alone, without a WebUI."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from pathlib import Path
from typing import Any

from .arguments import add_model, between, folder, model_options, place
from .interrupt import heard, leave_terminal

ADDRESS = "127.0.0.1"


def command(commands: Any) -> None:
    """Add `ui` to the command line's subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "ui", help="pages in the browser: pictures as you type, distil"
    )
    parser.add_argument("--port", type=between(1, 65535), default=7860, help=f"port on {ADDRESS} (default: 7860)")
    add_model(parser)
    parser.add_argument("--student", type=place, help="student file (default: the embedded model's)")
    parser.add_argument(
        "--out", type=folder, default=Path("runs/ui"), help="folder for runs, pairs and students (default: runs/ui)"
    )
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Serve the pages until Ctrl-C; a distillation that runs then is cancelled, with everything saved."""
    check_port(args.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nobody is told that it runs
    try:
        import uvicorn

        from ..page import job
        from . import server
    except ImportError as error:
        raise ImportError(f"the pages need {error.name}: pip install 'turbodistill[ui]'") from None

    app = server.make_app(args.model, args.student, args.out, **model_options(args))
    print(f"TurboDistill: http://{ADDRESS}:{args.port} (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: else nothing below would be done
    if hasattr(signal, "SIGHUP") and heard(signal.SIGHUP):  # Windows has none
        signal.signal(signal.SIGHUP, _hang_up)
    try:
        uvicorn.run(app, host=ADDRESS, port=args.port, log_level="warning", timeout_graceful_shutdown=1)
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


def check_port(port: int) -> None:
    """Raise OSError, in words, for a port that cannot be had."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
            probe.bind((ADDRESS, port))
    except (OSError, OverflowError) as error:
        raise OSError(f"port {port} cannot be had ({error}): give another one by --port") from None
