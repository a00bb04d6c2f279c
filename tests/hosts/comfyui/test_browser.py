"""ComfyUI's page in a real browser: our templates open and run, our help pages open, our locale is used."""

import json
import re
from pathlib import Path

import pytest
import turbodistill
from PIL import Image

pytestmark = [pytest.mark.host, pytest.mark.browser]

ROOT = Path(turbodistill.__file__).parent
TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))
PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
PATIENCE = 120_000  # milliseconds
DEMOS = [template for template in TEMPLATES if " demo " in template.stem.lower()]
# Newer pages mark a loader whose file is not there, as soon as they know.
LOADERS = {"CheckpointLoaderSimple", "TurboDistillLoadStudent"}
# What is changed before Run is pressed, so that it takes seconds.
SHORT = {
    "EmptyLatentImage": {"width": 128, "height": 128},
    "TurboDistillTeacherPairs": {"width": 64, "height": 64, "pairs": 8, "pair_steps": 2, "at_once": 4},
    "TurboDistillDistill": {"rank": 4, "updates": 4, "batch_size": 2},
    "TurboDistillAdvancedSettings": {"regression_updates": 2, "adversarial_ramp": 1, "evaluate_every": 2},
}
# A page in the user's language is asked for first; that we have none is no fault.
ASKED_IN_VAIN = re.compile(r"docs/\w+/en\.md")


def visit(page, comfyui):
    """Open ComfyUI's page and wait until it is ready."""
    page.set_default_timeout(PATIENCE)
    # Else the tutorial covers the page, and newer ones show templates as the server's folder lists them.
    settings = {"Comfy.TutorialCompleted": True, "Comfy.Templates.SortBy": "alphabetical"}
    page.request.post(f"{comfyui.url}/api/settings", data=settings)
    page.goto(comfyui.url)
    page.wait_for_function("() => window.app?.graph && LiteGraph.registered_node_types.TurboDistillSample")


@pytest.fixture(scope="module")
def tab(browser, comfyui):
    """ComfyUI's page, ready, and what it complained of since it was opened."""
    page = browser.new_page(viewport={"width": 1600, "height": 950})
    said = []
    page.on("console", lambda m: said.append(f"{m.text} {m.location.get('url')}") if m.type == "error" else None)
    page.on("pageerror", lambda error: said.append(f"{error} {error.stack}"))
    page.on("response", lambda answer: said.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    visit(page, comfyui)
    return page, said


@pytest.fixture
def page(tab, comfyui):
    """The page; no complaint may be about a file of ours. What a test leaves running would hold the queue: it ends."""
    opened, said = tab
    said.clear()
    yield opened
    comfyui.clear()
    ours = [line for line in said if "turbodistill" in line.lower() and not ASKED_IN_VAIN.search(line)]
    assert ours == []


@pytest.fixture
def browse(page):
    """Open the template browser at our templates."""

    def opened():
        page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        ours = re.compile(r"^\s*turbodistill\s*$", re.IGNORECASE)  # newer pages show the folder's name as it is
        page.get_by_role("dialog").locator("aside, nav").get_by_text(ours).click()

    yield opened
    while page.get_by_role("dialog").count():
        page.keyboard.press("Escape")
        page.wait_for_timeout(100)


def card(page, template):
    return page.get_by_test_id(f"template-workflow-{template.stem}")


def open_template(page, browse, template):
    """Click its card and wait for its graph; the workflow."""
    workflow = json.loads(template.read_text(encoding="utf-8"))
    browse()
    card(page, template).click()
    page.wait_for_function("id => app.graph.id === id", arg=workflow["id"])
    return workflow


@pytest.mark.newest
def test_the_template_browser_shows_ours_with_their_pictures(page, browse):
    browse()
    page.wait_for_function(
        "n => document.querySelectorAll('[data-testid^=template-workflow-]').length >= n", arg=len(TEMPLATES)
    )
    for template in TEMPLATES:
        card(page, template).scroll_into_view_if_needed()
        page.wait_for_function(
            "name => document.querySelector(`[data-testid='template-workflow-${name}'] img`)?.naturalWidth === 384",
            arg=template.stem,
        )
        assert template.stem in card(page, template).inner_text()
    names = page.evaluate(
        "() => [...document.querySelectorAll('[data-testid^=template-workflow-]')].map(shown => shown.dataset.testid)"
    )
    assert [name.removeprefix("template-workflow-") for name in names] == [template.stem for template in TEMPLATES]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.stem)
