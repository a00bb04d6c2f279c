"""The Live page's routes in `turbodistill ui`: who may ask, and what a frame is."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="needs gradio: pip install 'turbodistill[ui]'")
pytest.importorskip("diffusers", reason="needs diffusers: pip install 'turbodistill[demo]'")
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from turbodistill.app import server
from turbodistill.app.live.hub import MOST_VIEWERS
from turbodistill.app.live.messages import packed, unpacked
from turbodistill.core.student import load_student
from turbodistill.demo.files import STUDENT
from turbodistill.generate.sample import sample
from turbodistill.trainer.pipeline.load import load_model

HERE = "http://127.0.0.1:7860"
FRAMES = "ws://127.0.0.1:7860/live/frames"
REMOTE_FRAMES = "ws://studio.local:7860/live/frames"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return server.make_app(None, None, tmp_path_factory.mktemp("ui"))


@pytest.fixture
def client(app):
    return TestClient(app, base_url=HERE)


def frame(socket, **about):
    socket.send_bytes(packed({"number": 1, "student": "embedded", **about}))
    return unpacked(socket.receive_bytes())


def refusal(client, url, **how):
    """The status with which a websocket was refused."""
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect(url, **how):
        pass
    return denied.value.status_code


def test_a_frame_is_what_sample_makes(client):
    prompt = "owl, animal, in flat twemoji style"
    with client.websocket_connect(FRAMES) as socket:
        told, file = frame(socket, prompt=prompt, seed=5)
    assert (
        told["number"] == 1 and told["type"] == "image/png" and set(told["stages"]) >= {"denoise", "decode", "waited"}
    )
    made = torch.from_numpy(np.array(Image.open(io.BytesIO(file)))).permute(2, 0, 1) / 255
    host = load_model()
    student, *_ = load_student(STUDENT, host.denoiser)
    (wanted,) = sample(host, student, [prompt], 5)
    assert (made - wanted).abs().max() <= 1.5 / 255  # merged here, beside the weights there


def test_what_is_wrong_is_told_and_the_page_goes_on(client):
    with client.websocket_connect(FRAMES) as socket:
        assert "strength is 7" in frame(socket, strength=7)[0]["error"]
        assert "steps is 4" in frame(socket, prompt="a", steps=4)[0]["error"]
        assert "there is no student 'none'" in frame(socket, prompt="a", student="none")[0]["error"]
        socket.send_text("hello")
        assert "ends too early" in unpacked(socket.receive_bytes())[0]["error"]
        assert "type" in frame(socket, prompt="a fox")[0]


def test_the_page_and_its_parts_are_there(client):
    page = client.get("/live").text
    for part in ("/live/live.css", "/live/live.js"):
        assert part in page and client.get(part).status_code == 200
    script = client.get("/live/live.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert all(client.get(f"/live/{name}.js").status_code == 200 for name in ("board", "clip", "connection", "pace"))
    about = client.get("/live/about").json()
    assert about["students"] == {"embedded": ""} and (about["width"], about["height"]) == (64, 64)
    assert client.get("/live/../server.py").status_code == 404 and client.get("/live/none.js").status_code == 404


def test_a_clip_is_a_file_or_words(client):
    files = []
    for colour in ("red", "blue"):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(buffer, "png")
        files.append(buffer.getvalue())
    body = packed({"format": "webp", "times": [0, 50], "lengths": [len(f) for f in files]}, b"".join(files))
    made = client.post("/live/clip", content=body)
    assert made.headers["content-type"] == "image/webp" and Image.open(io.BytesIO(made.content)).n_frames == 2
    wrong = client.post("/live/clip", content=b"none")
    assert wrong.status_code == 400 and "ends too early" in wrong.json()["error"]


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}])
def test_another_site_s_page_sees_no_frame_and_makes_no_clip(client, headers):
    assert refusal(client, FRAMES, headers=headers) == 403
    for method, path in (("GET", "/live/about"), ("POST", "/live/clip")):
        assert client.request(method, path, headers=headers).status_code == 403


def test_a_name_that_leads_here_from_elsewhere_is_refused(app):
    other = TestClient(app, base_url="http://evil.example")
    assert other.get("/live").status_code == 400
    assert refusal(other, "ws://evil.example/live/frames") == 400


def test_more_pages_than_there_is_room_for_are_told(client):
    sockets = [client.websocket_connect(FRAMES).__enter__() for _ in range(MOST_VIEWERS)]
    try:
        with client.websocket_connect(FRAMES) as socket, pytest.raises(WebSocketDisconnect) as end:
            socket.receive_bytes()
        assert end.value.code == 1013 and "close one" in end.value.reason
    finally:
        for socket in sockets:
            socket.__exit__(None, None, None)
    with client.websocket_connect(FRAMES) as socket:
        assert "type" in frame(socket, prompt="a fox")[0]


@pytest.fixture(scope="module")
def reached(tmp_path_factory):
    """The pages as other machines reach them."""
    folder = tmp_path_factory.mktemp("reached")
    return server.make_app(None, None, folder, "open sesame"), folder


@pytest.fixture
def remote(reached):
    return TestClient(reached[0], base_url="http://studio.local:7860", follow_redirects=False)


def test_without_the_password_nothing_is_there(remote, monkeypatch):
    monkeypatch.setattr("turbodistill.app.password.PAUSE", 0.0)
    page = remote.get("/live", headers={"accept": "text/html"})
    assert page.status_code == 401 and "asks for its password" in page.text and "Live" not in page.text
    for method, path in (
        ("GET", "/live/about"), ("GET", "/live/live.js"), ("GET", "/"), ("GET", "/config"), ("POST", "/live/clip"),
        ("POST", "/turbodistill/v1/distill"), ("POST", "/gradio_api/upload"), ("GET", "/turbodistill-login"),
    ):  # fmt: skip
        assert remote.request(method, path).status_code == 401, path
    assert refusal(remote, REMOTE_FRAMES) == 401
    for guess in ("", "sesame", "open sesame ", "open%20sesame%00", "a" * 5000, "é"):
        assert remote.post("/turbodistill-login", content=f"password={guess}".encode()).status_code == 401
    assert remote.get("/live/about", headers={"cookie": "turbodistill=guess"}).status_code == 401
    assert remote.get("/live/about", headers={"cookie": "turbodistill"}).status_code == 401


def test_with_the_password_all_is_there_until_the_server_ends(remote, reached, tmp_path):
    opened = remote.post("/turbodistill-login", content=b"password=open+sesame")
    assert opened.status_code == 303 and "HttpOnly" in opened.headers["set-cookie"]
    assert "samesite=strict" in opened.headers["set-cookie"].lower()
    assert remote.get("/live/about").status_code == 200
    with remote.websocket_connect(REMOTE_FRAMES) as socket:
        assert "type" in frame(socket, prompt="a fox")[0]
    # Files of the server's owner are not theirs: text is read from the folder of the pages alone.
    (tmp_path / "secret.txt").write_text("a secret")
    asked = {"name": "a", "prompt_file": str(tmp_path / "secret.txt"), "settings": {"pairs": 4}}
    answer = remote.post(
        "/turbodistill/v1/distill", content=json.dumps(asked), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400 and "secret.txt" in answer.json()["error"]
    other = TestClient(reached[0], base_url="http://studio.local:7860")
    assert other.get("/live/about").status_code == 401
