"""What programs, pages and pasted infotexts send ends in an answer in words; nothing runs that may not."""

import json

import fastapi
import pytest
from fastapi.testclient import TestClient
from safetensors.torch import save_file
from turbodistill.core.families import FAMILIES
from turbodistill.page import api, generate, job, runs, tab, view
from turbodistill.page.request import Request
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.data.files import DataError
from turbodistill.webui_extension import panel, samplers

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'turbodistill[ui]'")

ROOT = "/turbodistill/v1"
JSON = {"Content-Type": "application/json"}
ROUTES = ("distill", "estimate", "run", "stop", "cancel", "preview", "students", "runs", "settings")
KINDS = ("application/json", "application/json; charset=latin-1", "text/plain", "", "\x01", "multipart/form-data")


@pytest.fixture
def begun(monkeypatch):
    """The jobs that would run: none does."""
    found = []
    monkeypatch.setattr(job.Job, "begin", lambda self: found.append(self))
    monkeypatch.setattr(job.Job, "wait", lambda self, seconds=None: None)
    return found


@pytest.fixture
def client(backend):
    app = fastapi.FastAPI()
    api.add_routes(app, backend)
    return TestClient(app)


def may_run(asked, schema):
    """Whether a job has what the settings' own table allows, and a name and a size that can be."""
    for name, value in asked.config.to_dict().items():
        about = schema[name]
        kinds = (int, float) if about["type"] == "float" else {"int": int, "bool": bool, "str": str}[about["type"]]
        assert isinstance(value, kinds) and (about["type"] == "bool" or not isinstance(value, bool))
        size = len(value) if isinstance(value, str) else value  # a text's letters
        assert about["low"] is None or size >= about["low"], name
        assert about["high"] is None or size <= about["high"], name
        assert about["choices"] is None or value in about["choices"], name
    assert asked.request.name.isprintable() and 0 < len(asked.request.name) <= 100 and "/" not in asked.request.name
    assert all(16 <= side <= 4096 and side % 8 == 0 for side in asked.size) and asked.prompts
    return True


