"""The page of a real AUTOMATIC1111 and a real Forge in a browser: our accordions, our tab, and Reload UI."""

import contextlib
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
        for _ in range(5):
            try:
                self.page.goto(self.url)
                break
            except sync.Error as error:  # after Reload UI the host's page loads itself again, when it likes
                if "interrupted by another navigation" not in error.message:
                    raise
        self.page.wait_for_selector("#txt2img_prompt textarea", timeout=60_000)
        self.page.wait_for_function("typeof opts === 'object' && Object.keys(opts).length > 0", timeout=60_000)

    def turn_to(self, tab):
        named = re.compile(rf"^\s*{tab}\s*$", re.IGNORECASE)  # Forge's are capitalised
        self.page.locator("#tabs > .tab-nav > button").filter(has_text=named).click()

    def unfold(self, tab="txt2img"):
        """Show our accordion, whatever is shown."""
        self.turn_to(tab)
        inside = self.page.locator(self.id("set", tab))
        if not inside.is_visible():
            self.page.locator(f"#tab_{tab}").get_by_text(TITLE).click()
        inside.wait_for(state="visible")

    def id(self, part, tab="txt2img"):
        return f"#script_{tab}_turbodistill_{part}"

    def field(self, name, tab="txt2img"):
        """The value of a component of the host's, or of ours."""
        return self.page.locator(f"#{tab}_{name}").locator("textarea, input").first

    def choose(self, name, tab="txt2img"):
        field = self.page.locator(f"{self.id('choice', tab)} input")
        option = self.page.locator("ul.options li").filter(has_text=name).first
        field.click()
        try:
            option.click(timeout=5_000)
        except sync.TimeoutError:  # the list was renewed as the pointer came, and closed by that
            field.blur()
            field.click()
            option.click()

    def shows(self, **values):
        for name, value in values.items():
            sync.expect(self.field(name)).to_have_value(value, timeout=15_000)

    def words(self):
        return self.page.locator(f"{self.id('words')} textarea")


@pytest.fixture(scope="module")
def page(webui, chromium):
    """One page for all tests of a host, as a user keeps it: to open it is the half of what a test costs."""
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


@pytest.mark.share
def test_all_is_drawn_once(page, webui):
    assert counts(page, webui) == (1, 1, 2, 1)  # an accordion in txt2img and in img2img
    page.unfold()
    assert "negative prompts do nothing" in page.words().input_value()
    page.turn_to("TurboDistill")
    sync.expect(page.page.locator("#tab_turbodistill").get_by_role("button", name="Distil").first).to_be_visible()


def test_set_makes_visible_what_undo_puts_back(page):
    page.unfold()
    page.page.locator("#txt2img_prompt textarea").fill("a red fox")
    before = {name: page.field(name).input_value() for name in ("sampling", "steps", "cfg_scale")}
    page.choose("DMD2")
    sync.expect(page.words()).to_have_value(re.compile("As chosen: DMD2: made for 4 steps"), timeout=15_000)
    page.page.locator(page.id("set")).click()
    page.shows(sampling="ADD few-step", steps="4", cfg_scale="1")
    page.page.locator(page.id("undo")).click()
    page.shows(**before, prompt="a red fox")


def test_a_pasted_infotext_sets_sampler_and_choice(page, webui):
    told = {"alwayson_scripts": {"TurboDistill": {"args": ["LCM"]}}}
    infotext = webui.txt2img(sampler_name="ADD few-step", steps=3, **told).infotext
    page.turn_to("txt2img")
    page.page.locator("#txt2img_prompt textarea").fill(infotext)
    page.page.locator("#paste").first.click()
    # Neo leaves the prompt as it was pasted, also without this extension.
    page.shows(sampling="ADD few-step", steps="3", **({} if webui.kind.name == "neo" else {"prompt": "a fox"}))
    sync.expect(page.page.locator(f"{page.id('choice')} input").first).to_have_value("LCM", timeout=15_000)


