"""The server as nodes see it: messages to the page, routes, the user's Cancel, the progress bar, folders."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace

# --- aiohttp.web ---


class Response:
    def __init__(self, *, status=200, text=""):
        self.status, self.text = status, text


def json_response(data, *, status=200):
    return Response(status=status, text=told(data))


def told(data):
    """What a browser can read: no object but JSON's, and no NaN."""
    return json.dumps(data, allow_nan=False)


# --- server ---


class Routes:
    """aiohttp's table of routes, and the page that asks."""

    def __init__(self):
        self.known = {}

    def route(self, method, path):
        pattern = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path)))

        def keep(handler):
            self.known[method, pattern] = handler
            return handler

        return keep

    def ask(self, method, path, **headers):
        """Status and JSON of the answer."""
        for (known, pattern), handler in self.known.items():
            if known == method and (found := pattern.fullmatch(path)):
                answer = asyncio.run(handler(SimpleNamespace(match_info=found.groupdict(), headers=headers)))
                return answer.status, json.loads(answer.text) if answer.text else None
        return 404, None


class PromptServer:
    instance: PromptServer

    def __init__(self):
        self.routes, self.sent = Routes(), []

    def send_sync(self, event, data, sid=None):
        self.sent.append((event, json.loads(told(data))))


PromptServer.instance = PromptServer()

# --- comfy.model_management, comfy.utils ---


class InterruptProcessingException(Exception):
    pass


class Interrupt:
    """The user's Cancel, until somebody looks."""

    pressed = False


def interrupt_current_processing(value=True):
    Interrupt.pressed = value


def throw_exception_if_processing_interrupted():
    if Interrupt.pressed:
        Interrupt.pressed = False
        raise InterruptProcessingException


class ProgressBar:
    """The newest bars leave out what is not half a percent more than they sent last, but for their first and their end.

    `sent` is what pages were told, of all bars: (value, total).
    """

    sent: list[tuple[int, int]] = []  # noqa: RUF012 - of all

    def __init__(self, total, node_id=None):
        self.total, self.last = total, -1

    def update_absolute(self, value, total=None, preview=None):
        self.total = self.total if total is None else total
        value = min(value, self.total)
        if self.last < 0 or value >= self.total or value - self.last >= self.total / 200:
            self.last = value
            self.sent.append((value, self.total))


# --- folder_paths ---

FOLDERS: dict[str, Path] = {}  # of models
MORE: dict[str, list[Path]] = {}  # of extra_model_paths.yaml, with is_default: before them
PLACES: dict[str, Path] = {}  # input, output, temp
folder_names_and_paths: dict[str, tuple[list[str], set[str]]] = {}  # those of extra_model_paths.yaml
filename_list_cache: dict[str, list[str]] = {}  # the nodes drop what they have made stale; nothing is kept here


def get_directory(place):
    return lambda: str(PLACES[place])


def get_folder_paths(folder_name):
    return [str(place) for place in (*MORE.get(folder_name, ()), FOLDERS[folder_name])]


def get_filename_list(folder_name):
    root = FOLDERS.get(folder_name)
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*.*") if p.is_file()) if root else []


def get_full_path(folder_name, filename):
    root = FOLDERS.get(folder_name, Path())
    path = (root / filename).resolve()
    return str(path) if path.is_file() and path.is_relative_to(root.resolve()) else None
