"""A stand-in of the hub's API on this machine: models, files, revisions, private and gated ones."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"commit").hexdigest()
# A repository's name -> what the hub answers for it, to all or to those without the token.
REFUSED = {
    "me/gated": (403, "GatedRepo"),
    "me/unknown": (404, "RepoNotFound"),
    "me/forbidden": (403, ""),
    "me/broken": (500, ""),
}
TOKEN = "hf_secret"


class Hub(BaseHTTPRequestHandler):
    """Serves the folders that `server.models` names; `server.asked` is what it was asked for."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        private = name == "me/private" and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if name in REFUSED or private or name not in self.server.models:
            code, kind = REFUSED.get(name, (401, "RepoNotFound"))
            return self.answer(code, b"{}", {"X-Error-Code": kind} if kind else {})
        folder = self.server.models[name]
        revision = parts[5] if parts[0] == "api" and len(parts) > 5 else parts[3] if parts[0] != "api" else "main"
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        if parts[0] == "api" and "tree" in parts:
            rows = [
                {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": self.tag(folder / f)}
                for f in files
            ]
            return self.answer(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})
        if parts[0] == "api":
            about = {"_id": "1", "id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
            return self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        file = folder / "/".join(parts[4:])
        if not file.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.answer(200, file.read_bytes(), {"ETag": f'"{self.tag(file)}"', "X-Repo-Commit": COMMIT})

    def tag(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def answer(self, code, body, headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def running(models: dict[str, Path]):
    """The server and its address, until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.models, server.asked = models, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
