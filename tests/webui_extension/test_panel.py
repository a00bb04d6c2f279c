"""The accordion's choices, words, Set and Undo, without a host."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from turbodistill.core.card import StudentCard
from turbodistill.core.families import FAMILIES
from turbodistill.core.schedule import trailing_timesteps
from turbodistill.webui_extension import panel
from turbodistill.webui_extension.panel import Settings
from turbodistill.webui_extension.samplers import DETECT, FEW_STEP, NOTHING, ONE_STEP

PLAIN = Settings("a fox", "DPM++ 2M", 20, 7.0)


@pytest.fixture
def files(tmp_path):
    """Two students, of one step and of four."""
    made = {}
    for name, timesteps in (("quick", (999,)), ("fine", (999, 749, 499, 249))):
        card = StudentCard("lora", "a base", "0" * 16, "sd", "eps", "eps", timesteps, 4.0, (64, 64))
        made[name] = tmp_path / f"{name}.safetensors"
        save_file({"weight": torch.zeros(1)}, made[name], card.to_metadata())
    return made


def test_students_are_told_by_what_the_host_has_read():
    about = {"z": {"turbodistill.card": {}}, "style": {"ss_tag_frequency": {}}, "dmd2_sdxl_4step_lora": {}}
    assert panel.students(about) == ["dmd2_sdxl_4step_lora", "z"]


def test_the_list_begins_with_detect():
    assert panel.choices(["mine", "LCM"]) == [DETECT, "mine", "LCM", *(name for name in FAMILIES if name != "LCM")]


@pytest.mark.parametrize(("student", "sampler", "steps"), [("quick", ONE_STEP, 1), ("fine", FEW_STEP, 4)])
def test_set_makes_what_the_card_says_and_undo_puts_it_back(files, student, sampler, steps):
    now, before, words = panel.apply(student, PLAIN, None, files, None)
    assert now == Settings(f"a fox <lora:{student}:1>", sampler, steps, 1.0)
    assert words.startswith(f"{'One' if steps == 1 else 'Few'}-step student of a base")
    assert panel.undo(now, before) == PLAIN


@pytest.mark.parametrize(
    ("sampler", "steps", "then"),
    [
        ("DPM++ 2M", 20, ("DPM++ 2M", 20)),
        ("DPM++ 2M", 150, ("DPM++ 2M", 150)),
        ("Euler a", 4, ("Euler a", 16)),
        (ONE_STEP, 1, ("Euler", 16)),
        (FEW_STEP, 8, ("Euler", 8)),
    ],
)
def test_set_leaves_sampler_and_steps_to_a_student_of_guidance_alone(files, tmp_path, sampler, steps, then):
    timesteps = tuple(trailing_timesteps(16))
    card = StudentCard("lora", "a base", "0" * 16, "sd", "eps", "eps", timesteps, 4.0, (64, 64), guidance_only=True)
    files["alone"] = tmp_path / "alone.safetensors"
    save_file({"weight": torch.zeros(1)}, files["alone"], card.to_metadata())
    mine = Settings("a fox", sampler, steps, 7.0)
    now, before, words = panel.apply("alone", mine, None, files, None)
    assert now == Settings("a fox <lora:alone:1>", *then, 1.0)
    assert words.startswith("Guidance-only student of a base") and "as its base, with any sampler, 16 steps" in words
    assert panel.undo(now, before) == mine


def test_what_was_written_since_stays(files):
    now, before, _ = panel.apply("quick", PLAIN, None, files, None)
    longer = Settings(f"{now.prompt}, at night", now.sampler, now.steps, now.cfg)
    assert panel.undo(longer, before).prompt == "a fox, at night"


@pytest.mark.parametrize("weight", ["0.7", "-1", "1:0.5", "unet=0.8"])
def test_undo_finds_the_student_whose_weight_was_edited(files, weight):
    now, before, _ = panel.apply("quick", PLAIN, None, files, None)
    edited = replace(now, prompt=f"a fox <lora:quick:{weight}>, at night <lora:quicker:1>")
    assert panel.undo(edited, before).prompt == "a fox, at night <lora:quicker:1>"


def test_another_student_takes_the_first_one_s_place(files):
    once, before, _ = panel.apply("quick", PLAIN, None, files, None)
    twice, before, _ = panel.apply("fine", once, before, files, None)
    assert twice.prompt == "a fox <lora:fine:1>"
    assert panel.undo(twice, before) == PLAIN


def test_a_student_that_the_user_has_in_the_prompt_stays(files):
    mine = Settings("a fox <lora:quick:0.8>", "Euler", 5, 2.0)
    now, before, _ = panel.apply("quick", mine, None, files, None)
    assert now.prompt == mine.prompt and panel.undo(now, before) == mine


def test_detect_goes_by_the_prompt_and_the_checkpoint(files):
    now, _, words = panel.apply(DETECT, Settings("<lora:fine:1>", "Euler", 20, 7.0), None, files, None)
    assert now == Settings("<lora:fine:1>", FEW_STEP, 4, 1.0) and words.startswith("LoRA fine: student of a base")
    now, _, words = panel.apply(DETECT, PLAIN, None, files, Path("sdxl_lightning_2step.safetensors"))
    assert now == Settings("a fox", FEW_STEP, 2, 1.0) and "SDXL-Lightning: made for 2 steps" in words


def test_where_nothing_is_found_nothing_is_set(files):
    told = f"Nothing was set. {NOTHING}"
    assert panel.apply(DETECT, PLAIN, None, files, Path("v1-5.safetensors")) == (PLAIN, None, told)
    now, before, words = panel.apply("gone", PLAIN, None, files, None)
    assert now == PLAIN and before is None and words.startswith("Nothing was set: 'gone' is neither")
    once, before, _ = panel.apply("quick", PLAIN, None, files, None)
    assert panel.apply("gone", once, before, files, None)[:2] == (once, before)  # Undo is still there


def test_where_all_is_set_already_it_says_so(files):
    once, before, words = panel.apply("quick", PLAIN, None, files, None)
    assert not words.startswith("Nothing")
    for choice in ("quick", DETECT):  # detect finds the student that Set has put into the prompt
        twice, again, words = panel.apply(choice, once, before, files, None)
        assert twice == once and words.startswith("Nothing had to be set, all is as it is wanted.\n")
        assert panel.undo(twice, again) == PLAIN


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_sets_its_own_steps(files, family):
    now, before, words = panel.apply(family, PLAIN, None, files, None)
    recipe = FAMILIES[family].sampling
    assert (now.prompt, now.steps, now.cfg) == ("a fox", recipe.steps, recipe.cfg)
    assert words.startswith(f"As chosen: {family}: made for")
    assert panel.undo(now, before) == PLAIN


def test_a_lora_comes_with_the_weight_that_it_was_made_for(files, tmp_path):
    name = "Hyper-SD3-8steps-CFG-lora"
    save_file({"weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    now, *_ = panel.apply(name, PLAIN, None, files | {name: tmp_path / f"{name}.safetensors"}, None)
    assert (now.prompt, now.sampler, now.steps, now.cfg) == (f"a fox <lora:{name}:0.125>", FEW_STEP, 8, 5.0)


def test_words_for_a_choice(files, tmp_path):
    base = tmp_path / "sdxl.safetensors"
    save_file({"model.diffusion_model.input_blocks.4.1.attn2.to_k.weight": torch.zeros(2, 2048)}, base)
    said = panel.describe("quick", "", files, base)
    assert said.startswith("quick was made for a base (0000000000000000), the loaded model is another (")
    assert "One-step student of a base" in said
    assert "negative prompts do nothing" in panel.describe("quick", "", files, None)
    assert panel.describe(DETECT, "a fox", files, None) == NOTHING
    assert panel.describe("gone", "", files, None).startswith("'gone' is neither")


def test_undo_without_set_changes_nothing():
    assert panel.undo(PLAIN, None) == PLAIN
