"""docs/webui-api.md: its routes and fields are the real ones, and its example runs."""

import dataclasses
import json
import re
import threading
import time
from pathlib import Path

import fastapi
import pytest
from turbodistill.page import api, job
from turbodistill.page.request import Request

uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'turbodistill[ui]'")
PAGE = (Path(__file__).parents[2] / "docs" / "webui-api.md").read_text(encoding="utf-8")


@pytest.fixture
def server(backend, port):
    """The routes on a real server."""
    app = fastapi.FastAPI()
    api.add_routes(app, backend)
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    begun = time.monotonic()
    while not running.started:
        assert time.monotonic() - begun < 30
        time.sleep(0.01)
    yield port
    running.should_exit = True
    thread.join(30)


def block(kind):
    return re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)[1]


def fields(section):
    """The names in the first column of a section's table."""
    rows = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_the_example_runs(toy, backend, server, capsys):
    pytest.importorskip("webuiapi", reason="needs webuiapi: pip install webuiapi")
    code = block("python").partition("made = ")[0].replace("port=7860", f"port={server}")
    code = code.replace("time.sleep(5)", "time.sleep(0.05)")
    code = code.replace('{"batch_size": 4, "gradient_checkpointing": True}', repr(toy.QUICK))
    exec(compile(code, "webui-api.md", "exec"), {})
    said = capsys.readouterr().out
    path = backend.students_folder() / "my-turbo.safetensors"
    assert path.exists() and f"done student: {path}; in a prompt: <lora:my-turbo:1>" in said


def test_a_mistake_is_raised_in_the_example_s_client(server):
    webuiapi = pytest.importorskip("webuiapi", reason="needs webuiapi: pip install webuiapi")
    client = webuiapi.WebUIApi(host="127.0.0.1", port=server)
    with pytest.raises(RuntimeError) as caught:
        client.custom_post("turbodistill/v1/distill", payload={"name": "a/b"})
    status, text = caught.value.args
    assert status == 400 and "name is 'a/b'" in json.loads(text)["error"]


def test_every_route_is_documented(backend):
    app = fastapi.FastAPI()
    api.add_routes(app, backend)
    routes = {
        f"{method} {r.path}" for r in app.routes if api.ROOT in r.path and ":path" not in r.path for method in r.methods
    }
    assert set(re.findall(r"^\| `((?:GET|POST) [^`?]+)` \|", PAGE, re.MULTILINE)) == routes


def test_every_field_of_a_request_is_documented():
    section = PAGE.partition("### A request")[2].partition("### A snapshot")[0]
    named = {
        name for row in re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert named == {f.name for f in dataclasses.fields(Request)}
    assert Request.from_dict(json.loads(block("json"))).config().updates == 1000


def test_the_fields_of_a_snapshot_are_real(toy, backend):
    begun = job.start(backend, Request(prompts=toy.PROMPTS, settings=toy.QUICK))
    begun.wait(60)
    section = PAGE.partition("### A snapshot")[2].partition("`GET run")[0]
    named = fields(section)
    assert len(named) >= 12 and named <= set(begun.snapshot())