def test_a_template_opens_with_every_node(page, browse, template):
    workflow = open_template(page, browse, template)
    shown = page.evaluate(
        "() => app.graph.nodes.map(n => [n.type, n.type in LiteGraph.registered_node_types, !!n.has_errors])"
    )
    assert sorted(kind for kind, *_ in shown) == sorted(node["type"] for node in workflow["nodes"])
    assert all(registered for _, registered, _ in shown)
    assert {kind for kind, _, faulty in shown if faulty} <= LOADERS
    # Boxes that the front end would have to enlarge would cover their neighbours.
    small = page.evaluate(
        "() => app.graph.nodes.filter(n => n.size.some((s, i) => s < n.computeSize()[i])).map(n => n.type)"
    )
    assert small == []
    assert page.evaluate("() => app.canvas.ds.scale") > 0.55  # below it no words are drawn


def shorten(page, **distilling):
    """Make the open graph's run short; `distilling` are changes of Distill's own values."""
    page.evaluate(
        """short => app.graph.nodes.forEach(node => Object.entries(short[node.type] ?? {}).forEach(
            ([name, value]) => { node.widgets.find(widget => widget.name === name).value = value }
        ))""",
        SHORT | {"TurboDistillDistill": SHORT["TurboDistillDistill"] | distilling},
    )


def press_run(page):
    """The mark is on the button's group in older pages, on the button itself in newer ones."""
    page.locator("button[data-testid=queue-button], [data-testid=queue-button] button").first.click()


def run(page):
    """Press Run, wait for the pictures; how far their reds are apart, of 255."""
    shows = "app.graph.nodes.find(n => ['PreviewImage', 'SaveImage', 'TurboDistillCompare'].includes(n.type))"
    assert not page.evaluate(f"() => {shows}.imgs?.length")
    press_run(page)
    page.wait_for_function(f"() => {shows}.imgs?.every(picture => picture.naturalWidth)")
    assert page.get_by_role("dialog").count() == 0
    return page.evaluate(
        f"""() => {shows}.imgs.map(picture => {{
            const canvas = new OffscreenCanvas(picture.naturalWidth, picture.naturalHeight)
            const pen = canvas.getContext('2d')
            pen.drawImage(picture, 0, 0)
            const red = pen.getImageData(0, 0, canvas.width, canvas.height).data.filter((_, i) => i % 4 === 0)
            return red.reduce((a, b) => Math.max(a, b)) - red.reduce((a, b) => Math.min(a, b))
        }})"""
    )


@pytest.mark.parametrize("template", DEMOS, ids=lambda template: template.stem)
def test_a_demo_runs_at_a_press(page, browse, template):
    open_template(page, browse, template)
    shorten(page)
    faint = 20 if " Distil " in template.stem else 50  # a student of seconds
    assert min(run(page)) > faint  # something is drawn in each


def look_at_panel(page):
    """Bring the whole of the Distill node into view."""
    page.evaluate(
        """() => {
            app.canvas.ds.scale = 0.6
            app.canvas.centerOnNode(app.graph.nodes.find(n => n.type === 'TurboDistillDistill'))
            app.canvas.setDirty(true, true)
        }"""
    )
    page.wait_for_timeout(300)


