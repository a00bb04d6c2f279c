"""The Live page in a real browser: each source, quick edits, and a connection that is lost and found."""

import base64
import io
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="needs gradio: pip install 'turbodistill[ui]'")
pytest.importorskip("diffusers", reason="needs diffusers: pip install 'turbodistill[demo]'")
from turbodistill.demo.files import STUDENT
from turbodistill.generate.few_step import few_step_model, open_file
from turbodistill.generate.sample import sample
from turbodistill.trainer.pipeline.load import load_model

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PATIENCE = 60_000  # milliseconds
# The frame's pixels as a PNG, as the page shows them.
PIXELS = """async () => {
  const image = await createImageBitmap(document.querySelector("#frame"));
  const canvas = new OffscreenCanvas(image.width, image.height);
  canvas.getContext("2d").drawImage(image, 0, 0);
  const bytes = new Uint8Array(await (await canvas.convertToBlob()).arrayBuffer());
  return btoa(String.fromCharCode(...bytes));
}"""
SOURCE = "() => document.querySelector('#frame').src"


@pytest.fixture
def page(watched, served):
    """The Live page with its first picture; nothing is asked for elsewhere, and nothing complains."""
    url, *_ = served
    opened = watched(url, width=1280, height=900)
    opened.set_default_timeout(PATIENCE)
    opened.goto(f"{url}/live")
    opened.wait_for_selector("#frame:not([hidden])")
    return opened


def shown(page):
    """The frame (3, H, W), bytes."""
    with Image.open(io.BytesIO(base64.b64decode(page.evaluate(PIXELS)))) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).int()


def until_other(page, before):
    """The frame's address, when it is another."""
    page.wait_for_function(f"before => ({SOURCE})() !== before", arg=before)
    return page.evaluate(SOURCE)


def settled(page):
    """The frame's address, once no new one comes."""
    address = page.evaluate(SOURCE)
    while True:
        time.sleep(1.0)
        if (now := page.evaluate(SOURCE)) == address:
            return now
        address = now


@pytest.fixture(scope="module")
def expected():
    """What `sample` makes of a prompt, (3, H, W), bytes."""
    host = load_model()
    model, _ = few_step_model(host, open_file(STUDENT))

    def made(prompt, seed=0, picture=None, **how):
        start = {} if picture is None else {"picture": host.encode_images(picture[None])}
        return (next(sample(host, model, [prompt], seed, **start, **how)) * 255).round().int()

    return made


def test_after_two_hundred_quick_edits_the_picture_is_the_last_one_s(page, expected):
    settled(page)
    words = ["owl", "fox face", "pizza", "red heart"]
    for k in range(200):
        page.evaluate(
            "text => { const box = document.querySelector('#prompt'); box.value = text;"
            " box.dispatchEvent(new Event('input')); }",
            f"{words[k % 4]}, in flat {'noto' if k % 3 else 'twemoji'} style {k}",
        )
    last = "owl, animal, in flat twemoji style"
    page.fill("#prompt", last)
    begun = time.monotonic()
    settled(page)
    assert time.monotonic() - begun < 30  # no backlog of two hundred pictures
    assert (shown(page) - expected(last)).abs().max() <= 2
    page.fill("#seed", "7")
    settled(page)
    assert (shown(page) - expected(last, 7)).abs().max() <= 2


