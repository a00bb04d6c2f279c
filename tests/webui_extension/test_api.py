"""The routes: what a program sends and is answered, and the host's own authentication before them."""

import asyncio
import json
import time

import fastapi
import pytest
from fastapi.testclient import TestClient
from turbodistill.page import api, job
from turbodistill.trainer.config import Config

pytestmark = pytest.mark.gradio  # the FastAPI that a gradio brings

ROOT = "/turbodistill/v1"


@pytest.fixture
def client(backend):
    app = fastapi.FastAPI()
    api.add_routes(app, backend)
    return TestClient(app)


@pytest.fixture
def quick(toy):
    """What is sent for a quick distillation."""
    return {"name": "my-turbo", "prompts": toy.PROMPTS, "settings": toy.QUICK}


def finished(client):
    job.current().wait(60)
    return client.get(f"{ROOT}/run").json()


def test_a_distillation_is_started_and_watched(client, backend, quick):
    answer = client.post(f"{ROOT}/distill", json=quick)
    assert answer.status_code == 200 and answer.json()["name"] == "my-turbo"
    told = finished(client)
    assert (told["state"], told["done"]) == ("done", 4) and told["history"]["update"] == [1, 2, 3, 4]
    (student,) = client.get(f"{ROOT}/students").json()["students"]
    assert student["name"] == "my-turbo" and student["file"] == str(backend.students_folder() / "my-turbo.safetensors")
    assert student["card"]["base_hash"] == backend.before[0] and "One-step student of toy" in student["words"]
    (run,) = client.get(f"{ROOT}/runs").json()["runs"]
    assert (run["name"], run["state"], run["update"]) == ("my-turbo", "done", 4)
    again = client.post(f"{ROOT}/distill", json=run["request"])  # it goes on as it was asked for
    assert again.status_code == 200 and finished(client)["state"] == "done"


@pytest.mark.parametrize(("pictures", "previews"), [("newest", 1), ("all", 4), ("none", 0)])
def test_as_many_pictures_are_sent_as_are_asked_for(client, quick, pictures, previews):
    client.post(f"{ROOT}/distill", json=quick)
    finished(client)
    told = client.get(f"{ROOT}/run", params={"pictures": pictures}).json()
    assert len(told["previews"]) == previews
    assert all(p["student"][0].startswith("data:image/png;base64,") for p in told["previews"])


