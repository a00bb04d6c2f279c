"""Nodes that give a distillation its data: prompts, pictures of one's own, and the teacher's pairs."""

import itertools
import json
import random
import sys

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from turbodistill.demo import files
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.data.built_in import LISTS
from turbodistill.trainer.data.files import DataError, read_tensors
from turbodistill.trainer.data.pairs import load_pairs
from turbodistill.trainer.data.prompts import read_prompts
from turbodistill.trainer.groups import OF_PAIRS
from turbodistill.trainer.run import session

# --- Prompts ---


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


# --- Image Folder ---


@pytest.fixture
def pictures(places):
    """A folder of captioned pictures in the input folder."""
    folder = places.input / "pets"
    folder.mkdir()
    for k, text in enumerate(("a fox", "an owl", "a fox", "an owl")):
        Image.new("RGB", (40, 20 + k), (80 * k, 0, 0)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(text)
    return folder


def test_a_folder_of_pictures_with_their_captions(nodes, pictures):
    node = nodes.data.ImageFolder
    for name in ("pets", " pets ", str(pictures)):
        made = node.run(folder=name, broken_pictures="stop")
        assert made[0] == nodes.data.Images(pictures, "stop") and made[2] == "4 pictures"
        assert made[1] == ["a fox", "an owl"]  # as prompts, each once
        assert made.ui.image.shape == (4, 256, 256, 3) and 0 <= made.ui.image.min() <= made.ui.image.max() <= 1


def test_of_many_pictures_some_are_shown(nodes, pictures):
    for k in range(4, 20):
        Image.new("RGB", (8, 8)).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text(f"number {k}")
    made = nodes.data.ImageFolder.run(folder="pets", broken_pictures="stop")
    assert len(made.ui.image) == 16 and len(made[1]) == 18


def broken(folder):
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])


def without_caption(folder):
    (folder / "2.txt").unlink()


def emptied(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (broken, r"picture .*2\.png cannot be read .*: replace or remove it"),
        (without_caption, r"1 pictures have no caption, the first is .*2\.png"),
        (emptied, "holds no picture"),
    ],
)
def test_pictures_that_cannot_be_used_are_told(nodes, pictures, harm, told):
    harm(pictures)
    with pytest.raises(DataError, match=told):
        nodes.data.ImageFolder.run(folder="pets", broken_pictures="stop")


def test_a_broken_picture_is_found_among_those_that_are_not_shown(nodes, pictures):
    for k in range(4, 20):
        Image.new("RGB", (8, 8)).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text("a dot")
    (pictures / "9.png").write_bytes(b"no picture")  # the last by name
    with pytest.raises(DataError, match=r"9\.png cannot be read"):
        nodes.data.ImageFolder.run(folder="pets", broken_pictures="stop")


@pytest.mark.parametrize(("name", "told"), [("  ", "folder is empty: give the name"), ("nowhere", "does not exist")])
def test_a_folder_that_is_none_is_told(nodes, pictures, name, told):
    with pytest.raises(DataError, match=told):
        nodes.data.ImageFolder.run(folder=name, broken_pictures="stop")


def test_a_changed_folder_is_looked_at_again(nodes, pictures):
    stamp = nodes.data.ImageFolder.fingerprint_inputs
    before = stamp("pets")
    assert stamp("pets") == before
    (pictures / "0.txt").write_text("another")
    assert stamp("pets") != before
    before = stamp("pets")
    emptied(pictures)
    assert stamp("pets") != before  # that nothing is left is told when it is run, not when it is asked whether to run


def test_pictures_that_cannot_be_used_are_left_out_where_that_is_wanted(nodes, pictures):
    for harm in (broken, lambda folder: (folder / "3.txt").unlink()):
        harm(pictures)
    made = nodes.data.ImageFolder.run(folder="pets", broken_pictures="skip")
    assert made[0].broken_pictures == "skip" and len(made.ui.image) == 2
    assert "left out: 1 pictures without a caption" in made[2]  # the broken one is found when it is encoded
    with pytest.raises(ConfigError, match="broken_pictures is 'no': use one of stop, skip"):
        nodes.data.ImageFolder.run(folder="pets", broken_pictures="no")


# --- Teacher Pairs ---


def shards(pairs):
    return {path.name: path.read_bytes() for path in pairs.folder.iterdir()}


def test_pairs_lie_in_a_folder_of_their_own_kind(nodes, graph, places, kit):
    pairs = graph.pairs()
    assert pairs.folder.parent == places.output / "turbodistill" / "pairs"
    assert (pairs.width, pairs.height, pairs.prompts) == (16, 16, kit.words)
    assert set(pairs.settings) == {*OF_PAIRS}
    samples = load_pairs(pairs.folder)
    assert samples.latents.shape == (12, 4, 8, 8) and samples.latents[:].isfinite().all()
    assert samples.prompts == [*kit.words, *kit.words[:3]]


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": ["other"]},
        {"guidance": 3.0},
        {"seed": 1},
        {"pair_steps": 3},
        {"height": 32},
    ],
)
def test_other_pairs_have_another_folder(graph, changes):
    before = graph.pairs()
    stamp = shards(before)
    assert graph.pairs(**changes).folder != before.folder and shards(before) == stamp


