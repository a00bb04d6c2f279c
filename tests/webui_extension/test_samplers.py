"""Which model is sampled how: by choice, by the prompt's LoRAs, by the checkpoint; and what is said of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from turbodistill.core.card import CardError, StudentCard
from turbodistill.core.families import FAMILIES, MOST
from turbodistill.core.fit import Base
from turbodistill.core.schedule import trailing_timesteps
from turbodistill.generate import recipe
from turbodistill.webui_extension import samplers
from turbodistill.webui_extension.samplers import DETECT, FEW_STEP, LIMITS, ONE_STEP, Found, find, passes, remarks

# The hosts cut " <one of these>" off a sampler's name.
SCHEDULERS = (
    "Automatic", "Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform", "SGMUniform", "KL Optimal",
    "Align Your Steps", "Simple", "Normal", "DDIM", "Beta", "Turbo", "Align Your Steps GITS", "Align Your Steps 11",
)  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """LoRAs by name: a student of ours, one of a known family by its name, one by its title, and an ordinary one."""
    card = StudentCard("lora", "a base", "0" * 16, "sd", "x0", "eps", (799, 399), 4.0, (64, 64))
    about = {
        "my-turbo": card.to_metadata(),
        "Hyper-SD15-4steps-lora": None,
        "plain name": {"ss_output_name": "lcm-lora-sdv1-5"},
        "style": {"ss_output_name": "watercolours"},
    }
    for name, metadata in about.items():
        save_file({"weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors", metadata)
    return {name: tmp_path / f"{name}.safetensors" for name in about}


def test_no_name_ends_as_a_scheduler_s():
    assert not any(name.endswith(f" {scheduler}") for name in LIMITS for scheduler in SCHEDULERS)


@pytest.mark.parametrize(
    ("name", "asked", "made"),
    [(ONE_STEP, 1, 1), (ONE_STEP, 20, 1), (FEW_STEP, 1, 1), (FEW_STEP, 4, 4), (FEW_STEP, 20, MOST), (FEW_STEP, 0, 1)],
)
def test_passes(name, asked, made):
    assert passes(name, asked) == made


def test_the_first_lora_that_says_something_counts(files):
    found = find(DETECT, 1, files, ["style", "my-turbo", "plain name"])
    assert (found.source, found.sampling.start, found.sampling.prediction) == ("LoRA my-turbo", 799, "x0")
    assert find(DETECT, 1, files, ["style", "plain name"]).sampling.name == "LCM"
    assert find(DETECT, 1, files, ["Hyper-SD15-4steps-lora"]).sampling == FAMILIES["Hyper-SD"].for_steps(4)


def test_a_student_s_card_counts_before_every_name(files, tmp_path):
    """A style's LoRA may be called after lightning."""
    lightning, titled = tmp_path / "lightning_bolt_style.safetensors", tmp_path / "car.safetensors"
    save_file({"weight": torch.zeros(1)}, lightning)
    save_file({"weight": torch.zeros(1)}, titled, {"ss_output_name": "turbo_car_v3"})
    files |= {"lightning_bolt_style": lightning, "car": titled}
    for applied in (["lightning_bolt_style", "my-turbo"], ["car", "my-turbo"], ["my-turbo", "plain name"]):
        assert find(DETECT, 1, files, applied).source == "LoRA my-turbo"
    assert find(DETECT, 1, files, ["lightning_bolt_style"], files["my-turbo"]).sampling.start == 799


def test_then_the_checkpoint(files, tmp_path):
    turbo = tmp_path / "sd_xl_turbo_1.0.safetensors"
    assert find(DETECT, 1, files, ["style"], turbo) == Found(
        FAMILIES["SD-Turbo, SDXL-Turbo"].sampling, "Checkpoint sd_xl_turbo_1.0.safetensors"
    )
    assert find(DETECT, 1, files, ["my-turbo"], turbo).source == "LoRA my-turbo"
    assert find(DETECT, 1, {}, [], files["my-turbo"]).sampling.start == 799  # a whole student as the checkpoint


def test_else_as_a_turbo_and_it_is_said(files):
    found = find(DETECT, 1, files, ["style", "not there"], Path("v1-5-pruned.safetensors"))
    assert found.sampling.timesteps(1) == [999] and not found.source
    assert found.in_words().startswith("No student and no known one-step model")


def test_a_choice_counts_more(files):
    turbo = Path("sd_turbo.safetensors")
    assert find("my-turbo", 1, files, ["plain name"], turbo).sampling.start == 799
    assert find("DMD2", 4, files, ["my-turbo"], turbo).sampling.start == 999


@pytest.mark.parametrize(("steps", "start"), [(1, 399), (4, 999)])
def test_a_chosen_family_is_its_version_for_so_many_steps(files, steps, start):
    assert find("DMD2", steps, files, []).sampling.start == start


def test_a_wrong_choice_is_told(files):
    with pytest.raises(
        ValueError, match="'nonsense' is neither a LoRA here nor a family of one-step models \\(SD-Turbo"
    ):
        find("nonsense", 1, files, [])
    with pytest.raises(ValueError, match="the LoRA 'style' is no student"):
        find("style", 1, files, [])


@pytest.mark.parametrize(
    ("prompt", "weights"),
    [
        ("a fox", {}),
        ("a <lora:one:1> fox <lora:two:0.5>", {"one": 1, "two": 0.5}),
        ("<lora:one> fox", {"one": 1}),
        ("<lora:one:0> <lora:two:1:0> <lora:three:0:-1> <lora:four:te=1:unet=0>", {"three": -1}),
        ("<lora:one:1:lbw=x> <lora:two:x>", {"one": 1, "two": 1}),
        ("<hypernet:one:1>", {}),
    ],
)
def test_the_loras_of_a_prompt(prompt, weights):
    assert samplers.applied_loras(prompt) == weights


