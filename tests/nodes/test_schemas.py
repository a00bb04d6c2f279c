"""What every node says of itself: id, words, inputs and outputs, and its help page."""

import asyncio
import inspect
import re
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import turbodistill
from turbodistill.trainer.config import Config
from turbodistill.trainer.groups import LATER, OF_GUIDANCE, OF_PROMPTS, OF_SIZES, OF_VRAM

# Ids are forever: saved workflows name nodes by them.
IDS = (
    "TurboDistillLoadStudent",
    "TurboDistillDetectOneStep",
    "TurboDistillSample",
    "TurboDistillScheduler",
    "TurboDistillSampler",
    "TurboDistillCompare",
    "TurboDistillLoadDemoModel",
    "TurboDistillPrompts",
    "TurboDistillImageFolder",
    "TurboDistillTeacherPairs",
    "TurboDistillDistill",
    "TurboDistillAdvancedSettings",
    "TurboDistillSaveStudent",
)
# What ComfyUI runs unasked, with all that leads to them: they show or keep something.
OUTPUT_NODES = {
    "TurboDistillCompare",
    "TurboDistillImageFolder",
    "TurboDistillTeacherPairs",
    "TurboDistillDistill",
    "TurboDistillSaveStudent",
}
ROOT = Path(turbodistill.__file__).parent


@pytest.fixture(scope="module")
def found(nodes):
    """Node id -> class, as ComfyUI asks our door for them."""
    extension = asyncio.run(turbodistill.comfy_entrypoint())
    return {cls.define_schema().node_id: cls for cls in asyncio.run(extension.get_node_list())}


@pytest.fixture(params=IDS)
def node(request, found):
    return found[request.param]


def test_the_door_leads_to_every_node(nodes, comfyui, found):
    extension = asyncio.run(turbodistill.comfy_entrypoint())
    assert isinstance(extension, comfyui.ComfyExtension)
    listed = asyncio.run(extension.get_node_list())
    written = [
        cls
        for module in vars(nodes).values()
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, comfyui.ComfyNode) and cls.__module__ == module.__name__
    ]
    assert len(listed) == len(found) and set(found) == set(IDS)  # unique, and none renamed
    assert set(listed) == set(written)  # none forgotten
    assert all(re.fullmatch(r"TurboDistill[A-Z]\w+", name) for name in found)


def test_a_node_says_what_it_is(node):
    schema = node.define_schema()
    schema.validate()
    assert schema.display_name and schema.category == "TurboDistill"
    assert schema.description.endswith(".") and len(schema.description) > 30


def test_display_names_tell_nodes_apart(found):
    names = {cls.define_schema().display_name for cls in found.values()}
    assert len(names) == len(found)


def test_every_input_and_output_is_explained(node):
    schema = node.define_schema()
    assert [socket.id for socket in schema.inputs if not socket.tooltip] == []
    assert [o.id for o in schema.outputs if not o.tooltip and o.io_type not in ("MODEL", "CLIP", "VAE")] == []


def test_inputs_are_those_that_execute_takes(node):
    inputs = node.define_schema().inputs
    names = [socket.id for socket in inputs]
    taken = inspect.signature(node.execute).parameters.values()
    own = [p.name for p in taken if p.kind is not p.VAR_KEYWORD]
    if len(own) == len(taken):
        assert own == names
    else:  # the others are settings of a distillation
        assert set(own) <= set(names) and set(names) - set(own) <= set(Config.__dataclass_fields__)
    optional = {i.id for i in inputs if i.optional} - {*OF_PROMPTS, *OF_GUIDANCE, *OF_SIZES, *OF_VRAM, *LATER}
    assert {p.name for p in taken if p.default is not p.empty} == optional
    for other in ("validate_inputs", "fingerprint_inputs"):
        if asks := getattr(node, other, None):
            parameters = inspect.signature(asks).parameters.values()
            assert {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} <= set(names)


def test_defaults_are_allowed_values(node):
    for socket in node.define_schema().inputs:
        if socket.io_type in ("INT", "FLOAT"):
            assert socket.min <= socket.default <= socket.max, socket.id
        elif socket.io_type == "COMBO":
            assert socket.options and (socket.default is None or socket.default in socket.options), socket.id


@pytest.mark.parametrize("name", IDS)
def test_the_help_page_names_every_input(found, name):
    schema = found[name].define_schema()
    page = (ROOT / turbodistill.WEB_DIRECTORY / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    assert {socket.id for socket in schema.inputs} - set(re.findall(r"\*\*(\w+)\*\*", page)) == set()


def test_every_help_page_is_a_node_s():
    pages = {p.stem for p in (ROOT / turbodistill.WEB_DIRECTORY / "docs").glob("*.md")}
    assert pages == set(IDS)


def test_what_runs_unasked(found):
    assert {name for name, cls in found.items() if cls.define_schema().is_output_node} == OUTPUT_NODES


def test_words_to_search_by_are_given_where_the_host_takes_them(nodes, monkeypatch):
    about = {"node_id": "Any", "inputs": [], "outputs": []}
    assert not hasattr(nodes.schema.schema(["turbo"], **about), "search_aliases")
    newer = make_dataclass("Schema", [*about, "search_aliases"])
    monkeypatch.setattr(nodes.schema.io, "Schema", newer)
    assert nodes.schema.schema(("turbo", "fast"), **about).search_aliases == ["turbo", "fast"]


@pytest.mark.parametrize(
    ("name", "warned"), [("turbodistill", 0), ("ComfyUI_turbo-distill.2", 0), ("turbo distill", 1), ("é", 1)]
)
def test_a_folder_from_which_the_page_gets_no_file_is_told(nodes, caplog, name, warned):
    nodes.extension.check_folder(name)
    assert caplog.text.count(f"folder {name!r}") == warned
