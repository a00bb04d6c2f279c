"""A stand-in of the Hugging Face hub's API on 127.0.0.1: what an upload asks of it, and what it is told."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "a" * 40


@dataclass
class Hub:
    """What was asked: `created` and `branches` as given, `files` by repository, branch and path, and every token."""

    url: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    stored: dict[str, bytes] = field(default_factory=dict)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, told: Any = None) -> None:
            body = json.dumps(told if told is not None else {}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def refused(self, owner: str) -> bool:
            status = {"nobody": 401, "stranger": 403, "broken": 500, "missing": 404}.get(owner)
            if status:
                self.answer(status, {"error": "no"})
            return bool(status)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].split("/")
            if not self.refused(path[3] if len(path) > 3 else ""):
                self.answer(200, {"id": "/".join(path[3:5]), "sha": SHA})

        def do_PUT(self) -> None:
            hub.stored[self.path.rpartition("/")[2]] = self.body()
            self.answer(200)

        def do_POST(self) -> None:
            content, path = self.body(), self.path.partition("?")[0].split("/")
            hub.tokens.add(self.headers.get("Authorization", ""))
            if path[1:] == ["api", "validate-yaml"]:
                return self.answer(200, {"errors": [], "warnings": []})
            if path[1:] == ["api", "repos", "create"]:
                told = json.loads(content)
                if not self.refused(told["organization"]):
                    hub.created.append(told)
                    self.answer(200, {"url": f"{hub.url}/{told['organization']}/{told['name']}"})
                return None
            if path[3:4] == ["info"] or "lfs" in path:
                objects = [
                    o | {"actions": {"upload": {"href": f"{hub.url}/store/{o['oid']}"}}}
                    for o in json.loads(content)["objects"]
                ]
                return self.answer(200, {"transfer": "basic", "objects": objects})
            _, _, _, owner, name, what, revision = path
            if self.refused(owner):
                return None
            if what == "branch":
                hub.branches.append(revision)
                return self.answer(201)
            if what == "preupload":
                files = [
                    {
                        "path": f["path"],
                        "shouldIgnore": False,
                        "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    }
                    for f in json.loads(content)["files"]
                ]
                return self.answer(200, {"files": files})
            return self.commit(f"{owner}/{name}", revision, content)

        def commit(self, repo: str, revision: str, content: bytes) -> None:
            lines = [json.loads(line) for line in content.splitlines()]
            hub.commits.append(lines[0]["value"] | {"repo": repo, "revision": revision, "asked": self.path})
            for line in lines[1:]:
                value = line["value"]
                whole = line["key"] == "file"
                kept = base64.b64decode(value["content"]) if whole else hub.stored[value["oid"]]
                hub.files[repo, revision, value["path"]] = kept
            told = {"commitUrl": f"{hub.url}/{repo}/commit/{SHA}", "commitOid": SHA, "success": True}
            if "create_pr=1" in self.path:
                told["pullRequestUrl"] = f"{hub.url}/{repo}/discussions/1"
            self.answer(200, told)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """The hub, as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