def test_a_picture_is_made_and_its_remarks_stand_below(page):
    page.unfold()
    for name in ("width", "height"):
        page.field(name).fill("64")
    page.page.locator("#txt2img_prompt textarea").fill("a red fox")
    page.choose("LCM")
    page.page.locator(page.id("set")).click()
    page.shows(sampling="ADD few-step", steps="4", cfg_scale="1")  # all that Set fills in, or it does so afterwards
    page.field("steps").fill("9")
    page.shows(steps="9")
    page.page.locator("#txt2img_generate").click()
    results = page.page.locator("#txt2img_results")
    sync.expect(results).to_contain_text("ADD timesteps: 999 874", timeout=120_000)
    sync.expect(results).to_contain_text("of 9 steps, 8")


def test_txt2img_s_settings_are_taken_over(page, webui):
    page.turn_to("txt2img")
    before = {name: page.field(name).input_value() for name in ("steps", "cfg_scale", "width", "height", "sampling")}
    for name, value in {"steps": "31", "cfg_scale": "5.5", "width": "72", "height": "104"}.items():
        page.field(name).fill(value)
        page.field(name).blur()
    page.page.locator("#txt2img_neg_prompt textarea").fill("blurry, lowres")
    field, options = page.field("sampling"), page.page.locator("ul.options li")
    field.click()
    options.filter(has_text=re.compile(r"^\W*DPM\+\+ SDE\s*$")).first.click()
    page.shows(sampling="DPM++ SDE", steps="31", height="104")
    page.turn_to("TurboDistill")
    tab = page.page.locator("#tab_turbodistill")
    tab.get_by_role("button", name="Take over txt2img's settings").click()
    said = tab.locator("#turbodistill-said").last
    sync.expect(said).to_contain_text("The nearest to the sampler DPM++ SDE is euler.", timeout=15_000)
    assert "guidance 5.5" in said.inner_text() and "72" in said.inner_text()
    inside = {"pair_steps": "31", "guidance": "5.5", "width": "72", "height": "104", "pair_sampler": "euler"}
    for name, value in inside.items():
        sync.expect(tab.locator(f"#turbodistill-{name} input").first).to_have_value(value)
    negative = tab.locator("#turbodistill-negative_prompt").locator("textarea, input").first
    assert negative.input_value() == "blurry, lowres"
    page.page.screenshot(path=webui.data / "taken.png", full_page=True)
    # As the other tests find the page.
    page.turn_to("txt2img")
    page.page.locator("#txt2img_neg_prompt textarea").fill("")
    field.click()
    options.filter(has_text=re.compile(rf"^\W*{re.escape(before.pop('sampling'))}\s*$")).first.click()
    for name, value in before.items():
        page.field(name).fill(value)
        page.field(name).blur()


@pytest.fixture
def nothing_runs_after(webui, refused):
    """A distillation that is left holds the host's lock, and every later picture would wait for it."""
    yield
    with contextlib.suppress(refused):
        webui.call("turbodistill/v1/cancel", {})


def test_a_distillation_is_begun_watched_and_stopped_in_the_tab(page, webui, nothing_runs_after):
    page.turn_to("TurboDistill")
    tab = page.page.locator("#tab_turbodistill")
    tab.locator("#turbodistill-name textarea, #turbodistill-name input").first.fill("from-the-tab")
    for label in ("Width", "Height"):
        tab.get_by_label(label).first.fill("64")
    tab.locator("#turbodistill-advanced").get_by_text("Advanced settings", exact=True).click()
    tab.locator("#turbodistill-advanced").get_by_text("Training", exact=True).click()
    quick = {
        "pairs": 8,
        "pair_steps": 2,
        "rank": 4,
        "updates": 5000,
        "batch_size": 2,
        "regression_updates": 2,
        "discriminator_warmup": 1,
    }
    for name, value in quick.items():
        tab.locator(f"#turbodistill-{name} input").first.fill(str(value))
    tab.get_by_role("button", name="Distil", exact=True).click()
    # Older gradios give a component its id twice.
    status, charts = (tab.locator(f"#turbodistill-{name}").last for name in ("status", "charts"))
    sync.expect(status).to_contain_text("Training from-the-tab", timeout=120_000)
    sync.expect(charts).to_contain_text("adversarial", timeout=60_000)
    assert charts.locator("svg").count() == 2
    sync.expect(tab.locator("#turbodistill-pictures img[alt=student]").first).to_be_visible(timeout=60_000)
    page.page.screenshot(path=webui.data / "tab.png", full_page=True)
    tab.get_by_role("button", name="Stop and keep best").click()
    sync.expect(status).to_contain_text("stopped as asked", timeout=60_000)
    sync.expect(status).to_contain_text("<lora:from-the-tab:1>")
    assert webui.txt2img(prompt="a fox <lora:from-the-tab:1>").remarks == []
    # The accordion offers it at once, without its refresh button.
    page.unfold()
    page.page.locator(page.id("panel")).hover()
    page.choose("from-the-tab")
    sync.expect(page.words()).to_have_value(re.compile("One-step student of"), timeout=15_000)
    page.page.screenshot(path=webui.data / "accordion.png")


