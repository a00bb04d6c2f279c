"""Nodes that give a MODEL to sample: our students' files, and models made elsewhere."""

import os
import re

import pytest
import torch
from safetensors.torch import save_file
from turbodistill.core.card import CardError, fingerprint
from turbodistill.core.families import FAMILIES


@pytest.fixture
def folders(comfyui, tmp_path, monkeypatch):
    """ComfyUI's model folders, empty; a file beside them."""
    roots = {name: tmp_path / "models" / name for name in ("loras", "checkpoints", "diffusion_models", "vae")}
    for root in roots.values():
        root.mkdir(parents=True)
    (tmp_path / "models" / "beside.safetensors").touch()
    monkeypatch.setattr(comfyui.server, "FOLDERS", roots)
    return roots


@pytest.fixture
def teacher(toys):
    return toys.conv("v")


@pytest.fixture
def lora(teacher, student_of, saved, folders):
    """A student of the toy, in models/loras."""
    path = saved(student_of(teacher))
    return path.rename(folders["loras"] / "fox.safetensors")


# --- Load Student ---


def options(nodes):
    schema = nodes.load.LoadStudent.define_schema()
    return next(socket.options for socket in schema.inputs if socket.id == "student")


def test_the_files_are_those_of_three_folders_and_the_built_in(nodes, folders):
    assert options(nodes) == [nodes.load.BUILT_IN]
    for place in ("loras/sub/deep.safetensors", "checkpoints/full.safetensors", "vae/other.safetensors"):
        path = folders["loras"].parent / place
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert options(nodes) == [nodes.load.BUILT_IN, "loras/sub/deep.safetensors", "checkpoints/full.safetensors"]


def test_every_choice_has_its_file(nodes, folders):
    (folders["loras"] / "sub").mkdir()
    (folders["loras"] / "sub" / "fox.safetensors").touch()
    (folders["diffusion_models"] / "fox.safetensors").touch()
    for choice in options(nodes):
        assert nodes.load.student_path(choice).is_file()
        assert nodes.load.LoadStudent.validate_inputs(student=choice) is True
    assert nodes.load.student_path("loras/sub/fox.safetensors") == folders["loras"] / "sub" / "fox.safetensors"
    assert nodes.load.student_path(nodes.load.BUILT_IN) == nodes.embedded.STUDENT


@pytest.mark.parametrize(
    "choice",
    ["loras/gone.safetensors", "vae/other.safetensors", "beside.safetensors", "loras/../beside.safetensors", ""],
)
def test_what_is_not_there_is_told_before_anything_runs(nodes, folders, choice):
    (folders["vae"] / "other.safetensors").touch()  # there, but no place for students
    with pytest.raises(FileNotFoundError, match="is not in ComfyUI's models: put it there, refresh"):
        nodes.load.student_path(choice)
    words = nodes.load.LoadStudent.validate_inputs(student=choice)
    assert words.startswith(f"student {choice} is not in ComfyUI's models")
    with pytest.raises(FileNotFoundError):  # ComfyUI takes this for "changed", so that the node runs and says it
        nodes.load.LoadStudent.fingerprint_inputs(student=choice, model=None, strength=1.0)


def test_a_choice_that_another_node_will_make_is_valid(nodes, folders):
    assert nodes.load.LoadStudent.validate_inputs(student=None) is True


def test_a_file_written_anew_is_loaded_anew(nodes, lora):
    def mark(strength):
        return nodes.load.LoadStudent.fingerprint_inputs(model=None, student="loras/fox.safetensors", strength=strength)

    first = mark(1.0)
    assert first == mark(0.5)  # the other inputs are ComfyUI's to compare
    os.utime(lora, ns=(0, lora.stat().st_mtime_ns + 1))
    assert mark(1.0) != first


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_student_is_loaded(nodes, teacher, model_of, lora, strength):
    model = model_of(teacher)
    out = nodes.load.LoadStudent.run(model=model, student="loras/fox.safetensors", strength=strength)
    patched, words = out.args
    assert patched is not model and {entries[0][0] for entries in patched.patches.values()} == {strength}
    assert nodes.patcher.sampling_of(patched).name == "student of toy"
    weight = "" if strength == 1 else f"the weight of fox.safetensors is {strength:g}: .*\n"
    card = re.escape(nodes.load.read_student(lora)[1].in_words())
    assert re.fullmatch(weight + card, words)


def test_a_warning_stands_before_the_card(nodes, toys, model_of, lora):
    stranger = toys.conv("v", seed=1)
    out = nodes.load.LoadStudent.run(model=model_of(stranger), student="loras/fox.safetensors", strength=1.0)
    warning, _, card = out[1].partition("\n")
    assert warning.startswith("fox.safetensors was made for toy") and fingerprint(stranger.backbone) in warning
    assert card == nodes.load.read_student(lora)[1].in_words()


def test_a_file_that_is_no_student_is_told(nodes, teacher, model_of, folders):
    save_file({"a": torch.zeros(1)}, folders["loras"] / "style.safetensors")
    with pytest.raises(CardError, match=r"style\.safetensors holds no student card"):
        nodes.load.LoadStudent.run(model=model_of(teacher), student="loras/style.safetensors", strength=1.0)


def test_the_built_in_student_names_its_base(nodes, teacher, model_of):
    with pytest.raises(CardError, match="Its base is TurboDistill demo"):
        nodes.load.LoadStudent.run(model=model_of(teacher), student=nodes.load.BUILT_IN, strength=1.0)


# --- Detect One-Step Model ---


