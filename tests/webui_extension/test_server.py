"""`turbodistill ui` without a browser: its command, its application, and who may ask it."""

import argparse
import builtins
import socket

import pytest
from turbodistill.app import cli, ui
from turbodistill.core.card import CardError
from turbodistill.demo.files import MODEL
from turbodistill.page import job
from turbodistill.trainer.pipeline.host import ModelError

pytest.importorskip("gradio", reason="needs gradio: pip install 'turbodistill[ui]'")
pytest.importorskip("diffusers", reason="needs diffusers: pip install 'turbodistill[demo]'")
from fastapi.testclient import TestClient
from turbodistill.app import server

ROOT = "/turbodistill/v1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ui")


@pytest.fixture(scope="module")
def app(folder):
    return server.make_app(None, None, folder)


@pytest.fixture
def client(app, monkeypatch):
    monkeypatch.setattr(job, "_current", None)
    return TestClient(app, base_url="http://127.0.0.1:7860")


def test_the_command_is_found(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["ui", "--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0 and all(flag in told for flag in ("--port", "--model", "--student", "--out"))
    args = cli.make_parser().parse_args(["ui"])
    assert (args.command, args.port, args.model, args.student) == (ui.run, 7860, None, None)


def test_a_port_that_is_taken_is_told(capsys):
    with socket.socket() as taken:
        taken.bind((ui.ADDRESS, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["ui", "--port", str(port)]) == 1
    told = f"port {port} is taken, perhaps by another `turbodistill ui`: choose another one, such as --port "
    assert told in capsys.readouterr().err
    with ui.listen(port) as mine, pytest.raises(OSError, match="is taken"):  # from before the model is loaded
        assert mine.getsockname()[1] == port and ui.listen(port)


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *told):
        if name == "uvicorn":
            raise ImportError(name=name)
        return real(name, *told)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"the pages need uvicorn: pip install 'turbodistill\[ui\]'"):
        ui.run(argparse.Namespace(port=0))


def test_the_pages_are_there(client):
    page = client.get("/")
    assert page.status_code == 200 and "TurboDistill" in page.text
    assert client.get("/docs").status_code != 200 or "swagger" not in client.get("/docs").text.lower()


def test_the_api_works_on_the_embedded_model(client, folder):
    told = client.get(f"{ROOT}/settings").json()
    assert told["prompts"] == ["the embedded model's"]
    assert {row["name"]: row["value"] for row in told["settings"]}["batch_size"] == 16
    quick = {"built_in": "the embedded model's", "settings": {"rank": 4, "batch_size": 2}}
    answer = client.post(f"{ROOT}/estimate", json=quick)
    assert answer.status_code == 200 and answer.json()["memory"]["weights"] > 1e6
    wrong = client.post(f"{ROOT}/estimate", json=quick | {"width": 63})
    assert wrong.status_code == 400 and "width is 63: give a multiple of 8" in wrong.json()["error"]


@pytest.mark.parametrize("name", ["evil.example", "evil.example:7860"])
def test_another_name_is_refused(app, name):
    # A page of another site that has its own name lead here could else do all that the user can.
    for path in ("/", f"{ROOT}/students"):
        assert TestClient(app, base_url=f"http://{name}").get(path).status_code == 400


def test_other_pages_are_refused(client):
    told = {"name": "x"}
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null"):
        answer = client.post(f"{ROOT}/distill", json=told, headers={"Origin": origin})
        assert answer.status_code == 403 and answer.json()["error"].startswith("not from ")
    assert job.current() is None
    own = client.get(f"{ROOT}/students", headers={"Origin": "http://127.0.0.1:7860"})
    assert own.status_code == 200


def test_a_wrong_method_is_no_page(client):
    answer = client.get(f"{ROOT}/distill")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_what_cannot_be_loaded_is_told_at_once(folder, tmp_path):
    broken = tmp_path / "student.safetensors"
    broken.write_bytes(b"no student")
    with pytest.raises(CardError):
        server.make_app(None, broken, folder)
    with pytest.raises(ModelError):
        server.make_app(tmp_path / "nowhere", None, folder)


def test_a_model_of_one_s_own_begins_without_a_student(folder):
    app = server.make_app(MODEL, None, folder)
    client = TestClient(app, base_url="http://localhost")
    settings = client.get(f"{ROOT}/settings").json()
    values = {row["name"]: row["value"] for row in settings["settings"]}
    assert settings["prompts"] == ["auto", "prose", "tags"]
    assert (values["batch_size"], values["gradient_checkpointing"]) == (4, True)