@pytest.mark.newest
def test_the_panel_follows_a_distillation_in_every_tab(page, browse, browser, comfyui):
    """Curves and previews move, the buttons work, a reload and a second tab show the same."""
    (template,) = [t for t in TEMPLATES if t.stem.endswith("Distil the demo model")]
    open_template(page, browse, template)
    look_at_panel(page)
    page.evaluate(
        """() => app.graph.nodes.find(n => n.type === 'TurboDistillDistill')
            .widgets.find(w => w.name === 'name').value = 'panel'"""
    )
    shorten(page, updates=400)
    shown = page.locator(".turbodistill-panel:has(.buttons)")
    assert shown.get_attribute("data-state") in ("before", "done")  # done, where the template has been run
    press_run(page)
    page.wait_for_function(
        "() => document.querySelector('.turbodistill-panel:has(.buttons)').dataset.state === 'working'"
    )
    counts = []
    for _ in range(2):
        page.wait_for_function(  # the bar is full for a moment before: of pairs, which are all there
            """least => {
                const share = +document.querySelector('.turbodistill-panel:has(.buttons) .bar')?.value
                return share > least && share < 1
            }""",
            arg=counts[-1] if counts else 0.005,
        )
        counts.append(shown.locator(".bar").evaluate("bar => bar.value"))
    assert counts[1] > counts[0]
    assert shown.locator("canvas").count() == 2
    before = shown.locator(".which").inner_text()
    shown.get_by_role("button", name="Preview now").click()
    page.wait_for_function(
        "before => document.querySelector('.turbodistill-panel:has(.buttons) .which').innerText !== before", arg=before
    )
    page.wait_for_function(
        """() => {
            const pictures = [...document.querySelectorAll('.turbodistill-panel:has(.buttons) .card img')]
            return pictures.length >= 4 && pictures.every(picture => picture.naturalWidth === 64)
        }"""
    )
    # A second tab, which opens the same workflow, and the first after a reload.
    page.reload()
    page.wait_for_function("() => window.app?.graph && LiteGraph.registered_node_types.TurboDistillSample")
    page.wait_for_function(
        """least => +document.querySelector('.turbodistill-panel:has(.buttons) .bar')?.value >= least""", arg=counts[-1]
    )
    assert shown.locator("canvas").count() == 2 and shown.locator(".card").count() >= 4
    look_at_panel(page)
    shown.get_by_role("button", name="Stop and keep best").click()
    page.wait_for_function(
        "() => document.querySelector('.turbodistill-panel:has(.buttons)').dataset.state === 'stopped'"
    )
    assert (comfyui.base / "output" / "turbodistill" / "runs" / "panel" / "student.safetensors").exists()


@pytest.mark.newest
@pytest.mark.parametrize("nodes_2", [False, True], ids=["Nodes 1.0", "Nodes 2.0"])
def test_a_legend_leaves_its_chart_room(browser, comfyui, nodes_2):
    """Of the least node, with every loss that there is."""
    page = browser.new_page()
    page.request.post(f"{comfyui.url}/api/settings", data={"Comfy.VueNodes.Enabled": nodes_2})
    losses = {f"loss {k}": [0.5, 0.4] for k in range(8)}
    history = {"update": [1, 2], "losses": losses, "health": {"accuracy": [0.5, 0.6]}}
    run = {"what": "training", "ranges": {"accuracy": [0.5, 0.8]}}
    run |= {"history": history | {"scores": {"update": [2], "score": [0.3]}}}
    try:
        visit(page, comfyui)
        version = page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__")
        if nodes_2 and tuple(map(int, version.split(".")[:2])) < (1, 40):
            pytest.skip(f"needs a page with finished Nodes 2.0, 1.40 or later: this is {version}")
        page.evaluate(
            """run => {
                app.graph.clear()
                const node = LiteGraph.createNode('TurboDistillDistill')
                app.graph.add(node)
                node.setSize([400, node.computeSize()[1]])
                app.canvas.ds.scale = 1
                app.canvas.centerOnNode(node)
                const told = { ...run, node: String(node.id) }
                window.comfyAPI.api.api.dispatchEvent(new CustomEvent('turbodistill.run', { detail: told }))
            }""",
            run,
        )
        page.wait_for_function("() => document.querySelectorAll('.turbodistill-panel canvas').length === 2")
        page.wait_for_timeout(1000)  # it settles
        heights = page.evaluate(
            """() => [...document.querySelectorAll('.turbodistill-panel .chart')].map(
                chart => ['canvas', '.u-legend'].map(part => chart.querySelector(part).clientHeight)
            )"""
        )
    finally:
        page.request.post(f"{comfyui.url}/api/settings", data={"Comfy.VueNodes.Enabled": False})
        page.close()
    assert all(plot >= 110 for plot, _ in heights) and heights[0][1] > 30


