"""The node Prompts: a text, a file, a built-in list, or pictures that say theirs."""

import json
import sys

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from turbodistill.demo import files
from turbodistill.trainer.data.built_in import LISTS
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.prompts import read_prompts


@pytest.fixture
def prompts(nodes, places):
    """The node, with nothing written in what is not asked for."""
    node = nodes.data.Prompts
    return lambda source, text="", file="", **more: node.run(source=source, text=text, file=file, **more).args


def test_prompts_are_the_lines_of_the_text(nodes, prompts):
    lines, examples, about = prompts(nodes.data.Prompts.TEXT, " a fox \n\n# a comment\nan owl\n")
    assert lines == ["a fox", "an owl"] and examples == "a fox\nan owl" and about == ""


def test_choices_are_drawn_in_the_examples_and_kept_for_the_pairs(nodes, prompts):
    lines, examples, _ = prompts(nodes.data.Prompts.TEXT, "a {red|blue} fox")
    assert lines == ["a {red|blue} fox"]
    assert sorted(examples.splitlines()) == ["a blue fox", "a red fox"]


def test_half_a_letter_is_told(nodes, prompts):
    with pytest.raises(DataError, match="is half a letter"):
        prompts(nodes.data.Prompts.TEXT, "a fox\n\ud800")


@pytest.mark.parametrize("text", ["", "  \n\n", "# only a comment"])
def test_a_text_without_a_prompt_is_told(nodes, prompts, text):
    with pytest.raises(DataError, match="no prompt in the text: write one a line"):
        prompts(nodes.data.Prompts.TEXT, text, "beside.txt")


def test_prompts_come_from_a_file_in_the_input_folder_or_anywhere(nodes, prompts, places, tmp_path):
    source = nodes.data.Prompts.FILE
    (places.input / "words").mkdir()
    (places.input / "words" / "mine.txt").write_text("a fox\n")
    outside = tmp_path / "outside.txt"
    outside.write_text("an owl\n")
    assert prompts(source, "not this", "words/mine.txt")[0] == ["a fox"]
    assert prompts(source, "not this", str(outside))[0] == ["an owl"]


@pytest.mark.parametrize("file", ["", ' "" ', "missing.txt", "/missing/prompts.txt"])
def test_a_file_that_is_not_there_is_told(nodes, prompts, file):
    with pytest.raises(DataError, match=r"does not exist: check the name|file is empty: give the name of a text file"):
        prompts(nodes.data.Prompts.FILE, "not this", file)


def test_what_is_built_in_needs_nothing(nodes, prompts):
    built_in = nodes.data.Prompts.BUILT_IN
    expected = {"auto": LISTS["prose"], **LISTS, "the demo model's": files.PROMPTS}
    assert list(built_in) == [f"built in: {name}" for name in expected]
    for source, path in zip(built_in, expected.values(), strict=True):
        lines, examples, about = prompts(source)
        assert lines == read_prompts(path) and len(examples.splitlines()) == 16
        assert "{" not in examples and bool(about) == (source == "built in: auto")
    assert nodes.data.Prompts.define_schema().inputs[0].options[2:] == list(built_in)


def test_auto_takes_what_suits_the_model_that_is_connected(nodes, prompts, graph, places):
    loader = {"1": {"inputs": {"ckpt_name": "noobaiXL.safetensors"}}, "2": {"inputs": {"model": ["1", 0]}}}
    asked = {"model": graph.model, "prompt": loader, "unique_id": "2"}
    lines, _, about = prompts("built in: auto", **asked)
    assert lines == read_prompts(LISTS["tags"])
    assert about == "prompts: the built-in list of tags, since the model's name says noobai"
    learnt = json.dumps({"1_a": {"a photograph of a red fox in deep snow": 30}})
    save_file({"a": torch.zeros(1)}, places.checkpoints / "noobaiXL.safetensors", {"ss_tag_frequency": learnt})
    lines, _, about = prompts("built in: auto", **asked)
    assert lines == read_prompts(LISTS["prose"]) and "metadata says that it learnt sentences" in about