def test_a_prompt_of_half_a_letter_is_told(client, quick):
    text = json.dumps(quick | {"prompts": "a fox\n\ud800"})
    answer = client.post(f"{ROOT}/distill", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "is half a letter" in answer.json()["error"]


def test_it_is_ended_from_outside(client, backend, quick):
    quick["settings"] = quick["settings"] | {"updates": 100_000, "evaluate_every": 0}
    client.post(f"{ROOT}/distill", json=quick)
    second = client.post(f"{ROOT}/distill", json=quick)
    assert second.status_code == 409 and "a distillation runs already (my-turbo" in second.json()["error"]
    begun = time.monotonic()
    while client.get(f"{ROOT}/run").json()["done"] < 3 or not job.current().monitor.running:
        assert time.monotonic() - begun < 60
    assert client.post(f"{ROOT}/preview").json() == {}
    assert client.post(f"{ROOT}/stop").json() == {}
    assert finished(client)["state"] == "stopped"
    backend.gate.clear()
    client.post(f"{ROOT}/distill", json=quick | {"name": "other"})
    assert client.post(f"{ROOT}/stop").status_code == 409  # it makes pairs, or begins
    assert client.post(f"{ROOT}/cancel").status_code == 200
    backend.gate.set()
    assert finished(client)["state"] == "cancelled"


def test_where_nothing_runs_that_is_said(client):
    assert client.get(f"{ROOT}/run").status_code == 404
    for wish in ("stop", "cancel", "preview"):
        answer = client.post(f"{ROOT}/{wish}")
        assert answer.status_code == 404 and answer.json() == {"error": "nothing runs now"}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"settings": {"lr": -1}}, "lr is -1.0"),
        ({"settings": {"nmae": 1}}, "there is no setting 'nmae'"),
        ({"nmae": "x"}, "unknown field 'nmae'"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"prompts": ""}, "there are no prompts"),
        ([1], "no JSON object"),
    ],
)
def test_bad_requests_are_told_so(client, quick, body, told):
    answer = client.post(f"{ROOT}/distill", json=body if isinstance(body, list) else quick | body)
    assert answer.status_code == 400 and told in answer.json()["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "http://testserver:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_another_site_s_page_can_do_nothing(client, quick, headers):
    for method, path in (
        ("POST", "distill"),
        ("POST", "estimate"),
        ("POST", "cancel"),
        ("GET", "run"),
        ("GET", "runs"),
    ):
        answer = client.request(method, f"{ROOT}/{path}", json=quick, headers=headers)
        assert answer.status_code == 403 and answer.json()["error"].startswith("not ")
    assert job.current() is None


def test_our_own_page_can(client):
    for headers in (
        {"Origin": "http://testserver"},
        {"Origin": "https://my.proxy", "X-Forwarded-Host": "my.proxy"},
        {"Sec-Fetch-Site": "same-origin"},
    ):
        assert client.get(f"{ROOT}/students", headers=headers).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_taken(client, quick, kind):
    answer = client.post(f"{ROOT}/distill", content=json.dumps(quick), headers={"Content-Type": kind})
    assert answer.status_code == 415 and "send it as application/json" in answer.json()["error"]
    assert job.current() is None


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"a":' * 100_000, b'{"prompts": "' + b"a" * (16 << 20)])
def test_too_deep_and_too_long_requests_are_refused(client, body):
    answer = client.post(f"{ROOT}/distill", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and job.current() is None


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 10**9},
        {"height": -64},
        {"width": 63},
        {"settings": {"pairs": 10**12}},
        {"settings": {"updates": 10**30}},
        {"settings": {"rank": 10**9}},
        {"settings": {"seed": 10**30}},
        {"name": "a\nb"},
        {"name": "CON"},
        {"name": "a" * 300},
    ],
)
def test_what_is_out_of_bounds_is_refused_before_anything_starts(client, quick, changes):
    answer = client.post(f"{ROOT}/distill", json=quick | changes)
    assert (answer.status_code == 400 and "give" in answer.json()["error"]) or "the most is" in answer.json()["error"]
    assert job.current() is None


def test_files_outside_of_the_allowed_folders_are_not_read(client, quick, backend, toy, tmp_path):
    allowed, secret = tmp_path / "allowed", tmp_path / "secret.txt"
    allowed.mkdir()
    secret.write_text("password")
    for name in ("secret.tar", "secret.parquet"):
        (tmp_path / name).write_text("password")
    (allowed / "prompts.txt").write_text("fox\nowl")
    (allowed / "config.json").write_text("{}")
    backend.readable = [allowed]
    for field, path in (
        ("prompt_file", secret),
        ("prompt_file", "/etc/passwd"),
        ("prompt_file", allowed / ".." / "secret.txt"),
        ("prompt_file", allowed / "config.json"),
        ("images", tmp_path),
        ("images", "/"),
        ("images", tmp_path / "secret.tar"),
        ("images", allowed / ".." / "secret.parquet"),
    ):
        answer = client.post(f"{ROOT}/distill", json=quick | {"prompts": "", field: str(path)})
        assert answer.status_code == 400 and "password" not in answer.text and job.current() is None
    answer = client.post(f"{ROOT}/distill", json=quick | {"settings": toy.QUICK | {"init_student": f"'{secret}'"}})
    assert answer.status_code == 400 and f"{secret} is outside" in answer.json()["error"] and job.current() is None
    begun = client.post(
        f"{ROOT}/distill", json=quick | {"prompts": "", "prompt_file": f' "{allowed / "prompts.txt"}" '}
    )
    assert begun.status_code == 200


