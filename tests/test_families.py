"""What is known of one-step models made elsewhere, and how they are recognised."""

import pytest
import torch
from safetensors.torch import save_file
from turbodistill.core.card import StudentCard
from turbodistill.core.families import FAMILIES, SamplingRecipe, by_file, of_card, recognise
from turbodistill.core.schedule import DiscreteSchedule

NAMES = {
    "sd_xl_turbo_1.0_fp16.safetensors": ("SD-Turbo, SDXL-Turbo", "inherit", 999, 1, True),
    "sd_turbo.safetensors": ("SD-Turbo, SDXL-Turbo", "inherit", 999, 1, True),
    "sdxl_lightning_1step_x0.safetensors": ("SDXL-Lightning", "x0", 999, 1, False),
    "sdxl_lightning_2step.safetensors": ("SDXL-Lightning", "inherit", 999, 2, False),
    "sdxl_lightning_4step_lora.safetensors": ("SDXL-Lightning", "inherit", 999, 4, False),
    "sdxl_lightning_8step_unet.safetensors": ("SDXL-Lightning", "inherit", 999, 8, False),
    "juggernautXL_v9Rdphoto2Lightning.safetensors": ("SDXL-Lightning", "inherit", 999, 4, False),
    "Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors": ("Hyper-SD", "inherit", 800, 1, True),
    "Hyper-SD15-4steps-lora.safetensors": ("Hyper-SD", "inherit", 999, 4, False),
    "Hyper-SDXL-8steps-lora.safetensors": ("Hyper-SD", "inherit", 999, 8, False),
    "dmd2_sdxl_1step_unet_fp16.safetensors": ("DMD2", "inherit", 399, 1, True),
    "dmd2_sdxl_4step_lora_fp16.safetensors": ("DMD2", "inherit", 999, 4, True),
    "nitrosd-realism_unet.safetensors": ("NitroFusion Realism", "inherit", 999, 1, True),
    "nitrosd-vibrant_unet.safetensors": ("NitroFusion Vibrant", "inherit", 999, 1, True),
    "lcm-lora-sdxl.safetensors": ("LCM", "lcm", 999, 4, True),
    "LCM_Dreamshaper_v7_4k.safetensors": ("LCM", "lcm", 999, 4, True),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_recognised_by_its_file_name(name):
    found = recognise(name)
    assert (found.name, found.prediction, found.start, found.steps, found.renoise) == NAMES[name]


@pytest.mark.parametrize(
    "name",
    ["v1-5-pruned-emaonly.safetensors", "dreamshaper_8.safetensors", "hyperreal.safetensors", "TurboDistill demo", ""],
)
def test_an_ordinary_model_is_not_taken_for_one(name):
    assert recognise(name) is None


def test_the_first_hint_that_says_something_counts():
    assert recognise("model.safetensors", "SDXL-Lightning 2-step", "sd_turbo").steps == 2


def test_nitro_shifts_the_timestep_that_the_network_is_told():
    assert FAMILIES["NitroFusion Realism"].sampling.shift == 250
    assert FAMILIES["NitroFusion Vibrant"].sampling.shift == 500


@pytest.mark.parametrize(
    ("start", "steps", "denoise", "timesteps"),
    [
        (999, 1, 1.0, [999]),
        (999, 4, 1.0, [999, 749, 499, 249]),
        (999, 1, 0.6, [599]),
        (999, 2, 0.5, [499, 249]),
        (800, 1, 1.0, [800]),
        (399, 1, 0.5, [199]),
        (999, 8, 0.001, [7, 6, 5, 4, 3, 2, 1, 0]),  # no two steps at one level
    ],
)
def test_timesteps_trail_from_the_start(start, steps, denoise, timesteps):
    assert SamplingRecipe("", start=start).timesteps(steps, denoise) == timesteps


def test_the_known_starts_have_the_known_sigmas():
    schedule = DiscreteSchedule()
    for name, steps, sigma in (("SD-Turbo, SDXL-Turbo", 1, 14.6146), ("DMD2", 1, 1.161)):
        start = FAMILIES[name].for_steps(steps).timesteps(1)[0]
        assert float(schedule.sigma(start)) == pytest.approx(sigma, rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "denoise", "words"),
    [(0, 1.0, "steps is 0"), (9, 1.0, "1 to 8"), (1, 0.0, "denoise is 0"), (1, 1.5, "denoise is 1.5")],
)
def test_what_cannot_be_sampled_is_told(steps, denoise, words):
    with pytest.raises(ValueError, match=words):
        SamplingRecipe("").timesteps(steps, denoise)


def test_a_student_of_ours_is_sampled_as_its_card_says():
    card = StudentCard("lora", "base", "0" * 16, "sd", "v", "v", (899, 674), 4.0, (64, 64))
    assert of_card(card) == SamplingRecipe("student of base", "inherit", 899, 2, exact=True)
    assert of_card(StudentCard("lora", "base", "0" * 16, "sd", "x0", "v", (999,), 4.0, (64, 64))).prediction == "x0"


def test_a_file_says_how_it_is_sampled(tmp_path):
    card = StudentCard("lora", "base", "0" * 16, "sd", "v", "v", (899,), 4.0, (64, 64))
    files = {"lcm": card.to_metadata(), "titled": {"modelspec.title": "SDXL-Lightning 2-step"}, "plain": None}
    for name, metadata in files.items():
        save_file({"weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors", metadata)
    assert by_file(tmp_path / "lcm.safetensors", "lcm") == of_card(card)  # its card counts more than its name
    assert by_file(tmp_path / "titled.safetensors", "titled").steps == 2
    assert by_file(tmp_path / "titled.safetensors", "dmd2").name == "DMD2"
    assert by_file(tmp_path / "plain.safetensors", "plain") is None
    assert by_file(tmp_path / "gone.ckpt", "sd_turbo.ckpt").name == "SD-Turbo, SDXL-Turbo"