def test_a_picture_that_waits_for_a_distillation_says_so(page, webui, nothing_runs_after):
    settings = {"pairs": 4, "pair_steps": 2, "rank": 4, "batch_size": 2, "regression_updates": 1}
    webui.call(
        "turbodistill/v1/distill",
        {"name": "waits", "prompts": "a fox", "width": 64, "height": 64} | {"settings": settings},
    )
    page.turn_to("txt2img")
    page.page.locator("#txt2img_generate").click()
    waits = page.page.locator("#txt2img_results .progressDiv, .progressDiv").first
    sync.expect(waits).to_contain_text("A distillation runs (waits", timeout=30_000)
    page.page.screenshot(path=webui.data / "waits.png")
    webui.call("turbodistill/v1/cancel", {})
    sync.expect(waits).to_be_hidden(timeout=60_000)


ROUTES = ("distill", "estimate", "run", "stop", "cancel", "preview", "students", "runs", "settings")


def test_another_site_s_page_can_trigger_nothing(webui, chromium, foreign, refused, nothing_runs_after):
    """Neither a route of ours nor, by the host's own ones, a button of our tab."""
    root, name = "/turbodistill/v1", "turbodistill-name"
    click = foreign.event(webui.call("config"), "turbodistill-distil", {name: "theirs"}, "")
    asked = [(f"{root}/{route}", {"name": "theirs", "prompts": "a fox"}) for route in ROUTES]
    answers = foreign.attack(chromium, webui.url, [*asked, *click])
    sent = [a for a in answers if a.method == "POST" and a.path.startswith(root)]
    assert len(sent) > 100 and {answer.status for answer in sent} <= {403, 405}
    assert {answer.path for answer in sent if answer.status == 403} >= {f"{root}/{route}" for route in ROUTES[:2]}
    assert "theirs" not in [run["name"] for run in webui.call("turbodistill/v1/runs")["runs"]]
    # What it sent was right: our own page is answered.
    (path, body), *_ = foreign.event(webui.call("config"), "turbodistill-distil", {name: "a/b"}, "")
    assert "name is" in str(webui.call(path[1:], body, {"Origin": webui.url, "Sec-Fetch-Site": "same-origin"}))


def test_reload_ui_twice_leaves_one_of_each(page, webui):
    for _ in range(2):
        begun, written = (webui.log.read_text().count(words) for words in ("Restarting UI", "Startup time"))
        page.page.locator("#footer").get_by_text("Reload UI").click()
        while webui.log.read_text().count("Restarting UI") == begun:
            page.page.wait_for_timeout(50)
        page.page.goto("about:blank")  # AUTOMATIC1111 dies of a request that comes before its API is there
        while webui.log.read_text().count("Startup time") == written:
            page.page.wait_for_timeout(500)
        page.open()
        assert counts(page, webui) == (1, 1, 2, 1)
    assert webui.txt2img().picture.shape == (64, 64, 3)
    assert "Error loading script: turbodistill" not in webui.log.read_text()
