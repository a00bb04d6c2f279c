"""Routes to start, watch and end a distillation from a program; documented in docs/webui-api.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import fastapi
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from ..core.card import CardError, read_card
from ..trainer.checks import foreign
from ..trainer.config import ConfigError
from ..trainer.data.files import DataError
from . import job, limits, runs
from .backend import Backend
from .request import Request

ROOT = "/turbodistill/v1"
PICTURES = ("newest", "all", "none")
LONGEST = 16 << 20  # bytes of a request
PATIENCE = 600.0  # seconds that an estimate may take
METHODS = {
    **dict.fromkeys(("distill", "estimate", "stop", "cancel", "preview"), "POST"),
    **dict.fromkeys(("run", "students", "runs", "settings"), "GET"),
}


class OtherSite(ValueError):
    """A request of another site's page in the same browser."""


class OtherType(ValueError):
    """A request whose body is no JSON by its type."""


# The status of an answer, by what went wrong.
STATUS: tuple[tuple[type[Exception], int], ...] = (
    (job.NothingRuns, 404),
    (job.Busy, 409),
    (job.NoTraining, 409),
    (OtherSite, 403),
    (OtherType, 415),
    (ConfigError, 400),
    (DataError, 400),
    (OSError, 500),
)


def add_routes(app: fastapi.FastAPI, backend: Backend, dependencies: Sequence[Any] = ()) -> None:
    """Open the routes on the host's own server; `dependencies` are its authentication, as FastAPI's."""
    routes = Routes(backend)
    for path, method in METHODS.items():
        handler = _handler(getattr(routes, path))
        app.add_api_route(f"{ROOT}/{path}", handler, methods=[method], dependencies=dependencies)
    # Else a program that opens pages beside these would answer with one of them.
    others = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    app.add_api_route(
        ROOT + "/{path:path}", no_route, methods=others, dependencies=dependencies, include_in_schema=False
    )


def _handler(
    answer: Callable[[fastapi.Request], Awaitable[dict[str, Any]]],
) -> Callable[..., Awaitable[fastapi.Response]]:
    """The answer as JSON; a mistake as its words, with the status of its kind."""

    async def handle(request: fastapi.Request) -> fastapi.Response:
        try:
            if words := foreign(request.headers):
                raise OtherSite(words)
            return _json(await answer(request))
        except tuple(kind for kind, _ in STATUS) as error:
            status = next(status for kind, status in STATUS if isinstance(error, kind))
            return _json({"error": str(error)}, status)

    return handle


def _json(values: dict[str, Any], status: int = 200) -> fastapi.Response:
    """An answer in ASCII: names of files need not be UTF-8."""
    return fastapi.Response(json.dumps(values, allow_nan=False), status, media_type="application/json")


async def no_route(request: fastapi.Request) -> fastapi.Response:
    """The answer to a method that a route does not have, and to a path that is no route."""
    path = request.path_params["path"]
    if method := METHODS.get(path):
        answer = _json({"error": f"{path} is asked by {method}, not by {request.method}"}, 405)
        answer.headers["Allow"] = method
        return answer
    return _json({"error": f"there is no route {path[:100]!r}: known are {', '.join(METHODS)}"}, 404)