@pytest.mark.parametrize("template", [t for t in TEMPLATES if t not in DEMOS], ids=lambda template: template.stem)
def test_a_template_runs_with_the_files_that_it_names(
    page, browse, template, comfyui, checkpoints, whole, saved, trained
):
    """With synthetic files of those names."""
    nodes = {node["type"]: node for node in json.loads(template.read_text(encoding="utf-8"))["nodes"]}
    folder = comfyui.base / "models" / "checkpoints"
    named = folder / nodes["CheckpointLoaderSimple"]["widgets_values"][0]
    if not named.exists():  # templates share it
        named.hardlink_to(folder / whole)
    if loader := nodes.get("TurboDistillLoadStudent"):
        saved("sd15", trained(checkpoints["sd15"].denoiser), loader["widgets_values"][0].removeprefix("loras/"))
    if pictures := nodes.get("TurboDistillImageFolder"):
        of_mine = comfyui.base / "input" / pictures["widgets_values"][0]
        of_mine.mkdir()
        for colour in ("red", "green", "blue"):
            Image.new("RGB", (80, 60), colour).save(of_mine / f"{colour}.png")
            (of_mine / f"{colour}.txt").write_text(f"a {colour} square")
    page.evaluate("app.refreshComboInNodes()")
    open_template(page, browse, template)
    shorten(page)
    if "TurboDistillDetectOneStep" in nodes:  # by its name it is SDXL-Turbo, by its weights Stable Diffusion 1
        page.evaluate(
            """family => { app.graph.nodes.find(n => n.type === 'TurboDistillDetectOneStep')
                .widgets.find(w => w.name === 'family').value = family }""",
            "SD-Turbo, SDXL-Turbo",
        )
    assert min(run(page)) > 20  # random weights, but a picture


@pytest.mark.parametrize("help_page", PAGES, ids=lambda help_page: help_page.stem)
def test_the_help_page_opens_from_its_node(page, help_page):
    page.evaluate(
        """async name => {
            app.graph.clear()
            const node = LiteGraph.createNode(name)
            app.graph.add(node)
            app.canvas.selectNode(node)
            app.canvas.ds.scale = 0.5 // the buttons stand above the node, and the page's bar above a tall one's
            app.canvas.centerOnNode(node)
        }""",
        help_page.stem,
    )
    page.get_by_test_id("info-button").click()
    headings = re.findall(r"^#+ (.+)$", help_page.read_text(encoding="utf-8"), re.MULTILINE)
    shown = page.locator(".node-help-content")
    shown.get_by_role("heading", name=headings[0], exact=True).wait_for()
    assert shown.get_by_role("heading").all_inner_texts() == headings


def test_the_page_speaks_the_locale(browser, comfyui):
    """Every word of ours is marked on its way to the page, and comes back with its mark."""
    written = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))

    def marked(words):
        return {k: marked(v) for k, v in words.items()} if isinstance(words, dict) else f"{words} *"

    def read(message):
        """As the page shows it: what would be syntax stands in a literal, {'|'}."""
        return re.sub(r"\{'(.)'\}", r"\1", message)

    def mark(route):
        told = route.fetch().json()
        told["en"]["nodeDefs"] = {k: marked(v) if k in written else v for k, v in told["en"]["nodeDefs"].items()}
        route.fulfill(json=told)

    page = browser.new_page()
    page.route("**/i18n", mark)
    visit(page, comfyui)
    shown = page.evaluate(
        """names => names.map(name => {
            const node = LiteGraph.createNode(name)
            return [node.title, node.constructor.nodeData.description, ...node.inputs.map(i => i.localized_name)]
        })""",
        list(written),
    )
    for words, (title, description, *inputs) in zip(map(marked, written.values()), shown, strict=True):
        assert (title, description) == (read(words["display_name"]), read(words["description"]))
        assert set(inputs) == {read(word["name"]) for word in words["inputs"].values()}


def test_another_site_s_page_can_trigger_no_route_of_ours(comfyui, browser, foreign):
    runs = "/turbodistill/runs/1"
    answers = foreign.attack(browser, comfyui.url, [(runs, {}), (f"{runs}/stop", {}), (f"{runs}/preview", {})])
    sent = [answer for answer in answers if answer.method == "POST"]
    assert len(sent) > 30 and {answer.status for answer in sent if answer.path != runs} == {403}
    assert {answer.status for answer in sent} <= {403, 405}  # nothing can be posted to a run itself
    assert comfyui.post("turbodistill/runs/1/stop") == 404  # as a program is answered: no training is there
