"""The Live page, and its websocket: a picture of the newest input, as often as the model goes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fastapi
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.websockets import WebSocket

from ...generate.generator import Generator
from .clip import LONGEST, clip_of
from .hub import Full, Hub, Viewer
from .messages import asked, packed

PAGE = Path(__file__).parent / "static"
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
FILES = {"/live" if path.suffix == ".html" else f"/live/{path.name}": path for path in sorted(PAGE.glob("*.*"))}
BUSY = 1013  # websocket: try again later


def add_routes(
    app: fastapi.FastAPI,
    generator: Generator,
    students: Callable[[], dict[str, Path]],
    example: str,
    options: Callable[[Path], str],
) -> Hub:
    """Open the page at /live, its files, and its websocket; they have the guards of the whole application.

    `options` are those of `turbodistill sample` that choose the model and a student.
    """
    hub = Hub(generator, students)

    for name, file in FILES.items():
        app.add_api_route(name, partial(_file, file), methods=["GET"], include_in_schema=False)

    async def about() -> Response:
        width, height = generator.host.resolution
        told = {"model": generator.host.name, "width": width, "height": height, "example": example}
        return JSONResponse(told | {"students": {name: options(path) for name, path in students().items()}})

    app.add_api_route("/live/about", about, methods=["GET"], include_in_schema=False)

    async def clip(request: fastapi.Request) -> Response:
        message = bytearray()
        async for chunk in request.stream():
            message += chunk
            if len(message) > LONGEST:
                return JSONResponse({"error": f"a clip has at most {LONGEST >> 20} MB: choose fewer seconds"}, 413)
        try:
            file, kind = await asyncio.to_thread(clip_of, bytes(message))
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        return Response(file, media_type=f"{'video' if kind == 'mp4' else 'image'}/{kind}")

    app.add_api_route("/live/clip", clip, methods=["POST"], include_in_schema=False)

    @app.websocket("/live/frames")
    async def frames(socket: WebSocket) -> None:
        await socket.accept()
        try:
            viewer = hub.join(asyncio.get_running_loop())
        except Full as error:
            await socket.close(BUSY, str(error)[:120])
            return
        inbox = Newest()
        tasks = [asyncio.create_task(work) for work in (_send(socket, viewer), _read(inbox, hub, viewer))]
        try:
            while (message := await socket.receive())["type"] == "websocket.receive":
                inbox.put(message.get("bytes") or b"")
        finally:
            hub.leave(viewer)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return hub


async def _file(path: Path) -> Response:
    kind = f"{KINDS[path.suffix]}; charset=utf-8"
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})


class Newest:
    """The newest message that came, in place of any before: reading one may take longer than the next one's way."""

    def __init__(self) -> None:
        self._message, self._came = b"", asyncio.Event()

    def put(self, message: bytes) -> None:
        self._message = message
        self._came.set()

    async def take(self) -> bytes:
        await self._came.wait()
        self._came.clear()
        return self._message


async def _send(socket: WebSocket, viewer: Viewer) -> None:
    """Send the newest frame whenever the one before is gone."""
    while True:
        await socket.send_bytes(await viewer.next())


async def _read(inbox: Newest, hub: Hub, viewer: Viewer) -> None:
    """Hand on what a viewer asks for; what cannot be used is told, and the rest goes on."""
    resolution = hub.generator.host.resolution
    while True:
        message = await inbox.take()
        try:
            hub.ask(viewer, await asyncio.to_thread(asked, message, resolution))
        except ValueError as error:
            viewer.offer(packed({"error": str(error)}))
