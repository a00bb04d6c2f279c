"""A password before all pages and routes of a server that other machines reach."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "turbodistill"
LOGIN = "/turbodistill-login"
LONGEST = 4096  # bytes of a form
PAUSE = 1.0  # seconds that a wrong guess takes
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>TurboDistill</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>:root {{ color-scheme: light dark }}
body {{ font: 16px system-ui, sans-serif; display: grid; place-content: center; min-height: 90vh; gap: 12px }}
form {{ display: flex; gap: 8px }} input, button {{ font: inherit; padding: 8px 12px }}</style>
<h1>TurboDistill</h1><p>{words}</p>
<form method="post" action="{login}"><input type="password" name="password" aria-label="Password" autofocus>
<button>Open</button></form></html>"""


class Password:
    """Lets those through who have given the password in this browser, until the server ends."""

    def __init__(self, app: ASGIApp, password: str):
        self.app, self.password, self.token = app, password, secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._knows(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"] == LOGIN and scope["method"] == "POST":
            answer = await self._login(Request(scope, receive))
        elif scope["type"] == "http" and "text/html" in Headers(scope=scope).get("accept", ""):
            answer = _page("This server asks for its password.")
        else:
            answer = JSONResponse({"error": "this server asks for its password: open its page in a browser"}, 401)
        await answer(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        try:
            cookie = SimpleCookie(Headers(scope=scope).get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.token.encode())

    async def _login(self, request: Request) -> Response:
        form = bytearray()
        async for chunk in request.stream():
            form += chunk
            if len(form) > LONGEST:
                return _page("This is no password.")
        given = parse_qs(form.decode("utf-8", "replace")).get("password", [""])[0]
        if not hmac.compare_digest(given.encode(), self.password.encode()):
            await asyncio.sleep(PAUSE)
            return _page("This is not the password.")
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
        return answer


def _page(words: str) -> Response:
    return HTMLResponse(PAGE.format(words=words, login=LOGIN), 401)