def graph(*names):
    """A prompt in which a loader of each file follows the one before, and the node "asked" comes last."""
    prompt = {}
    for i, name in enumerate(names):
        prompt[str(i)] = {"inputs": {"file": name} | ({"model": [str(i - 1), 0]} if i else {})}
    return prompt | {"asked": {"inputs": {"model": [str(len(names) - 1), 0]}}}


@pytest.fixture
def detected(nodes, toys, model_of):
    """The sampling that the node attaches, and its words."""

    def run(*names, family=None, made_for_steps=0):
        node = nodes.load.DetectOneStep
        out = node.run(
            prompt=graph(*names),
            unique_id="asked",
            model=model_of(toys.conv()),
            family=family or node.AUTOMATIC,
            made_for_steps=made_for_steps,
        )
        return nodes.patcher.sampling_of(out[0]), out[1]

    return run


def test_it_asks_for_the_graph_that_it_reads(nodes):
    schema = nodes.load.DetectOneStep.define_schema()
    assert {hidden.name for hidden in schema.hidden} == {"prompt", "unique_id"}


def test_every_family_can_be_chosen(nodes):
    socket = next(s for s in nodes.load.DetectOneStep.define_schema().inputs if s.id == "family")
    assert socket.options == [nodes.load.DetectOneStep.AUTOMATIC, *FAMILIES]


@pytest.mark.parametrize(
    ("files", "family", "steps"),
    [
        (["sd_turbo.safetensors"], "SD-Turbo, SDXL-Turbo", None),
        (["sd_xl_base_1.0.safetensors", "sdxl_lightning_2step_lora.safetensors"], "SDXL-Lightning", 2),
        (["dmd2_sdxl_1step_unet_fp16.safetensors", "style.safetensors"], "DMD2", 1),
        (["sd_turbo.safetensors", "lcm-lora-sdv1-5.safetensors"], "LCM", None),  # the nearest counts
        (["Hyper-SDXL-8steps-lora.safetensors"], "Hyper-SD", 8),
    ],
)
def test_a_family_is_recognised_by_file_name(detected, files, family, steps):
    sampling, words = detected(*files)
    assert sampling == FAMILIES[family].for_steps(steps)
    assert words == sampling.in_words() and family in words


@pytest.mark.parametrize("folder", ["checkpoints", "diffusion_models", "loras"])
@pytest.mark.parametrize("key", ["modelspec.title", "ss_output_name", "title"])
def test_a_family_is_recognised_by_what_the_file_calls_itself(detected, folders, folder, key):
    save_file(
        {"a": torch.zeros(1)},
        folders[folder] / "renamed.safetensors",
        {"author": "turbo", key: "SDXL Lightning 2-step"},
    )
    assert detected("renamed.safetensors")[0] == FAMILIES["SDXL-Lightning"].for_steps(2)


def test_the_nearest_file_counts_by_metadata_too(detected, folders):
    save_file({"a": torch.zeros(1)}, folders["loras"] / "renamed.safetensors", {"modelspec.title": "LCM LoRA"})
    assert detected("sd_turbo.safetensors", "renamed.safetensors")[0].name == "LCM"


def test_a_file_whose_metadata_cannot_be_read_is_passed_over(detected, folders):
    (folders["loras"] / "broken.safetensors").write_bytes(b"no header")
    save_file({"a": torch.zeros(1)}, folders["loras"] / "plain.safetensors")
    assert detected("sd_turbo.safetensors", "plain.safetensors", "broken.safetensors")[0].name == "SD-Turbo, SDXL-Turbo"


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_steps_told_by_hand_outweigh_the_file_s(detected, steps):
    sampling, _ = detected("sdxl_lightning_2step.safetensors", made_for_steps=steps)
    assert sampling == FAMILIES["SDXL-Lightning"].for_steps(steps)
    assert sampling.prediction == ("x0" if steps == 1 else "inherit")


@pytest.mark.parametrize("steps", [0, 1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_chosen_by_hand_outweighs_the_file(detected, family, steps):
    sampling, _ = detected("unknown.safetensors", family=family, made_for_steps=steps)
    assert sampling == FAMILIES[family].for_steps(steps or None)
    assert detected("sd_turbo.safetensors", family=family, made_for_steps=steps)[0] == sampling


@pytest.mark.parametrize("steps", [0, 4])
def test_what_is_not_recognised_is_told_with_the_files(detected, steps):
    with pytest.raises(ValueError, match=r"recognised in b\.ckpt, a\.safetensors: choose the family"):
        detected("a.safetensors", "b.ckpt", made_for_steps=steps)


def test_a_merge_is_not_guessed_at(detected):
    name = "juggernautXL_v9Rdphoto2Lightning.safetensors"
    with pytest.raises(
        ValueError, match=f"choose the family, or sample as the page of {name} says, which may be a mer"
    ):
        detected("style.safetensors", name)


def test_a_family_of_another_kind_of_model_is_none(detected):
    """The toy predicts eps."""
    with pytest.raises(ValueError, match="no one-step family is recognised in z_image_turbo_bf16"):
        detected("z_image_turbo_bf16.safetensors")


@pytest.mark.parametrize("prompt", [None, {}, graph()])
def test_without_files_the_graph_is_blamed(nodes, toys, model_of, prompt):
    node = nodes.load.DetectOneStep
    inputs = {"model": model_of(toys.conv()), "family": node.AUTOMATIC, "made_for_steps": 0}
    with pytest.raises(ValueError, match="recognised in this graph: choose the family"):
        node.run(prompt=prompt, unique_id="asked", **inputs)


def test_the_model_it_was_given_stays_as_it_was(nodes, toys, model_of):
    model = model_of(toys.conv())
    nodes.load.DetectOneStep.run(model=model, family="LCM", made_for_steps=0)
    assert model.attachments == model.object_patches == {}
