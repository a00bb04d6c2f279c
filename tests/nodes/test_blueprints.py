"""The blueprints (subgraphs to add as one node) fit our nodes and themselves; a real ComfyUI's page runs them."""

import asyncio
import json
from pathlib import Path

import pytest
import turbodistill

FILES = sorted((Path(turbodistill.__file__).parent / "subgraphs").glob("*.json"))
INPUT, OUTPUT = -10, -20  # ids of what stands for the node's own sockets within
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@pytest.fixture(scope="module")
def schemas(nodes):
    """Node id -> schema."""
    extension = asyncio.run(turbodistill.comfy_entrypoint())
    found = [cls.define_schema() for cls in asyncio.run(extension.get_node_list())]
    return {schema.node_id: schema for schema in found}


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request):
    return request.param


@pytest.fixture
def blueprint(file):
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture
def within(blueprint):
    (subgraph,) = blueprint["definitions"]["subgraphs"]
    return subgraph


def test_there_are_two():
    assert [file.stem for file in FILES] == ["Distil the loaded checkpoint", "One-step picture"]


def test_it_is_one_node_with_the_sockets_of_its_graph(file, blueprint, within):
    (node,) = blueprint["nodes"]
    assert node["type"] == within["id"] and node["title"] == within["name"] == file.stem and not blueprint["links"]
    for side in ("inputs", "outputs"):
        assert [(s["name"], s["type"]) for s in node[side]] == [(s["name"], s["type"]) for s in within[side]]
    assert [i["name"] for i in node["inputs"] if i["type"] in WIDGETS] == [
        i["widget"]["name"] for i in node["inputs"] if "widget" in i
    ]


def test_it_can_be_found_and_says_what_it_does(blueprint, within):
    about = blueprint["extra"]
    assert about["BlueprintDescription"].endswith(".") and about["BlueprintSearchAliases"]
    assert within["category"] == "TurboDistill" and within["description"] == about["BlueprintDescription"]


def test_links_agree_with_both_ends(within):
    nodes = {node["id"]: node for node in within["nodes"]}
    ends = {INPUT: within["inputs"], OUTPUT: within["outputs"]}
    told = {link["id"]: link for link in within["links"]}
    assert len(told) == len(within["links"]) and max(told) == within["state"]["lastLinkId"]
    for number, link in told.items():
        begin = ends.get(link["origin_id"]) or nodes[link["origin_id"]]["outputs"]
        end = ends.get(link["target_id"]) or nodes[link["target_id"]]["inputs"]
        begin, end = begin[link["origin_slot"]], end[link["target_slot"]]
        assert begin["type"] == link["type"] == end["type"]
        assert number in begin.get("links", begin.get("linkIds")) and number in (
            end.get("link"),
            *end.get("linkIds", ()),
        )
    used = [number for socket in (*within["inputs"], *within["outputs"]) for number in socket["linkIds"]]
    used += [i["link"] for node in nodes.values() for i in node["inputs"] if i["link"]]
    used += [number for node in nodes.values() for o in node["outputs"] for number in o["links"] or ()]
    assert sorted(used) == sorted(2 * list(told))  # each at both ends, and no other


def test_our_nodes_are_as_their_schemas_say(within, schemas):
    ours = [node for node in within["nodes"] if node["type"].startswith("TurboDistill")]
    assert ours
    for node in ours:
        schema = schemas[node["type"]]
        plain = [i for i in schema.inputs if i.io_type not in WIDGETS]
        shown = plain + [i for i in schema.inputs if i.io_type in WIDGETS]  # as the front end orders them
        assert [(i["name"], i["type"]) for i in node["inputs"]] == [(i.id, i.io_type) for i in shown]
        told = [(o.display_name or o.io_type, o.io_type) for o in schema.outputs]
        assert [(o["name"], o["type"]) for o in node["outputs"]] == told
        needed = [i.id for i in plain if not i.optional]
        assert [i["name"] for i in node["inputs"] if i["name"] in needed and i["link"] is None] == []
        seeds = sum(bool(getattr(i, "control_after_generate", False)) for i in schema.inputs)
        assert len(node["widgets_values"]) == len(shown) - len(plain) + seeds