def said(found, cfg=1.0, choice=DETECT, applied=(), steps=1):
    return " ".join(remarks(found, steps, cfg, choice, applied))


def test_what_is_said_below_a_picture(files):
    student = find("my-turbo", 1, files, [])
    assert said(student, choice="my-turbo", applied=["my-turbo"]) == ""
    assert "<lora:my-turbo:1> is not in the prompt" in said(student, choice="my-turbo")
    assert said(student, cfg=7.0) == "cfg is 7: student of a base was made for 1, more burns the picture."
    assert said(student, steps=4) == "steps is 4: student of a base was made for 1 to 2 steps."
    nothing = find(DETECT, 1, files, [])
    assert said(nothing, steps=4) == samplers.NOTHING
    burns = "cfg is 7: a one-step model was made for 1, more burns the picture."
    assert said(nothing, cfg=7.0) == f"{samplers.NOTHING} {burns}"  # a newcomer's first picture


def test_what_does_not_fit_between_students_and_the_model(files):
    students = samplers.students_among(["style", "my-turbo", "gone"], files)
    assert list(students) == ["my-turbo"]
    right = Base(hashes=(students["my-turbo"].base_hash,))
    assert samplers.misfits(students, {"my-turbo": 1.0}, right) == []
    (weight,) = samplers.misfits(students, {"my-turbo": 0.7}, right)
    assert weight.startswith("the weight of my-turbo is 0.7")
    (other,) = samplers.misfits(students, {"my-turbo": 1.0}, Base(hashes=("f" * 16,)))
    assert "the loaded model is another" in other
    with pytest.raises(CardError, match="made for a model that predicts"):
        samplers.misfits(students, {"my-turbo": 1.0}, Base(prediction="flow"))
    both = {"my-turbo": students["my-turbo"], "second": students["my-turbo"]}
    assert samplers.misfits(both, dict.fromkeys(both, 1.0), right) == [
        "2 students are in the prompt (my-turbo, second): their changes add up, use one."
    ]


@pytest.fixture
def alone(files, tmp_path):
    """A student of guidance alone among the files."""
    timesteps = tuple(trailing_timesteps(16))
    card = StudentCard("lora", "a base", "0" * 16, "sd", "eps", "eps", timesteps, 4.0, (64, 64), guidance_only=True)
    save_file({"weight": torch.zeros(1)}, tmp_path / "alone.safetensors", card.to_metadata())
    files["alone"] = tmp_path / "alone.safetensors"
    return files


def test_a_student_of_guidance_alone_wants_no_sampler_of_ours(alone):
    ours = samplers.students_among(["alone"], alone)
    assert samplers.by_another(ours, "DPM++ 2M", 20, 1.0) == []
    assert samplers.by_another(ours, "DPM++ 2M", 4, 7.0) == [
        "steps is 4: alone was made for 8 steps or more.",
        "cfg is 7: alone was made for 1, more burns the picture.",
    ]
    both = samplers.students_among(["alone", "my-turbo"], alone)
    assert samplers.by_another(both, "Euler", 20, 1.0) == [
        "my-turbo is a student: Euler is not made for it, take ADD few-step and CFG Scale 1."
    ]
    right = Base(hashes=(ours["alone"].base_hash,))
    assert samplers.misfits(ours, {"alone": 1.0}, right) == []
    with_ours = said(find("alone", 1, alone, []), choice="alone", applied=["alone"])
    assert "steps is 1" in with_ours and "take an ordinary sampler, 16 steps." in with_ours


def test_more_steps_than_are_made_are_told():
    assert samplers.too_many(ONE_STEP, 20) == ["ADD 1-step makes one pass: of 20 steps, 1."]
    assert samplers.too_many(FEW_STEP, 20) == ["ADD few-step makes at most 8 passes: of 20 steps, 8."]
    assert samplers.too_many(ONE_STEP, 1) == samplers.too_many(FEW_STEP, 8) == []


@pytest.mark.parametrize("base", ["eps", "v", "flow"])
def test_what_the_network_put_out_is_found_again(toys, base):
    toy, x, cond = toys.conv(base), toys.picture(), toys.cond()
    sigma = torch.tensor([0.9, 0.3])
    found = recipe.as_it_was_put_out(base, x, toy(x, sigma, cond), sigma)
    assert torch.allclose(found, toy.output(x, sigma, cond), atol=1e-5)


def test_lcm_is_eps_between_its_boundaries(toys):
    schedule, x, output = recipe.schedule_for("eps"), toys.picture(), toys.picture()
    sigma, timestep = torch.tensor([14.6, 0.0292]), torch.tensor([999.0, 0.0])
    found = recipe.to_x0("lcm", schedule, x, output, sigma, timestep)
    assert torch.allclose(found[0], (x - 14.6 * output)[0], rtol=1e-3)
    assert torch.equal(found[1], x[1])  # at timestep 0 the picture is the input


def test_the_metadata_is_not_read_as_code(tmp_path):
    # What the host has parsed as JSON may be a table in place of text.
    from turbodistill.webui_extension import panel

    about = {"a": {"turbodistill.card": json.loads("{}")}, "b": {"ss_output_name": {"x": 1}}, "lcm": {}}
    assert panel.students(about) == ["a", "lcm"]
