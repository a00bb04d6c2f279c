"""Another site's page: what it can send to a server of ours from the same browser, and what it is answered."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

# All ways in which a page can send without being asked by the other server whether it may, and one in which it is.
ATTACK = """
async function attack(url, asked) {
  const all = [];
  const soon = (done) => setTimeout(done, 4000);
  const fetched = (to, options) => all.push(fetch(to, {credentials: "include", ...options}).catch(() => {}));
  const element = (kind, about) => all.push(new Promise((done) => {
    const made = document.createElement(kind);
    made.onload = made.onerror = done;
    soon(done);
    document.body.append(Object.assign(made, about));
  }));
  let number = 0;
  for (const [path, body] of asked) {
    const to = url + path, text = JSON.stringify(body);
    for (const type of ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
      fetched(to, {method: "POST", mode: "no-cors", body: new Blob([text], {type})});
    fetched(to, {method: "POST", mode: "no-cors"});
    fetched(to, {method: "POST", mode: "no-cors", body: text, referrerPolicy: "no-referrer", keepalive: true});
    fetched(to, {method: "POST", body: text, headers: {"Content-Type": "application/json"}});
    fetched(to, {mode: "no-cors"});
    navigator.sendBeacon(to, new Blob([text], {type: "text/plain"}));
    for (const kind of ["img", "script", "iframe"]) element(kind, {src: to});
    const form = document.createElement("form"), target = `frame${number++}`;
    Object.assign(form, {action: to, method: "post", enctype: "text/plain", target});
    form.append(Object.assign(document.createElement("input"), {name: text.slice(0, -1) + ',"x":"', value: '"}'}));
    document.body.append(form);
    element("iframe", {name: target});
    form.submit();
    all.push(new Promise((done) => {
      const socket = new WebSocket(to.replace("http", "ws"));
      socket.onmessage = (told) => socket.send(told.data.includes("send_data") ? text : JSON.stringify(body));
      socket.onclose = socket.onerror = done;
      soon(done);
    }));
  }
  await Promise.all(all);
}
"""
PAGE = """<!doctype html><title>foreign</title><body><script>%s
const [url, asked] = %s;
if (window === top) {
  const frame = document.createElement("iframe");
  frame.sandbox = "allow-scripts allow-forms";  // its origin is null
  frame.srcdoc = document.documentElement.outerHTML;
  const inner = new Promise((done) => addEventListener("message", done, {once: true}));
  document.body.append(frame);
  Promise.all([inner, attack(url, asked)]).then(() => { document.title = "done"; });
} else attack(url, asked).then(() => parent.postMessage("done", "*"));
</script>"""


class Answer(NamedTuple):
    """What the server said to one of the page's requests."""

    method: str
    path: str
    status: int


def attack(browser: Any, url: str, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[Answer]:
    """Open a page on other ports and names, which sends each body to each path of `url` in all ways; the answers."""
    page = (PAGE % (ATTACK, json.dumps([url, list(asked)]).replace("</", "<\\/"))).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found: list[Answer] = []
    try:
        for name in ("127.0.0.1", "localhost"):  # the same site on another port, and another site
            opened = browser.new_page()
            opened.on("response", lambda r: found.append(Answer(r.request.method, r.url.removeprefix(url), r.status)))
            opened.goto(f"http://{name}:{server.server_address[1]}/")
            opened.wait_for_function("document.title === 'done'", timeout=60_000)
            opened.close()
    finally:
        server.shutdown()
        server.server_close()
    paths = {path for path, _ in asked}
    return [answer for answer in found if answer.path.partition("?")[0] in paths]


def event(config: dict[str, Any], button: str, values: dict[str, Any], prefix: str) -> list[tuple[str, dict[str, Any]]]:
    """What a gradio's page of this config would send, and where to, for a click on the button of this elem_id.

    Every input keeps its first value but those in `values`, by their elem_id.
    """
    made = {component["id"]: component["props"] for component in config["components"]}
    (number,) = (
        k for k, each in enumerate(config["dependencies"])
        if any(made.get(t[0] if isinstance(t, list) else t, {}).get("elem_id") == button for t in each["targets"])
    )  # fmt: skip
    dependency = config["dependencies"][number]
    given = [made[i] for i in dependency["inputs"]]
    data = [values.get(props.get("elem_id"), props.get("value")) for props in given]
    body = {"data": data, "fn_index": dependency.get("id", number), "session_hash": "foreign", "event_data": None}
    return [(f"{prefix}/{path}", body) for path in ("run/predict", "api/predict", "queue/join", "call/predict")]
