"""The newest ComfyUI's page, on the classic canvas and in Nodes 2.0: templates, blueprints, app mode, folded inputs."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
import turbodistill

pytestmark = [pytest.mark.host, pytest.mark.browser, pytest.mark.newest]

ROOT = Path(turbodistill.__file__).parent
PATIENCE = 60_000  # milliseconds
READY = "() => window.app?.graph && LiteGraph.registered_node_types.TurboDistillSample"
# What is changed before Run is pressed, so that it takes seconds.
SHORT = {
    "EmptyLatentImage": {"width": 64, "height": 64},
    "TurboDistillTeacherPairs": {"width": 64, "height": 64, "pairs": 8, "pair_steps": 2, "at_once": 4},
    "TurboDistillDistill": {"rank": 4, "updates": 4, "batch_size": 2},
    "TurboDistillAdvancedSettings": {"regression_updates": 2, "adversarial_ramp": 1, "evaluate_every": 2},
}
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))


@pytest.fixture
def visit(browser, comfyui):
    """Whether in Nodes 2.0 -> ComfyUI's page, ready. It is closed at the end, and no file of ours was complained of."""
    opened, said = [], []

    def open_page(nodes_2=False):
        page = browser.new_page(viewport={"width": 1600, "height": 950})
        opened.append(page)
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda m: said.append(f"{m.text} {m.location.get('url')}") if m.type == "error" else None)
        page.on("pageerror", lambda error: said.append(f"{error} {error.stack}"))
        settings = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": nodes_2}
        assert comfyui.post("settings", settings) == 200
        page.goto(comfyui.url)
        page.wait_for_function(READY)
        version = page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__")
        if tuple(map(int, version.split(".")[:2])) < (1, 40):
            pytest.skip(f"needs a page with app mode, blueprints and Nodes 2.0, 1.40 or later: this is {version}")
        return page

    yield open_page
    comfyui.clear()
    comfyui.post("settings", {"Comfy.VueNodes.Enabled": False})
    for page in opened:
        page.close()
    assert [line for line in said if "turbodistill" in line.lower()] == []


@pytest.fixture(scope="module")
def checkpoint(comfyui, whole):
    """The file that template 09 names, synthetic."""
    folder = comfyui.base / "models" / "checkpoints"
    named = folder / "v1-5-pruned-emaonly-fp16.safetensors"
    if not named.exists():  # other tests share it
        named.hardlink_to(folder / whole)


def shorten(page):
    """Make the open graph's run short."""
    page.evaluate(
        """short => app.graph.nodes.forEach(node => Object.entries(short[node.type] ?? {}).forEach(
            ([name, value]) => { node.widgets.find(widget => widget.name === name).value = value }
        ))""",
        SHORT,
    )


