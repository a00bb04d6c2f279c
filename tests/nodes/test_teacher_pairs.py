"""The node Teacher Pairs: where pairs lie, how they go on, and by which sampler they are made."""

import itertools
import random

import pytest
import torch
from PIL import Image
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.data.files import DataError, read_tensors
from turbodistill.trainer.data.pairs import load_pairs
from turbodistill.trainer.groups import OF_PAIRS
from turbodistill.trainer.run import session

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


# --- resolution buckets ---


@pytest.fixture
def images(nodes, places):
    folder = places.input / "pets"
    folder.mkdir()
    for k, size in enumerate([(60, 40), (90, 60), (50, 50), (60, 90)]):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"pet {k}")
    return nodes.data.ImageFolder.run(folder="pets", broken_pictures="stop")[0]


def test_buckets_are_the_sizes_that_the_pictures_fit_and_all_are_taught(graph, images, places, kit):
    pairs = graph.pairs(sizes="buckets", images=images, width=32, height=32)
    assert pairs.settings["sizes"] == "24x40, 32x32, 40x24"
    assert sorted(p.name for p in pairs.folder.iterdir()) == ["24x40", "32x32", "40x24"]
    assert load_pairs(pairs.folder / "24x40").latents.shape == (4, 4, 20, 12)
    assert graph.pairs(sizes=pairs.settings["sizes"], width=32, height=32).folder == pairs.folder
    student = graph.distill(pairs, images=images)[1]
    assert student.card.sizes == "24x40, 32x32, 40x24"
    assert {p.name for p in (kit.folder(places) / "images").iterdir()} == {"24x40", "32x32", "40x24"}


def test_buckets_need_pictures_and_pairs_enough(graph, images):
    with pytest.raises(DataError, match=r"sizes is 'buckets', .*: connect an Image Folder to images"):
        graph.pairs(sizes="buckets")
    with pytest.raises(ConfigError, match="pairs is 8: 3 sizes need at least 12"):
        graph.pairs(sizes="buckets", images=images, width=32, height=32, pairs=8)


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
