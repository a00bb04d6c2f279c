"""The training tab in a real browser, within another page as in a WebUI, with whichever gradio is there."""

import time

import pytest
from turbodistill.page import job, tab

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'turbodistill[ui]'")
pytestmark = [pytest.mark.gradio, pytest.mark.browser, pytest.mark.slow]

PATIENCE = 30_000  # milliseconds


@pytest.fixture(scope="module")
def served(toy, chromium, port, tmp_path_factory):
    """The tab on a toy backend, and where it is."""
    backend = toy.ToyBackend(tmp_path_factory.mktemp("page"))
    backend.settings = toy.QUICK | {"updates": 1000, "save_every": 1000, "evaluate_every": 500, "preview_every": 100}
    inner = tab.build(backend)
    with gradio.Blocks(analytics_enabled=False) as outer, gradio.Tabs():
        with gradio.TabItem("Other"):
            gradio.Textbox("nothing")
        with gradio.TabItem("TurboDistill"):
            inner.render()
    outer.queue()
    outer.launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True)
    yield backend, f"http://127.0.0.1:{port}"
    if left := job.running():
        left.cancel()
        backend.gate.set()
        left.wait(60)
    outer.close()


@pytest.fixture(scope="module")
def visit(browser, served):
    """Opens a page at the tab; what it complains of is at hand."""
    _, url = served
    opened = []

    def visit():
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        opened.append(page)
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        # Older gradios ask for fonts elsewhere, which offline takes its time.
        page.route(lambda asked: not asked.startswith((url, "data:", "blob:")), lambda route: route.abort())
        page.set_default_timeout(PATIENCE)
        page.goto(url, wait_until="domcontentloaded")
        page.locator("button:visible", has_text="TurboDistill").last.click()
        page.wait_for_selector("#turbodistill-status [data-stamp]", state="attached")
        return page

    yield visit
    for page in opened:
        assert page.faults == []
        page.close()


@pytest.fixture(scope="module")
def page(visit):
    """One page for most tests, as a user keeps it."""
    return visit()


@pytest.fixture(autouse=True)
def alone(served, monkeypatch):
    """Nothing runs when a test begins, and what it leaves is cancelled."""
    monkeypatch.setattr(job, "_current", None)
    backend, _ = served
    yield
    if left := job.running():
        left.cancel()
        backend.gate.set()
        left.wait(60)
    backend.gate.set()


def press(page, name):
    button = page.locator(f"#turbodistill-{name}")
    (button if button.evaluate("found => found.tagName") == "BUTTON" else button.locator("button")).click()


def disabled(page, name):
    return page.locator(f"#turbodistill-{name}").evaluate("found => (found.querySelector('button') ?? found).disabled")


def says(page, name, words):
    page.locator(f"#turbodistill-{name}", has_text=words).first.wait_for()


def test_a_run_from_its_beginning_to_its_end(served, page):
    backend, _ = served
    says(page, "status", "Loaded: toy.safetensors")
    assert all(disabled(page, name) for name in ("stop", "preview", "cancel"))
    backend.gate.clear()
    press(page, "distil")
    says(page, "status", "my-turbo")
    page.wait_for_function("() => !document.querySelector('#turbodistill-cancel').disabled")
    assert disabled(page, "stop")
    backend.gate.set()
    says(page, "status", "Training my-turbo")
    says(page, "status", "left")
    page.locator("#turbodistill-charts svg").first.wait_for()
    page.locator("#turbodistill-pictures img[alt=student]:visible").first.wait_for()
    page.wait_for_function("() => !document.querySelector('#turbodistill-stop').disabled")
    press(page, "stop")
    says(page, "status", "stopped as asked")
    says(page, "status", "<lora:my-turbo:1>")
    assert page.locator("#turbodistill-charts svg").count() == 2
    assert (backend.students_folder() / "my-turbo.safetensors").exists()
    slider = page.locator("#turbodistill-pictures input[type=range]")
    first = page.locator("#turbodistill-pictures .turbodistill-cards:visible img").nth(1).get_attribute("src")
    slider.fill("0")
    says(page, "pictures", "update 0 (1 of")
    assert page.locator("#turbodistill-pictures .turbodistill-cards:visible").count() == 1
    assert page.locator("#turbodistill-pictures .turbodistill-cards:visible img").nth(1).get_attribute("src") != first


def test_a_page_that_is_opened_again_shows_what_runs_and_a_second_start_is_told(served, visit, page):
    backend, _ = served
    first, third = visit(), page
    backend.gate.clear()
    backend.entered.clear()
    press(first, "distil")
    ends = time.monotonic() + 30
    while not backend.entered.is_set():  # the page's requests go through this thread: it may not sleep
        assert time.monotonic() < ends, first.locator("#turbodistill-live").last.inner_text()
        first.wait_for_timeout(100)
    first.close()
    second = visit()
    for page in (second, third):
        says(page, "status", "my-turbo")
        page.wait_for_function("() => !document.querySelector('#turbodistill-cancel').disabled")
    press(second, "distil")
    says(second, "said", "a distillation runs already (my-turbo")
    press(third, "cancel")
    says(third, "status", "Cancelling")
    backend.gate.set()
    for page in (second, third):
        says(page, "status", "cancelled; the next run goes on from there")


def test_a_run_goes_on_from_the_list(page):
    page.locator("#turbodistill-earlier").get_by_text("Earlier runs", exact=True).first.click()
    press(page, "resume")
    says(page, "said", "no run is chosen")
    chosen = page.locator("#turbodistill-runs input")
    chosen.click()
    chosen.fill("my-turbo")
    chosen.press("Enter")
    press(page, "resume")
    says(page, "status", "Training my-turbo")
    page.wait_for_function("() => !document.querySelector('#turbodistill-cancel').disabled")
    press(page, "cancel")
    says(page, "status", "cancelled")


def test_mistakes_are_said(page):
    name = page.locator("#turbodistill-name textarea, #turbodistill-name input").first
    before = name.input_value()
    name.fill("a/b")
    press(page, "distil")
    says(page, "said", "name is 'a/b': give one that can be a folder's")
    name.fill(before)
    assert job.current() is None


def test_memory_is_estimated(page):
    press(page, "estimate")
    says(page, "status", "Estimate: done")
    says(page, "status", "training takes about")


def test_the_advanced_settings_open_and_prompts_change_what_is_asked_for(page):
    field = page.locator("#turbodistill-lr input")
    assert not field.is_visible()
    page.locator("#turbodistill-advanced").get_by_text("Advanced settings", exact=True).click()
    page.locator("#turbodistill-advanced").get_by_text("Training", exact=True).click()
    field.wait_for()
    assert field.input_value() == "0.0002"
    text = page.locator("#turbodistill-text textarea")
    assert not text.is_visible()
    source = page.locator("#turbodistill-source input")
    source.click()
    source.fill(tab.TEXT)
    source.press("Enter")
    text.wait_for()
