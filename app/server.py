"""The pages and the API of `turbodistill ui` as one application."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..demo.files import STUDENT
from ..page import api, live, tab
from ..trainer.checks import foreign
from ..trainer.pipeline.load import load_model
from .backend import EmbeddedBackend

NAMES = ["127.0.0.1", "localhost"]  # by which a browser calls it; any page could by a name of its own


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


def make_app(model: Path | None, student: Path | None, folder: Path, **how: Any) -> fastapi.FastAPI:
    """A model's pages, with what they make in `folder`; `how` goes to `load_model`.

    Raises ModelError, or CardError for the student.
    """
    shipped = {student.stem: student} if student else {} if model else {"embedded": STUDENT}
    backend = EmbeddedBackend(load_model(model, **how), folder.resolve(), shipped, own=model is None)
    for path in shipped.values():
        backend.generator.make(path, "", [0], 1)  # what does not fit is told now
    app = fastapi.FastAPI(title="TurboDistill", docs_url=None, redoc_url=None)  # their pages load what is not ours
    app.add_middleware(OwnPages)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=NAMES)
    api.add_routes(app, backend)
    options = {"ssr_mode": False, "footer_links": [], "show_api": False, "run_history": False}
    known = inspect.signature(gr.mount_gradio_app).parameters
    return gr.mount_gradio_app(app, pages(backend), path="/", **{k: v for k, v in options.items() if k in known})


def pages(backend: EmbeddedBackend) -> gr.Blocks:
    """The generate page and the training tab, beside each other."""
    with gr.Blocks(analytics_enabled=False, title="TurboDistill") as blocks, gr.Tabs():
        with gr.Tab("Generate"):
            live.add_components(backend.generator, backend.students, backend.example, blocks)
        with gr.Tab("Distil"):
            tab.add_components(backend, blocks)
    return blocks