def test_wildcards_lie_in_the_input_folder_or_beside_the_file(nodes, prompts, places):
    node = nodes.data.Prompts
    for folder, colour in ((places.input / "wildcards", "red"), (places.input / "words" / "wildcards", "blue")):
        folder.mkdir(parents=True)
        (folder / "colour.txt").write_text(f"{colour}\n")
    (places.input / "words" / "mine.txt").write_text("a __colour__ fox")
    assert prompts(node.TEXT, "a __colour__ owl")[0] == ["a {red} owl"]
    assert prompts(node.FILE, file="words/mine.txt")[0] == ["a {blue} fox"]
    with pytest.raises(DataError, match=r"there is no wildcard __color__ in .*, the nearest is __colour__"):
        prompts(node.TEXT, "a __color__ owl")
    before = node.fingerprint_inputs(node.TEXT, "a __colour__ owl", "")
    assert node.fingerprint_inputs(node.TEXT, "a __colour__ owl", "") == before
    (places.input / "wildcards" / "colour.txt").write_text("green\n")
    assert node.fingerprint_inputs(node.TEXT, "a __colour__ owl", "") != before


def test_one_s_own_pictures_give_their_prompts(nodes, prompts, places):
    node = nodes.data.Prompts
    (places.input / "made").mkdir()
    for name, text in (("a", "a {fox}\nNegative prompt: x"), ("b", "an owl")):
        about = PngInfo()
        about.add_text("parameters", text)
        Image.new("RGB", (8, 8)).save(places.input / "made" / f"{name}.png", pnginfo=about)
    Image.new("RGB", (8, 8)).save(places.input / "made" / "c.png")
    _, examples, about = prompts(node.FILE, file="made")
    assert examples == "a {fox}\nan owl"
    assert about.startswith("2 prompts of 2 pictures in ") and "1 have none that can be read" in about
    assert prompts(node.FILE, file="made/b.png")[0] == ["an owl"]
    before = node.fingerprint_inputs(node.FILE, "", "made")
    (places.input / "made" / "c.png").unlink()
    assert node.fingerprint_inputs(node.FILE, "", "made") != before


def test_a_changed_file_is_read_again(nodes, places):
    node, path = nodes.data.Prompts, places.input / "mine.txt"

    def stamp(source=node.FILE, text="", file="mine.txt"):
        return node.fingerprint_inputs(source, text, file)

    assert stamp() == stamp()  # also while there is none
    path.write_text("a fox")
    before = stamp()
    path.write_text("an owl")
    assert stamp() != before
    # A file that is not asked for is none of its business.
    assert stamp(node.TEXT) == stamp(node.TEXT) and stamp(node.TEXT, "a") != stamp(node.TEXT, "b")


@pytest.mark.parametrize("listen", ["0.0.0.0,::", "0.0.0.0", "192.168.0.7", "127.0.0.1,192.168.0.7"])
def test_where_others_reach_comfyui_files_are_read_from_its_own_folders_alone(
    nodes, prompts, places, tmp_path, monkeypatch, listen
):
    secret = tmp_path / "secret.txt"
    secret.write_text("password")
    (places.input / "mine.txt").write_text("a fox")
    (places.input / "mine.json").write_text("a fox")
    assert prompts(nodes.data.Prompts.FILE, file=f' "{secret}" ')[0] == ["password"]
    monkeypatch.setattr(sys.modules["comfy.cli_args"].args, "listen", listen)
    assert prompts(nodes.data.Prompts.FILE, file='"mine.txt"')[0] == ["a fox"]
    for path in (secret, "/etc/passwd", "../secret.txt", "mine.json"):
        with pytest.raises(DataError, match=r"is outside the folders that this server|is no file of prompts"):
            prompts(nodes.data.Prompts.FILE, file=str(path))
        assert nodes.data.Prompts.fingerprint_inputs(nodes.data.Prompts.FILE, "", str(path))
    with pytest.raises(DataError, match="is outside the folders"):
        nodes.data.ImageFolder.run(folder=str(tmp_path), broken_pictures="stop")
    assert "is outside the folders" in nodes.data.ImageFolder.fingerprint_inputs(str(tmp_path))
    settings = nodes.distill.AdvancedSettings.run(init_student=str(tmp_path / "theirs.safetensors"))[0]
    pairs = nodes.data.Pairs(places.output, ["a fox"], {}, 64, 64)
    with pytest.raises(DataError, match=r"theirs\.safetensors is outside the folders"):
        nodes.distill.Distill.run(model=None, clip=None, vae=None, pairs=pairs, name="x", settings=settings)
    # As `turbodistill_readable_folders` in extra_model_paths.yaml gives it.
    listed = sys.modules["folder_paths"].folder_names_and_paths
    monkeypatch.setitem(listed, "turbodistill_readable_folders", ([str(tmp_path)], set()))
    assert prompts(nodes.data.Prompts.FILE, file=str(secret))[0] == ["password"]
    with pytest.raises(DataError, match=r"in ComfyUI an entry of extra_model_paths\.yaml"):
        prompts(nodes.data.Prompts.FILE, file="/etc/passwd")
