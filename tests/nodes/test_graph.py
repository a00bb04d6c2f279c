"""Which weight files a node's model comes from, read off the prompt."""

import pytest


def node(**inputs):
    return {"class_type": "Any", "inputs": inputs}


PROMPT = {
    "1": node(ckpt_name="base.safetensors"),
    "2": node(model=["1", 0], clip=["1", 1], lora_name="style.safetensors", strength=0.5),
    "3": node(model=["2", 0], lora_name="lightning_4step.safetensors"),
    "4": node(model=["3", 0], positive=["5", 0]),
    "5": node(text="not a.safetensors file", clip=["6", 0]),
    "6": node(clip_name="clip_l.safetensors"),
    "7": node(model=["4", 0]),
}


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("1", []),  # its own file is not upstream of it
        ("2", ["base.safetensors"]),
        ("3", ["style.safetensors", "base.safetensors"]),
        ("4", ["lightning_4step.safetensors", "style.safetensors", "base.safetensors"]),  # of the model alone
        ("elsewhere", []),
    ],
)
def test_files_upstream_are_named_nearest_first(nodes, asked, names):
    assert nodes.graph.file_names(PROMPT, asked) == names


def test_everything_behind_the_model_counts(nodes):
    names = ["lightning_4step.safetensors", "style.safetensors", "clip_l.safetensors", "base.safetensors"]
    assert nodes.graph.file_names(PROMPT, "7") == names


def test_another_input_is_followed_if_named(nodes):
    assert nodes.graph.file_names(PROMPT, "4", through="positive") == ["clip_l.safetensors"]
    assert nodes.graph.file_names(PROMPT, "4", through="negative") == []


def test_two_ways_to_one_node_name_its_file_once(nodes):
    prompt = {
        "1": node(ckpt_name="base.safetensors"),
        "2": node(model=["1", 0]),
        "3": node(model1=["1", 0], model2=["2", 0]),
        "4": node(model=["3", 0]),
    }
    assert nodes.graph.file_names(prompt, "4") == ["base.safetensors"]


def test_a_cycle_ends(nodes):
    prompt = {
        "1": node(model=["2", 0], name="a.ckpt"),
        "2": node(model=["1", 0], name="b.GGUF"),
        "3": node(model=["2", 0]),
    }
    assert nodes.graph.file_names(prompt, "3") == ["b.GGUF", "a.ckpt"]
    assert nodes.graph.file_names(prompt, "1") == ["b.GGUF", "a.ckpt"]  # it is upstream of itself


@pytest.mark.parametrize(
    "upstream",
    [
        {},  # the node that is linked to is not in the prompt
        {"1": {}},  # or has no inputs
        {
            "1": node(
                size=512, on=True, name=None, empty=[], single=["file.ckpt"], nested={"a": "b.ckpt"}, picture="fox.png"
            )
        },
    ],
)
def test_what_is_no_file_is_passed_over(nodes, upstream):
    assert nodes.graph.file_names(upstream | {"2": node(model=["1", 0])}, "2") == []


@pytest.mark.parametrize("value", [None, "model.safetensors", 3])
def test_an_input_without_a_link_has_nothing_upstream(nodes, value):
    assert nodes.graph.file_names({"1": node(model=value)}, "1") == []


def test_numbers_are_node_ids_too(nodes):
    assert nodes.graph.file_names({"1": node(a="x.pt"), "2": node(model=[1, 0])}, 2) == ["x.pt"]


def clip_graph(**last):
    """A prompt whose sampler 9 reads its text by a CLIP that other nodes have changed."""
    return {
        "1": node(ckpt_name="base.safetensors"),
        "2": {"class_type": "CLIPSetLastLayer", "inputs": {"clip": ["1", 1], "stop_at_clip_layer": -2} | last},
        "3": node(clip=["2", 0], lora_name="style.safetensors"),
        "4": node(clip=["3", 0], text="a fox"),
        "5": node(conditioning_1=["4", 0], strength=0.5),
        "9": node(positive=["5", 0], model=["1", 0]),
    }


def test_where_the_clip_behind_a_prompt_stops(nodes):
    layer = nodes.graph.clip_layer
    assert layer(clip_graph(), "9") == -2
    assert layer(clip_graph(stop_at_clip_layer=["7", 0]), "9") == 0  # another node gives it
    plain = clip_graph() | {"3": node(clip=["1", 1], lora_name="style.safetensors")}
    assert layer(plain, "9") is None
    assert layer(plain | {"5": node(name="a file of conditioning")}, "9") == 0 == layer({}, "9")
    nearer = clip_graph() | {"4": node(clip=["8", 0])}
    nearer["8"] = {"class_type": "CLIPSetLastLayer", "inputs": {"clip": ["3", 0], "stop_at_clip_layer": -1}}
    assert layer(nearer, "9") == -1