def test_requests(fuzz, client, backend, toy, begun, tmp_path, monkeypatch):
    schema = {row["name"]: row for row in client.get(f"{ROOT}/settings").json()["settings"]}
    quick = {
        "name": "my-turbo", "kind": "distill", "prompts": toy.PROMPTS, "prompt_file": "", "built_in": "", "images": "",
        "width": 0, "height": 32, "settings": toy.QUICK,
    }  # fmt: skip
    bases = [quick, *(quick | {"prompts": "", name: "words"} for name in ("prompt_file", "built_in", "images"))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    sent = {}

    def request(draws):
        route = draws.choice((*ROUTES, "distill", "distill", "distill", "estimate"))
        body = json.dumps(fuzz.values_of(draws, draws.choice(bases))).encode()
        backend.readable = draws.choice(([tmp_path / "nothing"], None))
        if draws.random() < 0.2:
            body = fuzz.bytes_of(draws, body)
        headers = {"Content-Type": KINDS[0] if draws.random() < 0.8 else draws.choice(KINDS)}
        if draws.random() < 0.1:
            headers |= {draws.choice(("Origin", "Host", "Sec-Fetch-Site", "X-Forwarded-Host")): draws.choice(
                ("", "null", "http://[", "http://testserver", "none", "\xff", "a" * 5000))}  # fmt: skip
        before, odd = len(begun), draws.choice(fuzz.ODD).encode("utf-8", "replace").decode().replace("\0", "")
        answer = client.request(
            draws.choice(("GET", "POST", "PUT", "DELETE")) if draws.random() < 0.1 else "POST",
            f"{ROOT}/{route}",
            content=body,
            headers={k: v.encode("latin-1") for k, v in headers.items()},
            params={"pictures": odd[:2000]} if draws.random() < 0.1 else None,
        )
        sent[answer.status_code] = sent.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, answer.text[:300]
        told = answer.json()
        if answer.status_code == 400:
            assert 5 < len(told["error"]) < 1500
        assert all(may_run(made, schema) for made in begun[before:])
        assert len(begun) == before or route in ("distill", "estimate")

    fuzz.endures(request, fuzz.TRIES // 8, ())
    assert sent[400] > 10 and sent[200] > 1 and begun


def test_forms(fuzz, toy, backend, begun):
    """The tab's inputs, as a page that was tampered with sends them."""
    values = {"name": "a", "source": tab.TEXT, "text": toy.PROMPTS, "file": "", "images": "", "width": 0, "height": 32}
    settings = Config(**toy.QUICK).to_dict()
    backend.readable = []

    def form(draws):
        of_run = fuzz.values_of(draws, values, odd=0)
        numbers = fuzz.values_of(draws, settings, odd=0)
        given = [*(of_run[name] for name in tab.OF_RUN), *(numbers[name] for name in tab.SETTINGS)]
        said = tab._say(lambda: job.start(backend, tab.request(draws.choice(("pairs", "distill", "estimate")), given)))
        assert isinstance(said, str)
        odd = draws.choice(fuzz.VALUES)
        tab.filled(backend, odd)
        tab._say(lambda: runs.asked(backend.runs_folder(), tab._name(odd)))

    fuzz.endures(form, fuzz.TRIES // 8, ())
    assert begun


def test_pictures_as_one_types(fuzz, toy):
    """The generate page's inputs."""
    made = []

    class Generator:
        def make(self, path, prompt, seeds, steps):
            assert isinstance(prompt, str) and 1 <= len(seeds) <= generate.MOST and 1 <= steps <= generate.STEPS
            assert seeds[0] >= 0 and seeds[-1] < 2**63
            made.append(path)

        def drop(self):
            """What is refused drops what was asked for before."""

    values = {"prompt": "a fox", "count": 4, "steps": 1, "seed": 0, "student": "ours"}

    def inputs(draws):
        given = fuzz.values_of(draws, values, odd=0)
        generate.pictures(Generator(), {"ours": "path"}, *(given[name] for name in values))

    fuzz.endures(inputs, fuzz.TRIES // 20, ())
    assert made


def test_infotexts(fuzz, tmp_path):
    """What a pasted infotext, a prompt or another program says to the panel and the samplers."""
    file = tmp_path / "a.safetensors"
    sample = b"a fox <lora:a:1:te=1:unet=0.5> <lora:b>, <lora:a:x>"

    def infotext(draws):
        import torch

        save_file({"a": torch.ones(1)}, file, {"ss_output_name": "hyper-sd 4step"})
        files = {"a": file, "b": tmp_path / "gone.safetensors"}
        prompt = fuzz.bytes_of(draws, sample).decode("utf-8", "replace")
        choice = draws.choice(["a", "b", samplers.DETECT, *FAMILIES, *fuzz.ODD])
        steps = draws.choice((-1, 0, 1, 10**9, 10**400))
        panel.describe(choice, prompt, files, None)
        now = panel.Settings(prompt, "Euler", steps, draws.choice((1.0, -1.0, 1e308)))
        kept = panel.apply(choice, now, None, files, tmp_path / "gone")[1]
        panel.undo(now, kept)
        panel.students({name: {"ss_output_name": draws.choice(fuzz.VALUES)} for name in fuzz.ODD})
        name = draws.choice(list(samplers.LIMITS))
        samplers.too_many(name, steps)
        found = samplers.find(choice, samplers.passes(name, steps), files, samplers.applied_loras(prompt))
        samplers.remarks(found, samplers.passes(name, steps), 7.0, choice, ["a"])

    assert fuzz.endures(infotext, fuzz.TRIES // 20, (ConfigError, DataError, ValueError))


def test_names_that_are_no_utf_8_are_listed(client, backend):
    """As old archives leave them."""
    folder = backend.runs_folder() / "b\udcfcsch"
    folder.mkdir(parents=True)
    runs.Record(Request(prompts="a fox"), "toy.safetensors").write(folder)
    (told,) = client.get(f"{ROOT}/runs").json()["runs"]
    assert told["name"] == "b\udcfcsch"
    answer = client.post(f"{ROOT}/distill", content=b'{"prompt_file": "\\ud800"}', headers=JSON)
    assert answer.status_code == 400 and "does not exist" in answer.json()["error"]
    assert "b?sch" in view.box(folder.name)