def open_template(page, stem):
    """By its card in the template browser."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    ours = page.get_by_role("dialog").locator("aside, nav").get_by_text(re.compile(r"^\s*turbodistill\s*$", re.I))
    ours.click()
    page.get_by_test_id(f"template-workflow-{stem}").click()
    workflow = json.loads((ROOT / "workflows" / f"{stem}.json").read_text(encoding="utf-8"))
    page.wait_for_function("id => app.graph.id === id", arg=workflow["id"])
    page.get_by_role("dialog").wait_for(state="hidden")
    return workflow


def press_run(page):
    page.locator("button[data-testid=queue-button], [data-testid=queue-button] button").first.click()


def run(page, comfyui, press=press_run):
    """Press Run; the prompt that came of it, done. Raises as ComfyUI.wait does."""
    before = set(json.loads(comfyui.get("history")))
    press(page)
    for _ in range(600):
        if new := set(json.loads(comfyui.get("history"))) - before:
            return comfyui.wait(*new)
        page.wait_for_timeout(100)
    raise TimeoutError("no prompt has come to its end")


def uncovered(page):
    """Boxes of nodes as Nodes 2.0 lays them out, in pixels of the screen; those that cover each other."""
    boxes = page.evaluate(
        """() => [...document.querySelectorAll('[data-node-id]')].map(node => {
            const { left, top, right, bottom } = node.getBoundingClientRect()
            return [node.dataset.nodeId, left, top, right, bottom]
        })"""
    )
    covered = [
        (a[0], b[0])
        for a, b in combinations(boxes, 2)
        if min(a[3], b[3]) - max(a[1], b[1]) > 1 and min(a[4], b[4]) - max(a[2], b[2]) > 1
    ]
    return len(boxes), covered


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
@pytest.mark.parametrize("stem", ["01 Demo in one step", "08 Distil the demo model", "09 Distil your checkpoint"])
def test_a_template_opens_and_runs(visit, comfyui, request, stem, nodes_2):
    if stem.startswith("09"):
        request.getfixturevalue("checkpoint")
    page = visit(nodes_2)
    workflow = open_template(page, stem)
    shown = page.evaluate("() => app.graph.nodes.map(n => [n.type, !!n.has_errors])")
    assert sorted(shown) == sorted([node["type"], False] for node in workflow["nodes"])
    if nodes_2:
        page.wait_for_timeout(1000)  # it lays out
        assert uncovered(page) == (len(workflow["nodes"]), [])
    shorten(page)
    ended = run(page, comfyui)
    (preview,) = [str(node["id"]) for node in workflow["nodes"] if node["type"] == "PreviewImage"]
    assert ended.outputs[preview]["images"]
    page.wait_for_function(
        """([id, nodes2]) => {
            const drawn = nodes2 ? [...document.querySelectorAll(`[data-node-id="${id}"] img`)]
                : app.graph.getNodeById(+id).imgs ?? []
            return drawn.length && drawn.every(each => each.naturalWidth)
        }""",
        arg=[preview, nodes_2],
    )
    if "Distil" in stem:
        panels = page.locator(".turbodistill-panel")
        assert panels.count() == 2
        assert [panels.nth(k).get_attribute("data-state") for k in range(2)] == ["done", "done"]


FORMS = {
    "01 Demo in one step": ["text", "batch_size", "seed", "steps"],
    "06 Your checkpoint and student": ["ckpt_name", "student", "text", "width", "height", "batch_size", "seed"],
    "08 Distil the demo model": ["pairs", "updates", "name", "text", "panel"],
}


def turn_to_app_mode(page, count):
    """Its form, of so many fields, once it stays: what is still loading, and the end of a first tour, leave it."""
    asked = page.get_by_test_id("app-mode-widget-item")
    for _ in range(5):
        if not asked.count():
            page.evaluate("app.extensionManager.command.execute('Comfy.ToggleLinear')")
        page.wait_for_timeout(1500)
        if page.get_by_role("button", name="Skip").count():
            page.get_by_role("button", name="Skip").click()
        elif asked.count() == count:
            break
    return asked


@pytest.mark.asked
def test_templates_are_forms_in_app_mode(visit, comfyui):
    page = visit()
    for stem, names in FORMS.items():
        open_template(page, stem)
        shorten(page)
        asked = turn_to_app_mode(page, len(names))
        labels = [asked.nth(k).get_by_test_id("builder-widget-label").inner_text() for k in range(len(names))]
        assert labels == names
        if stem.startswith("08"):
            assert asked.last.locator(".turbodistill-panel").is_visible()
            ended = run(page, comfyui, lambda page: page.get_by_role("button", name="Run", exact=True).click())
            assert ended.outputs["14"]["images"]
            page.wait_for_function(
                """() => document.querySelector('[data-testid=app-mode-widget-item] .turbodistill-panel')
                    .dataset.state === 'done'"""
            )
        page.evaluate("app.extensionManager.command.execute('Comfy.ToggleLinear')")


def test_what_a_first_training_needs_not_is_folded_away(visit):
    page = visit(nodes_2=True)
    open_template(page, "09 Distil your checkpoint")
    pairs = page.locator("[data-node-id='3']")
    assert pairs.get_by_text("guidance", exact=True).is_visible()
    assert not pairs.get_by_text("guidance_rescale", exact=True).is_visible()
    pairs.get_by_test_id("advanced-inputs-button").click()
    pairs.get_by_text("guidance_rescale", exact=True).wait_for()


def add_blueprint(page, name):
    """From the search for nodes, as one node; beside it the demo model, connected."""
    page.evaluate("() => { app.graph.clear(); app.extensionManager.command.execute('Workspace.SearchBox.Toggle') }")
    dialog, there = page.get_by_role("dialog"), "name => app.graph.nodes.some(node => node.title === name)"
    asked, found = dialog.locator("input").first, None  # the panel on the right has a search of its own
    for _ in range(12):  # what is asked for before the blueprints are read is not looked up again
        asked.fill("")
        asked.fill(name)
        page.wait_for_timeout(5000 if found is False else 1000)
        if found := dialog.get_by_text(name, exact=True).first.is_visible():
            break
    assert found, f"the search does not find {name}"
    page.wait_for_timeout(300)
    page.keyboard.press("Enter")
    dialog.wait_for(state="hidden")
    for _ in range(20):  # it hangs on the pointer as soon as its file is read
        page.mouse.click(700, 400)  # where it is put down
        page.wait_for_timeout(500)
        if page.evaluate(there, name):
            break
    page.wait_for_function(there, arg=name)
    return page.evaluate(
        """name => {
            const node = app.graph.nodes.find(node => node.title === name)
            const demo = LiteGraph.createNode('TurboDistillLoadDemoModel')
            app.graph.add(demo)
            ;['model', 'clip', 'vae'].forEach((part, k) => demo.connect(k, node, node.findInputSlot(part)))
            const shown = LiteGraph.createNode('PreviewImage')
            app.graph.add(shown)
            const pictures = node.outputs.findIndex(output => output.type === 'IMAGE')
            node.connect(pictures, shown, 0)
            return [node.id, shown.id].map(String)
        }""",
        name,
    )


SET = """([id, values]) => Object.entries(values).forEach(([name, value]) => {
    app.graph.getNodeById(+id).widgets.find(widget => widget.name === name).value = value
})"""


def test_the_blueprint_of_a_picture(visit, comfyui):
    page = visit()
    node, shown = add_blueprint(page, "One-step picture")
    text = "red heart, heart, in glossy 3d fluent style"
    page.evaluate(SET, [node, {"text": text, "width": 64, "height": 64, "batch_size": 2}])
    ended = run(page, comfyui)
    assert len(ended.outputs[shown]["images"]) == 2


def test_the_blueprint_of_a_training(visit, comfyui):
    page = visit()
    node, shown = add_blueprint(page, "Distil the loaded checkpoint")
    values = {"prompts": "built in: the demo model's", "width": 64, "height": 64, "pairs": 8}
    page.evaluate(SET, [node, values | {"name": "blueprint", "rank": 4, "updates": 2, "batch_size": 2}])
    ended = run(page, comfyui)
    assert len(ended.outputs[shown]["images"]) >= 4
    assert (comfyui.base / "output" / "turbodistill" / "runs" / "blueprint" / "student.safetensors").exists()
    assert (comfyui.base / "models" / "loras" / "blueprint.safetensors").exists()


@pytest.mark.asked
def test_a_browser_that_is_closed_and_opened_again_during_a_training(visit, comfyui):
    page = visit()
    open_template(page, "08 Distil the demo model")
    shorten(page)
    page.evaluate(SET, ["5", {"name": "reopened", "updates": 400}])
    press_run(page)
    busy = "() => document.querySelector('.turbodistill-panel:has(.buttons)')?.dataset.state === 'working'"
    page.wait_for_function(busy)
    page.wait_for_function("() => document.querySelectorAll('.turbodistill-panel:has(.buttons) .card').length >= 4")
    page.close()
    page = visit()
    open_template(page, "08 Distil the demo model")
    page.wait_for_function(busy)
    panel = page.locator(".turbodistill-panel:has(.buttons)")
    page.wait_for_function("() => document.querySelectorAll('.turbodistill-panel:has(.buttons) .card').length >= 4")
    assert panel.locator("canvas").count() == 2
    panel.get_by_role("button", name="Stop and keep best").click()
    page.wait_for_function(busy.replace("'working'", "'stopped'"))
    assert (comfyui.base / "output" / "turbodistill" / "runs" / "reopened" / "student.safetensors").exists()
