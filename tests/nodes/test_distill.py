"""The nodes that make a student of the loaded model: from prompts to a MODEL, whatever comes between."""

import re

import pytest
import torch
from PIL import Image
from turbodistill.core.families import SamplingRecipe
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.pairs import load_pairs
from turbodistill.trainer.data.samples import read_shard
from turbodistill.trainer.run import run, training

RUN = "/turbodistill/runs/3"


# --- from prompts to a student ---


def test_a_graph_from_prompts_to_a_student(nodes, graph, comfyui, server, places, kit):
    before, made = kit.bits(graph.model), kit.x0(graph.model, comfyui)
    lines = nodes.data.Prompts.run(source=nodes.data.Prompts.TEXT, text="\n".join(kit.words), file="")[0]
    often = {"preview_every": 2, "evaluate_every": 2, "taps": ""}
    outputs = graph.distill(graph.pairs(prompts=lines), advanced=often, updates=4).args
    model, student, words, previews, lora, losses = outputs

    assert kit.same(kit.bits(graph.model), before) and kit.hooks(graph.model) == 0
    assert graph.model.patches == {} and torch.equal(kit.x0(graph.model, comfyui), made)
    assert all(p.requires_grad for p in graph.model.model.parameters())  # as they were loaded

    card = student.card
    assert words == card.in_words() and (card.base_model, card.architecture) == ("toy.safetensors", "toy-v1")
    assert card.base_hash == nodes.patcher.model_hash(graph.model) and card.resolution == (16, 16)
    assert (card.kind, card.rank, card.guidance, card.timesteps) == ("lora", 2, 2.0, (999,))
    assert card.training["updates"] in (2, 4)  # the best one
    assert (card.training["pairs"], card.training["batch_size"]) == (12, 4)

    assert student.path == kit.folder(places) / training.BEST and student.model is model
    assert sorted(p.name for p in kit.folder(places).iterdir()) == [training.HISTORY, training.STATE, training.BEST]
    weights = {k for k, v in graph.model.model.state_dict().items() if k.endswith("weight") and v.ndim > 1}
    assert set(model.patches) == weights
    sampling = nodes.patcher.sampling_of(model)
    assert (sampling.start, sampling.prediction) == (999, "inherit")
    assert not torch.allclose(kit.x0(model, comfyui), made, atol=1e-3)

    # A picture of every prompt that was held out, at the size of the pairs.
    assert previews.shape == (4, 16, 16, 3) and previews.dtype == torch.float32 and not previews.requires_grad
    assert previews.isfinite().all()
    # What ComfyUI's own nodes go on with: the file's tensors, and a curve.
    assert kit.same(lora, kit.tensors(places))
    told = server.sent[-1][1]
    assert losses == {"loss": told["history"]["losses"]["regression"]} and len(losses["loss"]) == 4
    assert (told["state"], told["done"], told["node"], told["name"]) == ("done", 4, "3", "my-turbo")
    assert [p["update"] for p in told["previews"]] == [0, 2, 4, 4] and told["warnings"] == []


def test_the_previews_are_what_the_student_makes(nodes, graph, comfyui, places):
    pairs = graph.pairs()
    model, _, _, previews, *_ = graph.distill(pairs).args
    samples = load_pairs(pairs.folder)
    _, held = run.split(samples)
    sigmas = nodes.patcher.sigmas_for(model, (999,))
    with model.loaded() as network, torch.no_grad():
        x = samples.noise(held) * (1 + sigmas[0] ** 2).sqrt()
        latents = network.apply_model(x, sigmas[:1].expand(len(x)), samples.cond.rows(held).context)
    expected = graph.vae.decode(latents)
    assert torch.allclose(previews, expected, atol=0.05 * expected.std().item())  # the file is in half precision


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_guidance_alone_is_distilled_by_one_setting(nodes, graph, toys, loaded, places, server, prediction):
    graph.model = loaded(prediction, toys.row)
    ticked = {"guidance_only": True, "preview_every": 0}
    model, student, words, *_, losses = graph.distill(graph.pairs(pair_steps=9), advanced=ticked, updates=3).args
    assert student.card.guidance_only and len(student.card.timesteps) == 9
    assert words.startswith("Guidance-only student of toy.safetensors")
    sampling = nodes.patcher.sampling_of(model)
    assert sampling.ordinary and sampling.steps == 9 and model.patches
    told = server.sent[-1][1]
    assert told["warnings"] == [] and told["history"]["losses"] == {"guidance": losses["loss"]}


def test_what_guidance_alone_cannot_have_is_told_on_the_node(nodes):
    with pytest.raises(ConfigError, match="guidance_only is true and student_steps is 4: such a student is sampled as"):
        nodes.distill.AdvancedSettings.run(guidance_only=True, student_steps=4)


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_other_predictions_are_distilled_too(graph, toys, loaded, prediction, places, kit):
    graph.model = loaded(prediction, toys.row)
    before = kit.bits(graph.model)
    model, student, *_ = graph.distill(graph.pairs()).args
    assert student.card.base_prediction == prediction and model.patches
    assert kit.same(kit.bits(graph.model), before)