def draw(page, *points):
    box = page.locator("#board").bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*at[0])
    page.mouse.down()
    for point in at[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


def test_the_picture_follows_a_drawing_its_layers_and_undo(page):
    page.click("[data-source=canvas]")
    page.fill("#prompt", "red heart, in flat noto style")
    empty = settled(page)
    draw(page, (0.2, 0.3), (0.8, 0.3), (0.5, 0.8))
    until_other(page, empty)
    settled(page)
    drawn = shown(page)
    page.click("#add-layer")
    page.fill("#colour", "#1040e0")
    draw(page, (0.1, 0.9), (0.9, 0.9))
    settled(page)
    both = shown(page)
    assert (both - drawn).abs().float().mean() > 1
    page.locator("#layers li").first.get_by_text("Hide").click()
    settled(page)
    assert torch.equal(shown(page), drawn)
    page.locator("#layers li").first.get_by_text("Show").click()
    page.keyboard.press("Control+z")  # showing it
    page.keyboard.press("Control+z")  # hiding it
    settled(page)
    assert torch.equal(shown(page), both)
    for _ in range(3):
        page.click("#undo")
    assert page.locator("#undo").is_disabled()
    page.click("#redo")
    settled(page)
    assert torch.equal(shown(page), drawn)


def test_a_picture_and_a_video_are_made_anew(page, tmp_path, expected):
    pytest.importorskip("av", reason="needs av: pip install 'turbodistill[video]'")
    page.click("[data-source=picture]")
    page.fill("#strength", "0.2")
    before = settled(page)
    Image.new("RGB", (200, 100), (20, 160, 60)).save(tmp_path / "green.png")
    page.set_input_files("#file", tmp_path / "green.png")
    before = until_other(page, before)
    settled(page)
    picture = torch.tensor([20, 160, 60.0])[:, None, None].expand(3, 64, 64) / 255
    assert (shown(page) - expected(page.input_value("#prompt"), picture=picture, strength=0.2)).abs().max() <= 2
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "broken.png")
    page.get_by_text("This file cannot be read").wait_for()
    page.click("[data-source=video]")
    frames = []
    for k in range(40):
        pixels = np.full((64, 64, 3), 240, np.uint8)
        pixels[16:48, k : k + 20] = (200, 40, 40)
        frames.append((pixels, 0.05))
    with (tmp_path / "moves.webm").open("wb") as file:
        write_webm(file, frames)
    before = settled(page)
    page.set_input_files("#file", tmp_path / "moves.webm")
    for _ in range(3):
        before = until_other(page, before)


def write_webm(target, frames):
    """A film that Chromium plays without licences."""
    import av

    with av.open(target, "w", format="webm") as film:
        stream = film.add_stream("libvpx", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for pixels, _ in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        film.mux(stream.encode())


def test_a_camera_is_followed_and_let_go(page):
    page.click("[data-source=camera]")
    before = page.evaluate(SOURCE)
    for _ in range(3):
        before = until_other(page, before)
    page.click("[data-source=text]")
    assert page.evaluate("document.querySelector('#film').srcObject") is None


def test_noise_travels_by_itself_and_the_last_seconds_are_a_clip(page):
    page.fill("#travel", "1")
    before = page.evaluate(SOURCE)
    for _ in range(4):
        before = until_other(page, before)
    page.fill("#travel", "0")
    settled(page)
    page.select_option("#length", "20")
    for kind, begins in (("gif", b"GIF89a"), ("webp", b"RIFF")):
        page.select_option("#format", kind)
        with page.expect_download() as saving:
            page.click("#record")
        with open(saving.value.path(), "rb") as file:
            assert file.read(len(begins)) == begins
            assert Image.open(file).n_frames >= 4
    with page.expect_download() as saving:
        page.click("#save")
    assert Image.open(saving.value.path()).size == (64, 64)


def test_its_command_makes_the_same_picture(page, tmp_path):
    page.fill("#prompt", "owl's face, in flat noto style")
    page.fill("#seed", "11")
    settled(page)
    page.click("#copy")
    command = page.locator("#stages").inner_text().removeprefix("Copied: ").rstrip(".")
    assert command.startswith("turbodistill sample")
    made = subprocess.run(
        f"{sys.executable} -m turbodistill.app.cli {command.removeprefix('turbodistill ')} --out {tmp_path}",
        shell=True, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (file,) = tmp_path.glob("*.png")
    wanted = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1).int()
    assert (shown(page) - wanted).abs().max() <= 2


def test_several_pages_are_drawn_for_at_once(page, browser, served):
    other = browser.new_page()
    other.goto(f"{served[0]}/live")
    other.wait_for_selector("#frame:not([hidden])", timeout=PATIENCE)
    for each, prompt in ((page, "owl"), (other, "pizza")):
        each.fill("#prompt", prompt)
        each.fill("#travel", "0.5")
    addresses = [each.evaluate(SOURCE) for each in (page, other)]
    for each, address in zip((page, other), addresses, strict=True):
        until_other(each, until_other(each, address))
    other.close()


def test_a_connection_that_is_lost_is_found_again(browser, served):
    page, connections = browser.new_page(), []

    def through(connection):
        connection.connect_to_server()
        connections.append(connection)

    page.set_default_timeout(PATIENCE)
    page.route_web_socket("**/live/frames", through)
    page.goto(f"{served[0]}/live")
    page.wait_for_selector("#frame:not([hidden])")
    connections[-1].close()
    page.get_by_text("Connection lost. Trying again").wait_for()
    before = page.evaluate(SOURCE)
    page.fill("#prompt", "pizza, food, in flat noto style")
    until_other(page, before)
    page.wait_for_function("document.querySelector('#status').textContent === ''")
    assert len(connections) == 2
    page.close()