def test_pairs_of_another_model_have_another_folder(graph, toys, loaded, clip_of):
    folders = {graph.pairs().folder}
    styled = graph.model.clone()
    key = "diffusion_model.conv_in.weight"
    styled.add_patches({key: (torch.ones(8, 4, 3, 3),)}, 0.5)
    stronger = graph.model.clone()
    stronger.add_patches({key: (torch.ones(8, 4, 3, 3),)}, 0.7)
    for other in (styled, stronger, loaded(make=toys.row, seed=1)):
        folders.add(graph.pairs(model=other).folder)
    folders.add(graph.pairs(clip=clip_of(seed=1)).folder)
    assert len(folders) == 5


def test_more_pairs_go_on_from_those_that_are_there(graph):
    few, many = graph.pairs(), graph.pairs(pairs=20)
    assert few.folder == many.folder
    assert len(load_pairs(many.folder)) == 20


def test_a_choice_is_drawn_for_every_pair(graph):
    pairs = graph.pairs(prompts=["a {red|blue} fox"], pairs=8)
    made = load_pairs(pairs.folder).prompts
    assert len(made) == 8 and set(made) == {"a red fox", "a blue fox"}
    assert graph.pairs(prompts=["a {red|blue} fox"], pairs=12).folder == pairs.folder  # where more go on


@pytest.mark.parametrize("seed", range(3))
def test_cancelled_pairs_are_kept_and_the_next_run_goes_on(graph, comfyui, server, kit, tmp_path, seed):
    whole = load_pairs(graph.pairs().folder)
    whole_latents = whole.latents[:]
    for path in (graph.pairs().folder).iterdir():
        path.unlink()
    before = kit.bits(graph.model)
    number = random.Random(seed).randint(2, 6)  # of the six passes: three batches of two steps
    handle = graph.at_pass(number, comfyui.server.interrupt_current_processing)
    with pytest.raises(comfyui.server.InterruptProcessingException):
        graph.pairs()
    handle.remove()
    assert server.sent[-1][1]["state"] == "cancelled" and server.sent[-1][1]["done"] == (number - 1) // 2 * 4
    assert kit.same(kit.bits(graph.model), before) and kit.hooks(graph.model) == 0
    passes = []
    handle = graph.model.model.diffusion_model.register_forward_pre_hook(lambda *_: passes.append(1))
    again = load_pairs(graph.pairs().folder)
    handle.remove()
    assert len(passes) == 6 - (number - 1) // 2 * 2  # what was made is not made again
    assert torch.equal(again.latents[:], whole_latents) and again.prompts == whole.prompts
    assert server.sent[-1][1]["state"] == "done" and server.sent[-1][1]["done"] == 12


def test_pairs_are_shown_while_they_are_made(nodes, graph, server, places, monkeypatch):
    monkeypatch.setattr(session, "PICTURES_EVERY", 0)
    graph.pairs()
    _, told = server.sent[-1]
    assert (told["kind"], told["what"], told["unit"], told["total"]) == ("pairs", "teacher pairs", "pairs", 12)
    assert len(told["pictures"]) == 8  # the newest
    for picture in told["pictures"]:
        with Image.open(places.temp / picture["subfolder"] / picture["filename"]) as shown:
            assert shown.size == (16, 16)


def test_a_model_that_cannot_be_distilled_is_told_before_pairs_are_made(nodes, graph, comfyui, places):
    from turbodistill.core.families import SamplingRecipe

    with pytest.raises(ValueError, match="sampled as SDXL-Turbo already"):
        graph.pairs(model=nodes.patcher.with_sampling(graph.model, SamplingRecipe("SDXL-Turbo")))
    with pytest.raises(ValueError, match=r"latents of 16 channels, the model wants 4: connect the VAE"):
        graph.pairs(vae=comfyui.Pictures(16))
    with pytest.raises(ValueError, match="17 x 16 pixels: give multiples of 2"):
        graph.pairs(width=17)
    assert not (places.output / "turbodistill").exists()


# --- a SAMPLER and SIGMAS of ComfyUI's ---


@pytest.fixture
def sigmas():
    """From noise to 0 in three steps."""
    return torch.tensor([14.6146, 5.0, 1.0, 0.0])


def test_a_sampler_and_sigmas_decide_the_pairs_and_their_folder(graph, comfyui, sigmas):
    euler, noisy = (
        comfyui.sampling.ksampler("euler"),
        comfyui.sampling.KSAMPLER(sample_ancestral),
    )
    plain = graph.pairs(pair_steps=3)
    made = [graph.pairs(**given) for given in (
        {"sampler": euler}, {"sigmas": sigmas}, {"sampler": euler, "sigmas": sigmas}, {"sampler": noisy},
        {"sampler": noisy, "sigmas": sigmas}, {"sampler": comfyui.sampling.KSAMPLER(sample_ancestral, {"eta": 0.5})},
    )]  # fmt: skip
    # Of sigmas alone the sampler is ComfyUI's of pair_sampler's name.
    assert len({plain.folder, *(pairs.folder for pairs in made)}) == 6 and made[1].folder == made[2].folder
    assert graph.pairs(sampler=euler, sigmas=sigmas, pair_steps=9, pair_sampler="dpmpp_2m").folder == made[2].folder
    recipe = read_tensors(made[2].folder / "pairs-0000000.safetensors")[1]
    assert recipe["sampler"] == "ComfyUI's euler" and recipe["steps"].startswith("3 from sigma 14.61 (SIGMAS ")


