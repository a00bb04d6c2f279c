"""The page of a real AUTOMATIC1111 and a real Forge in a browser: our accordions, our tab, and Reload UI."""

import re
import shutil

import pytest

sync = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.browser]
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
TITLE = "TurboDistill: one-step models"


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    with sync.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        except sync.Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


class Page:
    """The host's page as a user works it."""

    def __init__(self, page, url):
        self.page, self.url = page, url
        self.open()

    def open(self):
        self.page.goto(self.url)
        self.page.wait_for_selector("#txt2img_prompt textarea", timeout=60_000)
        self.page.wait_for_function("window.opts && Object.keys(opts).length > 0", timeout=60_000)

    def unfold(self, tab="txt2img"):
        self.page.locator(f"#tab_{tab}").get_by_text(TITLE).click()
        self.page.locator(self.id("set", tab)).wait_for(state="visible")

    def id(self, part, tab="txt2img"):
        return f"#script_{tab}_turbodistill_{part}"

    def field(self, name, tab="txt2img"):
        """The value of a component of the host's, or of ours."""
        return self.page.locator(f"#{tab}_{name}").locator("textarea, input").first

    def choose(self, name, tab="txt2img"):
        self.page.locator(f"{self.id('choice', tab)} input").click()
        self.page.locator("ul.options li").filter(has_text=name).first.click()

    def shows(self, **values):
        for name, value in values.items():
            sync.expect(self.field(name)).to_have_value(value, timeout=15_000)

    def words(self):
        return self.page.locator(f"{self.id('words')} textarea")


@pytest.fixture
def page(webui, chromium):
    opened = chromium.new_page(viewport={"width": 1400, "height": 1300})
    yield Page(opened, webui.url)
    opened.close()


def counts(page, webui):
    """How often each thing of ours is there: samplers, accordions, tabs."""
    names = webui.samplers()
    return (
        names.count("ADD 1-step"),
        names.count("ADD few-step"),
        page.page.get_by_text(TITLE).count(),
        page.page.locator("#tabs > .tab-nav > button").get_by_text("TurboDistill", exact=True).count(),
    )


def test_all_is_drawn_once(page, webui):
    assert counts(page, webui) == (1, 1, 2, 1)  # an accordion in txt2img and in img2img
    page.unfold()
    assert "negative prompts do nothing" in page.words().input_value()
    page.page.locator("#tabs > .tab-nav > button").get_by_text("TurboDistill", exact=True).click()
    sync.expect(page.page.locator("#tab_turbodistill").get_by_role("button", name="Distil").first).to_be_visible()


def test_set_makes_visible_what_undo_puts_back(page):
    page.unfold()
    page.page.locator("#txt2img_prompt textarea").fill("a red fox")
    before = page.field("sampling").input_value()
    page.choose("DMD2")
    sync.expect(page.words()).to_have_value(re.compile("As chosen: DMD2: made for 4 steps"), timeout=15_000)
    page.page.locator(page.id("set")).click()
    page.shows(sampling="ADD few-step", steps="4", cfg_scale="1")
    page.page.locator(page.id("undo")).click()
    page.shows(sampling=before, steps="20", cfg_scale="7", prompt="a red fox")


def test_a_pasted_infotext_sets_sampler_and_choice(page, webui):
    told = {"alwayson_scripts": {"TurboDistill": {"args": ["LCM"]}}}
    infotext = webui.txt2img(sampler_name="ADD few-step", steps=3, **told).infotext
    page.page.locator("#txt2img_prompt textarea").fill(infotext)
    page.page.locator("#paste").first.click()
    page.shows(sampling="ADD few-step", steps="3", prompt="a fox")
    sync.expect(page.page.locator(f"{page.id('choice')} input").first).to_have_value("LCM", timeout=15_000)


def test_a_picture_is_made_and_its_remarks_stand_below(page):
    page.unfold()
    for name in ("width", "height"):
        page.field(name).fill("64")
    page.page.locator("#txt2img_prompt textarea").fill("a red fox")
    page.choose("LCM")
    page.page.locator(page.id("set")).click()
    page.shows(sampling="ADD few-step", cfg_scale="1")
    page.field("steps").fill("9")
    page.page.locator("#txt2img_generate").click()
    results = page.page.locator("#txt2img_results")
    sync.expect(results).to_contain_text("ADD timesteps: 999 874", timeout=120_000)
    sync.expect(results).to_contain_text("of 9 steps, 8")


def test_reload_ui_twice_leaves_one_of_each(page, webui):
    for _ in range(2):
        written = webui.log.read_text().count("Startup time")
        page.page.locator("#footer").get_by_text("Reload UI").click()
        while webui.log.read_text().count("Startup time") == written:
            page.page.wait_for_timeout(500)
        page.open()
        assert counts(page, webui) == (1, 1, 2, 1)
    assert webui.txt2img().picture.shape == (64, 64, 3)
    assert "Error loading script" not in webui.log.read_text()