class Routes:
    """What each route answers."""

    def __init__(self, backend: Backend):
        self.backend = backend

    async def distill(self, request: fastapi.Request) -> dict[str, Any]:
        """Begin a distillation; its first snapshot."""
        asked = Request.from_dict(await _body(request))
        begun = await run_in_threadpool(job.start, self.backend, asked)
        return await run_in_threadpool(begun.snapshot)

    async def estimate(self, request: fastapi.Request) -> dict[str, Any]:
        """What memory a training will take, and what time and disk its teacher pairs."""
        asked = Request.from_dict(await _body(request) | {"kind": "estimate"})
        begun = await run_in_threadpool(job.start, self.backend, asked)
        await run_in_threadpool(begun.wait, PATIENCE)
        if (found := begun.estimate) is None:
            snapshot = begun.snapshot()
            raise ConfigError(snapshot["error"] or f"nothing was measured: the estimate is {snapshot['state']}")
        memory = dataclasses.asdict(found.memory) | {"total": found.memory.total, "free": begun.monitor.free}
        pairs = {"count": found.pairs, "on_disk": found.on_disk, "seconds": found.seconds}
        return {"memory": memory, "pairs": pairs, "words": begun.result}

    async def run(self, request: fastapi.Request) -> dict[str, Any]:
        """The snapshot of what runs, or of what ran last."""
        pictures = request.query_params.get("pictures", "newest")
        if pictures not in PICTURES:
            raise ConfigError(f"pictures is {pictures!r}: use one of {', '.join(PICTURES)}")
        if (now := job.current()) is None:
            raise job.NothingRuns("nothing has run since the program was started")
        snapshot = await run_in_threadpool(now.snapshot)
        if pictures == "none":
            return snapshot | {"previews": [], "pictures": []}
        return snapshot | {"previews": snapshot["previews"][-1:]} if pictures == "newest" else snapshot

    async def stop(self, _request: fastapi.Request) -> dict[str, Any]:
        """End the training after this update, and keep the best student."""
        job.must_run().stop()
        return {}

    async def cancel(self, _request: fastapi.Request) -> dict[str, Any]:
        """Break off, with everything saved."""
        job.must_run().cancel()
        return {}

    async def preview(self, _request: fastapi.Request) -> dict[str, Any]:
        """Make a preview after this update."""
        job.must_run().preview()
        return {}

    async def students(self, _request: fastapi.Request) -> dict[str, Any]:
        """The students here, with their cards."""
        return {"students": await run_in_threadpool(_students, self.backend.students_folder())}

    async def runs(self, _request: fastapi.Request) -> dict[str, Any]:
        """The runs that were asked for here."""
        running = job.running()
        name = running.request.name if running else ""
        found = await run_in_threadpool(runs.listed, self.backend.runs_folder(), name)
        return {"runs": [run.to_dict() for run in found]}

    async def settings(self, _request: fastapi.Request) -> dict[str, Any]:
        """Every setting, and the built-in prompts."""
        return {"settings": schema(self.backend), "prompts": list(self.backend.prompts())}


def schema(backend: Backend) -> list[dict[str, Any]]:
    """Every setting there is here: its name, type, default, group, help, bounds and choices; `value` is the page's."""
    shown = []
    for name, about in limits.offered(backend.limits).items():
        default = limits.FIELDS[name].default
        value = backend.settings.get(name, default)
        shown.append({"name": name, "type": type(default).__name__, "default": default, **about, "value": value})
    return shown


async def _body(request: fastapi.Request) -> dict[str, Any]:
    """The JSON object of a request, {} for an empty one; raises ConfigError for anything else."""
    text = bytearray()
    try:
        async for chunk in request.stream():
            text += chunk
            if len(text) > LONGEST:
                raise ConfigError(f"the request is longer than {LONGEST >> 20} MB: name a file of prompts instead")
    except ClientDisconnect:
        raise ConfigError("the request broke off: send it whole") from None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if text and kind != "application/json":  # a form of another site can send anything else
        raise OtherType(f"the request is {kind or 'of no type'}: send it as application/json")
    try:
        values = json.loads(text or b"{}")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the request is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError("the request is no JSON object: send {...}")
    return values


def _students(folder: Path) -> list[dict[str, Any]]:
    """The students of ours in a folder and those below, by name, with what they say of themselves."""
    found = []
    for path in sorted(folder.rglob("*.safetensors")) if folder.is_dir() else ():
        try:
            card = read_card(path)
        except (CardError, OSError):
            continue  # somebody else's
        name = path.relative_to(folder).with_suffix("").as_posix()
        found.append({"name": name, "file": str(path), "card": dataclasses.asdict(card), "words": card.in_words()})
    return found
