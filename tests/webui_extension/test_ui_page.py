"""`turbodistill ui` on the embedded model in a real browser: pictures as one types, a student from begin to end."""

import json
import re
import time
import urllib.request

import pytest

pytest.importorskip("gradio", reason="needs gradio: pip install 'turbodistill[ui]'")
pytest.importorskip("diffusers", reason="needs diffusers: pip install 'turbodistill[demo]'")
pytestmark = [pytest.mark.browser, pytest.mark.slow]

PATIENCE = 60_000  # milliseconds
SHORT = {"pairs": 8, "pair_steps": 2, "rank": 4, "updates": 4, "batch_size": 2}


@pytest.fixture
def page(watched, served):
    """The generate page with its first pictures; nothing is asked for elsewhere, and nothing complains."""
    url, _, _ = served
    opened = watched(url, width=1400, height=1000)
    opened.set_default_timeout(PATIENCE)
    opened.goto(url, wait_until="domcontentloaded")
    opened.wait_for_selector(".turbodistill-made img")
    return opened


def test_the_button_that_asks_is_never_seen(browser, served):
    """From the first paint, also where the tab that has the same rules was never opened."""
    page = browser.new_page()
    page.add_init_script(
        "window.seen = []; const look = () => {"
        "const button = document.querySelector('#turbodistill-follow');"
        "if (button) window.seen.push(button.offsetParent !== null); requestAnimationFrame(look); }; look();"
    )
    page.goto(served[0], wait_until="domcontentloaded")
    page.wait_for_selector(".turbodistill-made img", timeout=PATIENCE)
    seen = page.evaluate("window.seen")
    page.close()
    assert seen and not any(seen)


def pictures(page):
    return page.locator(".turbodistill-made img").evaluate_all("all => all.map((image) => image.src)")


def until_other(page, before):
    """The pictures, when they are others."""
    page.wait_for_function(
        "before => { const now = document.querySelector('.turbodistill-made img'); return now && now.src !== before; }",
        arg=before[0],
    )
    return pictures(page)


def typed(page, name):
    return page.locator(f"#turbodistill-{name}").locator("textarea, input").first


def test_pictures_come_as_one_types(page):
    first = pictures(page)
    assert len(set(first)) == 4
    seen = [first]
    prompt = typed(page, "prompt")
    prompt.fill("")
    for word in ("owl, ", "animal-bird, ", "in flat noto style"):
        prompt.press_sequentially(word)
        seen.append(until_other(page, seen[-1]))
    assert len({tuple(found) for found in seen}) == 4
    told = page.locator(".turbodistill-pace").inner_text()
    each, rate = re.search(r"([\d.]+) ms a picture, (\d+) pictures a second \(4 pictures in \d+ ms", told).groups()
    assert float(each) > 0 and int(rate) == pytest.approx(1000 / float(each), rel=0.1, abs=1)
    page.wait_for_timeout(1000)  # the last letters' pictures are there
    settled = pictures(page)
    for keys in (["Control+a", "Control+c", "End", "Control+v"], ["Backspace"]):
        for key in keys:
            prompt.press(key)
        settled = until_other(page, settled)
    typed(page, "seed").fill("7")
    assert not set(until_other(page, settled)) & set(settled)


def test_a_short_distillation_runs_to_its_end_and_its_student_draws(page, served):
    _, folder, _ = served
    page.locator("button[role=tab]:visible", has_text="Distil").last.click()
    page.wait_for_selector("#turbodistill-status [data-stamp]", state="attached")
    advanced = page.locator("#turbodistill-advanced")
    for title in ("Advanced settings", "Training"):
        advanced.get_by_text(title, exact=True).click()
    for name, value in (SHORT | {"regression_updates": 2, "discriminator_warmup": 1}).items():
        typed(page, name).fill(str(value))
    typed(page, "name").fill("quick")
    page.locator("#turbodistill-distil").click()
    page.locator("#turbodistill-status", has_text="quick: done").first.wait_for()
    assert (folder / "students" / "quick.safetensors").exists()
    assert page.locator("#turbodistill-charts svg").count() == 2
    assert "adversarial" in page.locator("#turbodistill-charts").inner_text()
    assert page.locator("#turbodistill-pictures img[alt=teacher]:visible").count() >= 4
    page.locator("button[role=tab]:visible", has_text="Generate").last.click()
    before = pictures(page)
    student = page.locator("#turbodistill-student input")
    student.click()
    page.locator("[role=option]:visible", has_text="quick").click()
    assert len(until_other(page, before)) == 4


def test_a_number_that_cannot_be_is_told_while_pictures_are_made(page):
    typed(page, "seed").fill("8")
    page.get_by_label("number input for Pictures").fill("2.5")
    page.locator("#turbodistill-pace", has_text="pictures is 2.5: give a whole number").first.wait_for()
    page.wait_for_timeout(1000)  # no pictures of before come
    assert pictures(page) == [] and "2.5" in page.locator("#turbodistill-pace").inner_text()


def begin(url, name):
    """A training that goes on for long."""
    asked = {"name": name, "built_in": "the embedded model's", "settings": {"pairs": 4, "pair_steps": 1, "rank": 4}}
    body = json.dumps(asked).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/turbodistill/v1/distill", body, headers)).close()


def test_while_a_distillation_runs_generation_says_that_it_waits(page, served):
    url, *_ = served
    begin(url, "meanwhile")
    typed(page, "prompt").fill("owl")
    page.locator("#turbodistill-pace", has_text="generation waits until it has ended").first.wait_for()
    assert pictures(page) == []
    urllib.request.urlopen(urllib.request.Request(f"{url}/turbodistill/v1/cancel", b"")).close()
    page.locator(".turbodistill-made img[alt=owl]").first.wait_for()


def test_what_runs_is_saved_when_the_program_is_ended(served):
    url, folder, process = served
    begin(url, "longer")
    begun = time.monotonic()
    while True:
        told = json.load(urllib.request.urlopen(f"{url}/turbodistill/v1/run"))
        if told["what"] == "training" and told["done"]:
            break
        assert told["state"] == "working" and time.monotonic() - begun < 60
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) is not None
    log = (folder / "log.txt").read_text()
    assert "cancelling the distillation: Resume goes on from there" in log and "Traceback" not in log
    run = folder / "runs" / "longer"
    assert json.loads((run / "run.json").read_text())["state"] == "cancelled" and (run / "state.safetensors").exists()