def test_what_is_no_json_or_no_number_is_told_so(client, monkeypatch):
    answer = client.post(f"{ROOT}/distill", content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "no JSON" in answer.json()["error"]
    monkeypatch.setattr(job, "_current", object())  # what runs is not even asked
    for query in ({"pictures": "some"}, {"pictures": ""}):
        assert client.get(f"{ROOT}/run", params=query).status_code == 400
    monkeypatch.setattr(job, "_current", None)


def test_memory_is_estimated(client, quick):
    answer = client.post(f"{ROOT}/estimate", json=quick)
    told = answer.json()
    assert answer.status_code == 200 and "; training takes about" in told["words"]
    assert told["pairs"]["count"] > 0 and told["pairs"]["on_disk"] > 0 and told["pairs"]["seconds"] > 0
    memory = told["memory"]
    at_once = max(memory["activations"], memory["decoding"])
    assert memory["total"] == memory["weights"] + memory["beside"] + memory["trained"] + at_once > 0
    wrong = client.post(f"{ROOT}/estimate", json=quick | {"width": 48})
    assert wrong.status_code == 400 and "the toy makes 32 x 32" in wrong.json()["error"]


def test_settings_are_the_trainer_s(client, toy):
    told = client.get(f"{ROOT}/settings").json()
    settings = {row["name"]: row for row in told["settings"]}
    assert {name: row["default"] for name, row in settings.items()} == Config().to_dict() and told["prompts"] == [
        "words"
    ]
    assert settings["adversarial"]["choices"] and settings["rank"] == {
        "name": "rank", "type": "int", "default": 64, "value": toy.QUICK["rank"], "group": "student", "low": 0,
        "high": 512, "choices": None, "help": Config.__dataclass_fields__["rank"].metadata["help"],
    }  # fmt: skip


def test_settings_that_cannot_be_used_here_are_not_offered(client, backend):
    backend.limits = {"rank": {"low": 1, "help": "Higher learns more."}, "pixel_backbone": None}
    settings = {row["name"]: row for row in client.get(f"{ROOT}/settings").json()["settings"]}
    assert settings.keys() == Config().to_dict().keys() - {"pixel_backbone"}
    assert (settings["rank"]["low"], settings["rank"]["help"]) == (1, "Higher learns more.")
    answer = client.post(f"{ROOT}/distill", json={"prompts": "a fox", "settings": {"rank": 0}})
    assert (answer.status_code, answer.json()) == (400, {"error": "rank is 0: give 1 or more in Toy"})


def test_files_of_others_are_no_students(client, backend):
    assert client.get(f"{ROOT}/students").json() == {"students": []}
    folder = backend.students_folder()
    folder.mkdir(parents=True)
    (folder / "theirs.safetensors").write_bytes(b"not a student")
    assert client.get(f"{ROOT}/students").json() == {"students": []}


def test_an_unwritable_folder_is_told_when_the_run_is_watched(client, backend, quick):
    (backend.folder / "outputs").write_text("a file where the folder should be")
    client.post(f"{ROOT}/distill", json=quick)
    told = finished(client)
    assert told["state"] == "failed" and "cannot write" in told["error"]


def test_the_host_s_own_authentication_is_asked_first(backend, quick):
    def guard(request: fastapi.Request):
        if request.headers.get("authorization") != "Basic secret":
            raise fastapi.HTTPException(401)

    app = fastapi.FastAPI()
    api.add_routes(app, backend, [fastapi.Depends(guard)])
    client = TestClient(app)
    methods = {path: method for route in app.routes if ROOT in (path := route.path) for method in route.methods}
    assert len(methods) == 10  # and one for what is no route
    for path, method in methods.items():
        assert client.request(method, path, json=quick).status_code == 401
    assert job.current() is None
    assert client.get(f"{ROOT}/students", headers={"Authorization": "Basic secret"}).status_code == 200


def test_everything_is_json(client, quick):
    client.post(f"{ROOT}/distill", json=quick)
    assert json.dumps(finished(client), allow_nan=False)


def test_a_method_that_a_route_does_not_have_is_told_so(client):
    for path, method in api.METHODS.items():
        answer = client.request("PUT", f"{ROOT}/{path}")
        assert (answer.status_code, answer.headers["allow"]) == (405, method)
        assert answer.json() == {"error": f"{path} is asked by {method}, not by PUT"}
    nowhere = client.get(f"{ROOT}/student")
    assert nowhere.status_code == 404 and nowhere.json()["error"].startswith("there is no route 'student': known are")


def test_a_client_that_goes_in_the_middle_of_a_request_leaves_no_traceback(client, caplog):
    """As a server tells of it: a part of the body, and then that nobody is there."""
    told = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    sent = []

    async def receive():
        return next(told)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"100")]
    scope = {"type": "http", "method": "POST", "path": f"{ROOT}/distill", "headers": headers, "query_string": b""}
    asyncio.run(
        client.app(scope | {"server": ("testserver", 80), "root_path": "", "http_version": "1.1"}, receive, send)
    )
    assert sent[0]["status"] == 400 and b"the request broke off" in sent[1]["body"] and job.current() is None