def test_a_full_copy_is_made_where_the_rank_is_zero(nodes, graph, kit):
    before = kit.bits(graph.model)
    model, student, _, _, lora, losses = graph.distill(graph.pairs(), rank=0).args
    assert student.card.kind == "full" and lora.message == "the student is a full one: there is no LoRA"
    assert len(losses["loss"]) == 3
    assert set(model.patches) == {nodes.patcher.PREFIX + name for name in nodes.patcher.base_weights(graph.model)}
    assert kit.same(kit.bits(graph.model), before)


def test_a_curve_through_fewer_than_two_losses_is_none(graph):
    assert "no two losses" in graph.distill(graph.pairs(), updates=1)[5].message


def test_a_model_that_no_file_gave_is_called_by_its_own_title(graph):
    graph.file = ""
    assert graph.distill(graph.pairs())[1].card.base_model == "toy"


@pytest.mark.parametrize(("file", "warned"), [("sd_xl_turbo_1.0_fp16.safetensors", 1), ("sd_xl_base.safetensors", 0)])
def test_a_model_that_looks_one_step_already_is_warned_of(graph, server, file, warned):
    graph.file = file
    graph.distill(graph.pairs())
    warnings = server.sent[-1][1]["warnings"]
    assert len(warnings) == warned and all("SDXL-Turbo, which is distilled already" in text for text in warnings)


def test_settings_come_from_all_three_nodes(graph, places, kit):
    pairs = graph.pairs(guidance=3.0, seed=5)
    graph.distill(
        pairs, advanced={"regression_updates": 3, "student_steps": 2, "adversarial": "relativistic"}, updates=5, rank=1
    )
    config = kit.state(places)["config"]
    assert (config["guidance"], config["seed"], config["pair_sampler"]) == (3.0, 5, "euler")
    assert (config["regression_updates"], config["student_steps"], config["adversarial"]) == (3, 2, "relativistic")
    assert (config["updates"], config["rank"], config["batch_size"], config["gradient_checkpointing"]) == (
        5,
        1,
        4,
        True,
    )


def test_without_advanced_settings_the_trainer_s_own_count(graph, places, kit):
    graph.distill(graph.pairs(), settings=None, updates=1)
    config = kit.state(places)["config"]
    assert (config["lr"], config["regression_updates"], config["head_channels"]) == (2e-4, 200, 64)


@pytest.mark.parametrize("name", ["my-turbo", "my-turbo.safetensors", ""])
def test_a_student_is_gone_on_from_by_its_name_among_the_loras_or_by_its_path(graph, nodes, places, kit, name):
    pairs = graph.pairs()
    student = graph.distill(pairs)[1]
    graph.save(student)
    start = name or str(student.path)
    second = graph.distill(pairs, "second", {"init_student": start})[1]
    assert second.card.training["init_student"] == ((name and "my-turbo.safetensors") or student.path.name)
    assert second.card.training["updates"] == student.card.training["updates"] + 3


def test_a_card_s_memory_chooses_checkpointing_and_parts_of_the_batch(graph, server, places, kit):
    graph.distill(graph.pairs(), vram=24.0)
    config = kit.state(places)["config"]
    assert (config["gradient_checkpointing"], config["batch_size"], config["vram"]) == (False, 4, 24.0)
    told = server.sent[-1][1]["memory"]
    assert told.startswith("for a card of 24.0 GB: gradient_checkpointing false; training takes about ")


def test_what_is_set_on_the_node_stays_and_too_small_a_card_is_told(graph, server, places, kit):
    pairs = graph.pairs()
    graph.distill(pairs, vram=24.0, batch_size=3, gradient_checkpointing=False)
    assert server.sent[-1][1]["memory"].startswith(
        "for a card of 24.0 GB: as it is set; set by hand, and kept: batch_size, gradient_checkpointing; training"
    )
    with pytest.raises(ConfigError, match=r"for a card of 0.9 GB: .*No settings make it fit: .* are missing"):
        graph.distill(pairs, "other", vram=0.9)
    assert server.sent[-1][1]["state"] == "failed" and not kit.folder(places, "other").joinpath(training.STATE).exists()


# --- pictures of one's own ---


@pytest.fixture
def images(nodes, places):
    pets = places.input / "pets"
    pets.mkdir()
    for k in range(3):
        Image.effect_noise((20, 20), 60).convert("RGB").save(pets / f"{k}.png")
        (pets / f"{k}.txt").write_text(f"pet {k}")
    return nodes.data.ImageFolder.run(folder="pets", broken_pictures="stop")


