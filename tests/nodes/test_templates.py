"""The workflow templates fit our nodes and themselves; that they run is shown in a real ComfyUI."""

import asyncio
import json
import re
from itertools import combinations
from pathlib import Path

import pytest
import turbodistill
from PIL import Image

FOLDER = Path(turbodistill.__file__).parent / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
OPTIONAL = 7  # the shape of a socket that may stay open
SEEDS = ("seed", "noise_seed")  # after these the page puts a widget of its own, unless the input forbids it


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request):
    return request.param


@pytest.fixture
def workflow(file):
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def schemas(nodes):
    """Node id -> schema."""
    extension = asyncio.run(turbodistill.comfy_entrypoint())
    found = [cls.define_schema() for cls in asyncio.run(extension.get_node_list())]
    return {schema.node_id: schema for schema in found}


def ours(workflow):
    return [node for node in workflow["nodes"] if node["type"].startswith("TurboDistill")]


def values(node, schema):
    """A node's widgets as pairs of input and value; what stands after a seed is left out, but must be there."""
    left, pairs = list(node["widgets_values"]), []
    for socket in schema.inputs:
        if socket.io_type in WIDGETS:
            pairs.append((socket, left.pop(0)))
            told = getattr(socket, "control_after_generate", None)
            if told or (told is None and socket.id in SEEDS):
                assert left.pop(0) in ("fixed", "increment", "decrement", "randomize")
    assert left == []
    return pairs


def test_there_are_templates(schemas):
    used = {node["type"] for file in FILES for node in ours(json.loads(file.read_text(encoding="utf-8")))}
    assert used <= set(schemas)
    # The two that are left are parts of One-Step Sample, for those who build their own sampling.
    assert set(schemas) - used == {"TurboDistillScheduler", "TurboDistillSampler"}


def test_a_template_has_a_name_and_a_picture(file):
    assert re.fullmatch(r"[\w .-]+", file.stem)  # it is a title, and part of an address
    picture = file.with_suffix(".jpg")
    with Image.open(picture) as shown:
        assert shown.format == "JPEG" and shown.size == (384, 384)
    assert picture.stat().st_size < 60_000


def test_every_picture_is_a_template_s():
    assert {p.stem for p in FOLDER.glob("*.jpg")} == {p.stem for p in FILES}
    assert {p.suffix for p in FOLDER.iterdir()} == {".json", ".jpg"}


