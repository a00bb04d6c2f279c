"""The pages and the API of `turbodistill ui` as one application."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..demo.files import STUDENT
from ..page import api, generate, tab
from ..trainer.checks import foreign
from ..trainer.pipeline.load import load_model
from .backend import EmbeddedBackend
from .live.routes import add_routes as add_live
from .password import Password

NAMES = ["127.0.0.1", "localhost"]  # by which a browser calls it; any page could by a name of its own
LIVE = (
    '<p><a href="/live" target="_blank">Open the Live page</a>: pictures that follow what you type, draw or show to a '
    "camera, one step each.</p>"
)


class OwnPages:
    """Refuses what another site's page asks for, gradio's own routes included; a link from there may open ours."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self.app
        if scope["type"] != "lifespan":
            headers = Headers(scope=scope)
            linked = scope.get("method") == "GET" and headers.get("sec-fetch-dest") == "document"  # in no frame
            if not linked and (words := foreign(headers)):
                answer = JSONResponse({"error": words}, 403)
        await answer(scope, receive, send)


def make_app(model: Path | None, student: Path | None, folder: Path, password: str = "", **how: Any) -> fastapi.FastAPI:
    """A model's pages, with what they make in `folder`; `how` goes to `load_model`.

    With a `password` other machines may reach them. Raises ModelError, or CardError for the student.
    """
    shipped = {student.stem: student} if student else {} if model else {"embedded": STUDENT}
    backend = EmbeddedBackend(load_model(model, **how), folder.resolve(), shipped, model is None, bool(password))
    for path in shipped.values():
        backend.generator.make(path, "", [0], 1)  # what does not fit is told now
    app = fastapi.FastAPI(title="TurboDistill", docs_url=None, redoc_url=None)  # their pages load what is not ours
    app.add_middleware(OwnPages)
    if password:
        app.add_middleware(Password, password=password)
    else:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=NAMES)
    api.add_routes(app, backend)
    add_live(app, backend.generator, backend.students, backend.example, lambda path: _options(model, path))
    options = {"ssr_mode": False, "footer_links": [], "show_api": False, "run_history": False}
    known = inspect.signature(gr.mount_gradio_app).parameters
    return gr.mount_gradio_app(app, pages(backend), path="/", **{k: v for k, v in options.items() if k in known})


def _options(model: Path | None, student: Path) -> str:
    """The options of `turbodistill sample` with which it makes the same pictures."""
    given = {"--model": model, "--student": None if student == STUDENT else student}
    return " ".join(f"{name} {shlex.quote(str(path))}" for name, path in given.items() if path)


def pages(backend: EmbeddedBackend) -> gr.Blocks:
    """The generate page and the training tab, beside each other, and the way to the Live page."""
    with gr.Blocks(analytics_enabled=False, title="TurboDistill") as blocks, gr.Tabs():
        with gr.Tab("Generate"):
            generate.add_components(backend.generator, backend.students, backend.example, blocks)
        with gr.Tab("Distil"):
            tab.add_components(backend, blocks)
        with gr.Tab("Live"):
            gr.HTML(LIVE)
    return blocks