@pytest.mark.parametrize(("positives", "used"), [("teacher", "both"), ("both", "both"), ("real", "real")])
def test_pictures_are_taken_for_real(graph, images, places, positives, used, kit):
    graph.distill(graph.pairs(), images=images[0], advanced={"positives": positives})
    assert kit.state(places)["config"]["positives"] == used
    encoded = read_shard(kit.folder(places) / "images" / "images-0000000.safetensors")
    assert encoded.latents.shape == (3, 4, 8, 8) and encoded.prompts == ["pet 0", "pet 1", "pet 2"]


def test_captions_are_prompts(graph, images):
    assert graph.pairs(prompts=images[1]).prompts == ["pet 0", "pet 1", "pet 2"]


@pytest.mark.parametrize("positives", ["both", "real"])
def test_real_positives_without_pictures_are_refused(graph, places, positives, kit):
    with pytest.raises(
        ConfigError, match=f"positives is '{positives}' but there are no images: give a folder, or use 'teacher'"
    ):
        graph.distill(graph.pairs(), advanced={"positives": positives})
    assert not kit.folder(places).exists()


# --- what does not fit ---


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../outside",
        "a/b",
        "a\\b",
        "/outside/a",
        "C:a",
        ".hidden",
        "dot.",
        "space ",
        " space",
        "a|b",
    ],
)
def test_a_name_that_is_no_folder_s_is_refused(graph, places, name):
    pairs = graph.pairs()
    with pytest.raises(ConfigError, match=re.escape(f"name is {name!r}: give one that can be a folder's")):
        graph.distill(pairs, name=name)
    assert [p.name for p in (places.output / "turbodistill").iterdir()] == ["pairs"]


@pytest.mark.parametrize("name", ["my-turbo", "My Turbo 1.5", "ünï", "a"])
def test_a_name_that_is_one_is_taken(nodes, places, name, kit):
    assert nodes.distill.run_folder(name) == kit.folder(places, name)


def test_pairs_of_another_model_are_refused(graph, toys, loaded, clip_of, places, kit):
    pairs = graph.pairs()
    for other in ({"model": loaded(make=toys.row, seed=1)}, {"clip": clip_of(seed=1)}):
        with pytest.raises(DataError, match="the pairs were made with another model or CLIP: connect the same ones"):
            graph.distill(pairs, **other)
    assert not kit.folder(places).exists()


def test_a_clip_with_a_lora_is_the_same_whether_it_is_loaded_or_not(nodes, graph):
    styled = graph.clip.patcher
    plain = nodes.patcher.clip_hash(graph.clip)
    styled.add_patches({"weight": (torch.ones(64, 6),)}, 0.5)
    asleep = nodes.patcher.clip_hash(graph.clip)
    with styled.loaded():
        assert nodes.patcher.clip_hash(graph.clip) == asleep != plain
    styled.patches.clear()
    styled.add_patches({"weight": (torch.ones(64, 6),)}, 0.7)
    assert nodes.patcher.clip_hash(graph.clip) != asleep


def test_a_student_is_not_distilled_again(nodes, graph, places, kit):
    pairs = graph.pairs()
    model = graph.distill(pairs)[0]
    for student in (model, nodes.patcher.with_sampling(graph.model, SamplingRecipe("SDXL-Turbo"))):
        with pytest.raises(
            ValueError, match=r"this MODEL is sampled as .* already: connect the model as it was loaded"
        ):
            graph.distill(pairs, name="again", model=student)
    assert not kit.folder(places, "again").exists()


def test_a_vae_of_another_model_is_refused(graph, comfyui, places, kit):
    with pytest.raises(ValueError, match=r"the VAE makes latents of 16 channels, the model wants 4"):
        graph.distill(graph.pairs(), vae=comfyui.Pictures(16))
    assert not kit.folder(places).exists()


def test_other_settings_of_a_run_that_is_there_are_refused_and_nothing_is_lost(graph, places, kit):
    pairs = graph.pairs()
    graph.distill(pairs)
    before = {p: p.read_bytes() for p in kit.folder(places).iterdir()}
    with pytest.raises(ConfigError, match="rank was 2 and is 3"):
        graph.distill(pairs, rank=3)
    with pytest.raises(ConfigError, match=r"a training with other pairs \(other prompts\)"):
        graph.distill(graph.pairs(prompts=["other"]))
    assert {p: p.read_bytes() for p in kit.folder(places).iterdir()} == before


def test_a_network_without_known_blocks_says_so(graph, toys, loaded, places):
    graph.model = loaded(make=toys.conv)
    pairs = graph.pairs()
    with pytest.raises(
        ValueError, match="no known blocks in ConvBackbone: set gradient_checkpointing and compile to false"
    ):
        graph.distill(pairs, advanced={"taps": "conv_in,down"})
    assert graph.distill(pairs, advanced={"taps": "conv_in,down"}, gradient_checkpointing=False)[0].patches