def test_links_agree_with_their_nodes(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    assert len(links) == len(workflow["links"]) and max(links) == workflow["last_link_id"]
    for number, source, output, target, place, kind in workflow["links"]:
        begin, end = nodes[source]["outputs"][output], nodes[target]["inputs"][place]
        assert number in begin["links"] and number == end["link"]
        assert begin["type"] == kind and end["type"] in (kind, "*")
        assert nodes[source]["order"] < nodes[target]["order"]
    for node in workflow["nodes"]:
        told = [i["link"] for i in node["inputs"]] + [n for o in node["outputs"] for n in o["links"] or []]
        assert {number for number in told if number is not None} <= set(links)


def test_nothing_that_must_be_connected_is_left_open(workflow):
    for node in workflow["nodes"]:
        assert [i["name"] for i in node["inputs"] if i["link"] is None and "widget" not in i and "shape" not in i] == []
        assert all(i.get("shape", OPTIONAL) == OPTIONAL for i in node["inputs"])


def test_our_nodes_have_the_sockets_of_their_schemas(workflow, schemas):
    assert ours(workflow)
    for node in ours(workflow):
        schema = schemas[node["type"]]
        plain = [i for i in schema.inputs if i.io_type not in WIDGETS]
        shown = plain + [i for i in schema.inputs if i.io_type in WIDGETS]  # as the front end orders them
        assert [(i["name"], i["type"]) for i in node["inputs"]] == [(i.id, i.io_type) for i in shown]
        assert [i["name"] for i in node["inputs"] if "widget" in i] == [i.id for i in shown[len(plain) :]]
        told = [(o.display_name or o.io_type, o.io_type) for o in schema.outputs]
        assert [(o["name"], o["type"]) for o in node["outputs"]] == told


def test_our_nodes_have_values_that_their_inputs_allow(workflow, schemas):
    for node in ours(workflow):
        for socket, value in values(node, schemas[node["type"]]):
            if socket.io_type in ("INT", "FLOAT"):
                assert socket.min <= value <= socket.max, socket.id
            elif socket.id == "student":  # a file that the user brings, or ours
                assert value in socket.options or re.fullmatch(r"(loras|checkpoints|diffusion_models)/[\w.]+", value)
            elif socket.io_type in ("STRING", "BOOLEAN"):
                assert type(value) is type(socket.default), socket.id
            else:
                assert value in socket.options, socket.id


def test_a_demo_needs_no_file(file, workflow, nodes):
    kinds = {node["type"] for node in workflow["nodes"]}
    demo = "TurboDistillLoadDemoModel" in kinds
    assert demo == (" demo " in file.stem.lower())
    if demo:
        assert not {"LoadImage", "CheckpointLoaderSimple", "TurboDistillImageFolder"} & kinds
        students = [n["widgets_values"][0] for n in ours(workflow) if n["type"] == "TurboDistillLoadStudent"]
        prompts = [n["widgets_values"][0] for n in ours(workflow) if n["type"] == "TurboDistillPrompts"]
        assert students + prompts in ([nodes.load.BUILT_IN], ["built in: the demo model's"])


@pytest.mark.parametrize("file", [f for f in FILES if " Distil " in f.stem], indirect=True, ids=lambda file: file.stem)
def test_what_is_distilled_is_what_the_pairs_show(workflow):
    """The same MODEL, CLIP and VAE at both nodes; pictures come with their captions."""
    nodes = {node["type"]: node for node in workflow["nodes"]}
    origin = {link[0]: link[1:3] for link in workflow["links"]}

    def sources(kind):
        return {i["name"]: origin[i["link"]] for i in nodes[kind]["inputs"] if i["link"]}

    pairs, distill = sources("TurboDistillTeacherPairs"), sources("TurboDistillDistill")
    assert all(pairs[name] == distill[name] for name in ("model", "clip", "vae"))
    assert distill["pairs"] == [nodes["TurboDistillTeacherPairs"]["id"], 0]
    pictures = nodes.get("TurboDistillImageFolder", {"id": None})["id"]
    assert distill.get("images", [None])[0] == pictures
    assert pairs["prompts"][0] == (pictures or nodes["TurboDistillPrompts"]["id"])


def test_names_stand_in_the_order_of_their_numbers():
    numbers = [int(file.stem.split()[0]) for file in FILES]
    assert numbers == list(range(1, len(FILES) + 1))


def test_a_note_says_what_to_do(workflow):
    (note,) = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    (text,) = note["widgets_values"]
    assert text.startswith("## ") and "**" in text and len(text) < 1000


def test_the_form_of_app_mode_is_made_of_widgets_and_pictures(workflow):
    """What the page leaves out without a word if there is no such node or widget."""
    form = workflow["extra"].get("linearData", {"inputs": [], "outputs": []})
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, name in form["inputs"]:
        node = nodes[number]
        panel = name == "panel" and node["type"] == "TurboDistillDistill"
        assert panel or name in [i["widget"]["name"] for i in node["inputs"] if "widget" in i and i["link"] is None]
    assert {nodes[number]["type"] for number in form["outputs"]} <= {"PreviewImage", "SaveImage"}
    assert bool(form["inputs"]) == bool(form["outputs"])


def test_templates_with_a_form():
    forms = [file for file in FILES if "linearData" in json.loads(file.read_text(encoding="utf-8"))["extra"]]
    assert [file.stem[:2] for file in forms] == ["01", "06", "08"]


def box(node):
    """Left, top, right and bottom; a node's title stands above its place, and is all that is shown of a folded one."""
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - 30, left + width, top + (0 if node["flags"].get("collapsed") else height)


def test_nodes_do_not_cover_each_other(workflow):
    for one, other in combinations(workflow["nodes"], 2):
        a, b = box(one), box(other)
        apart = a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
        assert apart, (one["type"], other["type"])


def test_words_can_be_read_when_it_opens(workflow):
    """The page shows the whole of a template when it opens it, and draws no words where that makes them too small."""
    shown = [box(node | {"flags": {}}) for node in workflow["nodes"]]  # Nodes 2.0 leaves room for folded ones
    left, top, right, bottom = zip(*shown, strict=True)
    room = 0.818 * 1440 / (max(right) - min(left)), 0.818 * 900 / (max(bottom) - min(top))  # in a small window
    assert min(room) > 0.56