def sample_ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0):
    """Draws noise from the seed that it is given, and from torch's own."""
    generator = torch.Generator().manual_seed(extra_args["seed"])
    for sigma, following in itertools.pairwise(sigmas):
        x0 = model(x, sigma * x.new_ones(len(x)), **extra_args)
        x = x0 + following * (torch.randn(x.shape, generator=generator) + eta * torch.randn_like(x)) / 2
    return x


def test_a_picture_depends_on_its_seed_alone_whatever_the_sampler_draws(graph, comfyui, sigmas):
    sampler = comfyui.sampling.KSAMPLER(sample_ancestral)
    found = []
    for at_once in (1, 3, 12):
        torch.manual_seed(at_once)
        pairs = graph.pairs(sampler=sampler, sigmas=sigmas, at_once=at_once)
        found.append(load_pairs(pairs.folder).latents[:].clone())
        for path in pairs.folder.iterdir():
            path.unlink()
    assert torch.allclose(found[0], found[1], atol=2e-3) and torch.allclose(found[0], found[2], atol=2e-3)


def test_distill_samples_what_is_missing_of_them_the_same_way(graph, comfyui, sigmas, places, kit):
    pairs = graph.pairs(sampler=comfyui.sampling.ksampler("euler"), sigmas=sigmas)
    whole = load_pairs(pairs.folder).latents[:].clone()
    for path in pairs.folder.iterdir():
        path.unlink()
    graph.distill(pairs, advanced={"precision": "auto"})  # as the pairs were made
    assert torch.equal(load_pairs(pairs.folder).latents[:], whole) and kit.folder(places).exists()


def with_guidance(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return model(x, sigmas[:1].expand(len(x)), denoise_mask=None, model_options={"sampler_post_cfg_function": [print]})


def larger(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return torch.cat([x, x], -1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([14.6], "sigmas has 0 steps: give 1 to 1000"),
        ([14.6, 5.0, 0.5], r"sigmas end at 0\.5: the last must be 0"),
        ([14.6, 5.0, 5.0, 0.0], "sigmas do not fall from step to step"),
        ([14.6, float("nan"), 0.0], "sigmas do not fall from step to step"),
        ([1.5, 0.7, 0.0], r"sigmas begin at 1\.5, where a part of a picture .* denoise to 1"),
        (with_guidance, r"changes the guidance within its steps \(sampler_post_cfg_function\)"),
        (larger, "makes pictures of another size"),
        ("custom", "sampler is a object, which works in a way of its own: connect KSamplerSelect"),
    ],
)
def test_a_sampler_or_sigmas_that_make_no_pairs_are_refused(graph, comfyui, given, words):
    if given == "custom":
        changes = {"sampler": object()}
    else:
        sampler = isinstance(given, list)
        changes = {"sigmas": torch.tensor(given)} if sampler else {"sampler": comfyui.sampling.KSAMPLER(given)}
    with pytest.raises(ValueError, match=words):
        graph.pairs(**changes)


# --- clip skip ---


def test_a_clip_that_stops_earlier_has_other_pairs_and_the_student_tells_it(nodes, graph, monkeypatch):
    plain = graph.pairs()
    graph.clip.layer_idx = -2
    earlier = graph.pairs()
    assert earlier.folder != plain.folder
    monkeypatch.setattr(type(graph.model.model.model_config), "architecture", "stable-diffusion-v1")
    card = graph.distill(earlier)[1].card
    assert card.clip_skip == 2 and "Clip skip: 2." in card.in_words()


@pytest.mark.parametrize(
    ("layer", "architecture", "skip"),
    [
        (None, "stable-diffusion-v1", 1),
        (-1, "stable-diffusion-v1", 1),
        (-2, "stable-diffusion-v1", 2),
        (None, "stable-diffusion-xl-v1-base", 2),
        (-2, "stable-diffusion-xl-v1-base", 2),
        (-3, "stable-diffusion-xl-v1-base", 3),
        (None, "stable-diffusion-v2", 1),
        (-2, "stable-diffusion-v2", 1),  # ComfyUI has the layer that diffusers leaves out
        (-3, "stable-diffusion-v2", 2),
        (-1, "stable-diffusion-v2", 0),
        (-2, "flux-1-dev", 0),
        (0, "stable-diffusion-v1", 0),
    ],
)
def test_a_layer_of_comfyui_s_as_clip_skip(nodes, layer, architecture, skip):
    assert nodes.patcher.clip_skip(layer, architecture) == skip
