"""What is known of one-step models made elsewhere, and how they are recognised."""

import time

import pytest
import torch
from safetensors.torch import save_file
from turbodistill.core.architecture import KNOWN
from turbodistill.core.card import StudentCard
from turbodistill.core.families import FAMILIES, MOST, SamplingRecipe, by_file, by_files, of_card, recognise, suspect
from turbodistill.core.schedule import DiscreteSchedule, FlowSchedule, trailing_timesteps

# A file's name -> its family, reading, start, steps, fresh noise between steps, cfg; as each family's page says.
TURBO, LIGHTNING, HYPER = "SD-Turbo, SDXL-Turbo", "SDXL-Lightning", "Hyper-SD"
NAMES = {
    "sd_xl_turbo_1.0_fp16.safetensors": (TURBO, "inherit", 999, 1, True, 1),
    "sd_xl_turbo_1.0.safetensors": (TURBO, "inherit", 999, 1, True, 1),
    "sd_turbo.safetensors": (TURBO, "inherit", 999, 1, True, 1),
    "sdxl-turbo-lora.safetensors": (TURBO, "inherit", 999, 1, True, 1),
    "sdxlTurbo.safetensors": (TURBO, "inherit", 999, 1, True, 1),
    "sd3.5_large_turbo.safetensors": ("SD3.5 Large Turbo", "inherit", 999, 4, False, 1),
    "stable-diffusion-3.5-large-turbo-Q8_0.gguf": ("SD3.5 Large Turbo", "inherit", 999, 4, False, 1),
    "sdxl_lightning_1step_x0.safetensors": (LIGHTNING, "x0", 999, 1, False, 1),
    "sdxl_lightning_1step_unet_x0.safetensors": (LIGHTNING, "x0", 999, 1, False, 1),
    "sdxl_lightning_2step.safetensors": (LIGHTNING, "inherit", 999, 2, False, 1),
    "sdxl_lightning_4step_lora.safetensors": (LIGHTNING, "inherit", 999, 4, False, 1),
    "sdxl_lightning_8step_unet.safetensors": (LIGHTNING, "inherit", 999, 8, False, 1),
    "SDXL Lightning 2-step": (LIGHTNING, "inherit", 999, 2, False, 1),
    "Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors": (HYPER, "inherit", 800, 1, True, 1),
    "Hyper-SDXL-1step-Unet.safetensors": (HYPER, "inherit", 800, 1, True, 1),
    "Hyper-SDXL-1step-lora.safetensors": ("Hyper-SD unified LoRA", "inherit", 999, 1, True, 1),
    "Hyper-SD15-1step-lora.safetensors": ("Hyper-SD unified LoRA", "inherit", 999, 1, True, 1),
    "Hyper-SDXL-2steps-lora.safetensors": (HYPER, "inherit", 999, 2, False, 1),
    "Hyper-SD15-4steps-lora.safetensors": (HYPER, "inherit", 999, 4, False, 1),
    "Hyper-SDXL-8steps-lora.safetensors": (HYPER, "inherit", 999, 8, False, 1),
    "Hyper-SDXL-8steps-CFG-lora.safetensors": ("Hyper-SD CFG", "inherit", 999, 8, False, 5),
    "Hyper-SD15-8steps-CFG-lora.safetensors": ("Hyper-SD CFG", "inherit", 999, 8, False, 5),
    "Hyper-SD3-4steps-CFG-lora.safetensors": ("Hyper-SD3", "inherit", 999, 4, False, 3),
    "Hyper-SD3-8steps-CFG-lora.safetensors": ("Hyper-SD3", "inherit", 999, 8, False, 5),
    "Hyper-FLUX.1-dev-8steps-lora.safetensors": ("Hyper-FLUX", "inherit", 999, 8, False, 1),
    "dmd2_sdxl_1step_unet_fp16.safetensors": ("DMD2", "inherit", 399, 1, True, 1),
    "dmd2_sdxl_4step_unet.safetensors": ("DMD2", "inherit", 999, 4, True, 1),
    "dmd2_sdxl_4step_lora_fp16.safetensors": ("DMD2", "inherit", 999, 4, True, 1),
    "nitrosd-realism_unet.safetensors": ("NitroFusion Realism", "inherit", 999, 1, True, 1),
    "nitrosd-realism_comfyui.safetensors": ("NitroFusion Realism", "inherit", 999, 1, True, 1),
    "nitrosd-vibrant_unet.safetensors": ("NitroFusion Vibrant", "inherit", 999, 1, True, 1),
    "NitroFusion-Vibrant.safetensors": ("NitroFusion Vibrant", "inherit", 999, 1, True, 1),
    "nitrofusion2_bf16.safetensors": ("NitroFusion2", "inherit", 999, 1, True, 1),
    "nitrofusion2_fp8_scaled.safetensors": ("NitroFusion2", "inherit", 999, 1, True, 1),
    "nf2-Q2_K_4XS.gguf": ("NitroFusion2", "inherit", 999, 1, True, 1),
    "Nitro-1-SD.safetensors": ("Nitro-1-SD", "inherit", 999, 1, True, 1),
    "SD2.1-Nitro.safetensors": ("Nitro-1-SD", "inherit", 999, 1, True, 1),
    "lcm-lora-sdxl.safetensors": ("LCM", "lcm", 999, 4, True, 1),
    "lcm-lora-sdv1-5.safetensors": ("LCM", "lcm", 999, 4, True, 1),
    "lcm-lora-ssd-1b.safetensors": ("LCM", "lcm", 999, 4, True, 1),
    "lcm_lora_sd15.safetensors": ("LCM", "lcm", 999, 4, True, 1),
    "LCM_Dreamshaper_v7_4k.safetensors": ("LCM", "lcm", 999, 4, True, 1),
    "TCD-SD15-LoRA.safetensors": ("TCD", "inherit", 999, 4, False, 1),
    "TCD-SDXL-LoRA.safetensors": ("TCD", "inherit", 999, 4, False, 1),
    "TCD-SD21-base-LoRA.safetensors": ("TCD", "inherit", 999, 4, False, 1),
    "pcm_sd15_smallcfg_2step_converted.safetensors": ("PCM", "inherit", 999, 2, False, 1),
    "pcm_sdxl_smallcfg_4step_converted_fp16.safetensors": ("PCM", "inherit", 999, 4, False, 1),
    "pcm_sd15_normalcfg_4step_converted.safetensors": ("PCM with CFG", "inherit", 999, 4, False, 3),
    "pcm_sdxl_normalcfg_8step_converted_fp16.safetensors": ("PCM with CFG", "inherit", 999, 8, False, 4.5),
    "pcm_sdxl_lcmlike_lora_converted_fp16.safetensors": ("PCM like LCM", "lcm", 999, 4, True, 1),
    "pcm_deterministic_4step_shift1.safetensors": ("PCM for SD3, shift 1", "inherit", 999, 4, False, 1),
    "pcm_deterministic_4step_shift3.safetensors": ("PCM for SD3, shift 3", "inherit", 999, 4, False, 1),
    "FlashSDXL.safetensors": ("Flash SD, Flash SDXL", "lcm", 999, 4, True, 1),
    "flash-sd.safetensors": ("Flash SD, Flash SDXL", "lcm", 999, 4, True, 1),
    "flash-sd3.safetensors": ("Flash SD3", "inherit", 999, 4, True, 1),
    "sdxs-512-0.9.safetensors": ("SDXS", "inherit", 999, 1, True, 1),
    "sdxs-512-dreamshaper.safetensors": ("SDXS", "inherit", 999, 1, True, 1),
    "flux1-schnell.safetensors": ("FLUX.1 schnell", "inherit", 999, 4, False, 1),
    "flux1-schnell-fp8.safetensors": ("FLUX.1 schnell", "inherit", 999, 4, False, 1),
    "flux1-schnell-Q4_K_S.gguf": ("FLUX.1 schnell", "inherit", 999, 4, False, 1),
    "FLUX.1-Turbo-Alpha.safetensors": ("FLUX.1-Turbo-Alpha", "inherit", 999, 8, False, 1),
    "flux-2-klein-4b-fp8.safetensors": ("FLUX.2 klein", "inherit", 999, 4, False, 1),
    "flux-2-klein-9b.safetensors": ("FLUX.2 klein", "inherit", 999, 4, False, 1),
    "z_image_turbo_bf16.safetensors": ("Z-Image-Turbo", "inherit", 999, 8, False, 1),
    "z_image_turbo_nvfp4.safetensors": ("Z-Image-Turbo", "inherit", 999, 8, False, 1),
    "zImageTurbo_turbo.safetensors": ("Z-Image-Turbo", "inherit", 999, 8, False, 1),
    "Qwen-Image-Lightning-4steps-V1.0.safetensors": ("Qwen-Image-Lightning", "inherit", 999, 4, False, 1),
    "Qwen-Image-Lightning-8steps-V1.1-bf16.safetensors": ("Qwen-Image-Lightning", "inherit", 999, 8, False, 1),
    "Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors": (
        *("Qwen-Image-Lightning", "inherit", 999, 4, False, 1),
    ),
    "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors": ("lightx2v", "inherit", 999, 4, False, 1),
    "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors": ("lightx2v", "inherit", 999, 4, False, 1),
    "lightx2v_I2V_14B_480p_cfg_step_distill_rank128_bf16.safetensors": ("lightx2v", "inherit", 999, 4, False, 1),
    r"fast\\sdxl\\sdxl_lightning_4step.safetensors": (LIGHTNING, "inherit", 999, 4, False, 1),
    "turbo/dmd2_sdxl_4step_lora.safetensors": ("DMD2", "inherit", 999, 4, True, 1),
}

# Bases, merges and styles: nobody but their makers says how they are sampled.
UNKNOWN = [
    *(
        "v1-5-pruned-emaonly.safetensors",
        "sd_xl_base_1.0.safetensors",
        "flux1-dev.safetensors",
        "dreamshaper_8.safetensors",
    ),
    *(
        "hyperreal.safetensors",
        "hyperrealism_xl.safetensors",
        "crystalcmix_v2.safetensors",
        "TurboDistill demo",
        "",
        "  ",
    ),
    *("DreamShaperXL_Turbo_v2_1.safetensors", "dreamshaperXL_lightningDPMSDE.safetensors"),
    *("juggernautXL_v9Rdphoto2Lightning.safetensors", "Juggernaut_X_Hyper.safetensors"),
    *("realvisxlV50_v50LightningBakedvae.safetensors", "RealVisXL_V4.0_Lightning.safetensors"),
    *("turbovisionxlSuperFastXLBasedOnNew_tvxlV431Bakedvae.safetensors", "sdxl_turbo_anime_merge.safetensors"),
    *(
        "SDXL-Flash.safetensors",
        "sdxl-flash-lora.safetensors",
        "dreamshaper_8LCM.safetensors",
        "dreamshaper_lcm.safetensors",
    ),
    *(
        "lightning_bolt_style.safetensors",
        "turbo_car_v3",
        "pixel_art_style_z_image_turbo.safetensors",
        "nitro_boost.safetensors",
    ),
    *("Hyper-FLUX.1-dev-16steps-lora.safetensors", "Hyper-SD3-16steps-CFG-lora.safetensors"),
    *(
        "Hyper-SDXL-12steps-CFG-lora.safetensors",
        "pcm_sd15_smallcfg_16step_converted.safetensors",
        "sdxl_16step.safetensors",
    ),
    *("sdxl_lightning.safetensors", "Hyper-SDXL-lora.safetensors", "dmd2.safetensors"),  # which version?
    *("sdxl_lightning_3step.safetensors", "dmd2_sdxl_8step.safetensors", "sdxl_turbo_20steps.safetensors"),
    *("flux-2-klein-base-4b.safetensors", "flux-2-klein-base-9b-fp8.safetensors", "z_image_bf16.safetensors"),
    *(
        "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors",
        "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors",
    ),
    *("Nitro-E.safetensors", "Nitro-T-0.6B.safetensors", "nitroDiffusion_v1.safetensors", "nitrosd.safetensors"),
    *("sd3.5_medium_turbo.safetensors", "sd3.5_large.safetensors", "qwen_image_fp8_e4m3fn.safetensors"),
    *("水墨_sdxl_turbo.safetensors", "flux_schnell_realism.safetensors", "turbo.safetensors", "lightning.safetensors"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_recognised_by_its_file_name(name):
    found = recognise(name)
    assert (found.name, found.prediction, found.start, found.steps, found.renoise, found.cfg) == NAMES[name]


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_it_is_not_sure_nothing_is_guessed(name):
    assert recognise(name) is None


def test_every_family_has_a_name_here_a_source_and_an_architecture():
    assert {found[0] for found in NAMES.values()} == set(FAMILIES) and len(NAMES) + len(UNKNOWN) > 120
    for family in FAMILIES.values():
        assert family.source.startswith("https://") and set(family.architectures) <= KNOWN
        assert all(1 <= steps <= MOST for steps in (*family.versions, *family.sampling.range))


@pytest.mark.parametrize(
    ("name", "architecture", "prediction", "known"),
    [
        ("sdxl_lightning_4step.safetensors", "stable-diffusion-xl-v1-base", "eps", True),
        ("sdxl_lightning_4step.safetensors", "stable-diffusion-xl-v1-base", "v", False),
        ("sdxl_lightning_4step.safetensors", "stable-diffusion-v1", "eps", False),
        ("sdxl_lightning_4step.safetensors", "a host's own word", "eps", True),
        ("sdxl_lightning_4step.safetensors", "", "unknown", False),
        ("Hyper-SD15-8steps-lora.safetensors", "stable-diffusion-v1", "", True),
        ("sd_turbo.safetensors", "stable-diffusion-v2", "eps", True),
        ("sd_turbo.safetensors", "stable-diffusion-v1", "eps", False),
        ("z_image_turbo_bf16.safetensors", "z-image", "flow", True),
        ("z_image_turbo_bf16.safetensors", "flux-2", "flow", False),
        ("FLUX.1-Turbo-Alpha.safetensors", "flux-1-schnell", "flow", False),
        ("Qwen-Image-Lightning-4steps-V1.0.safetensors", "stable-diffusion-xl-v1-base", "eps", False),
        ("lcm-lora-sdxl.safetensors", "stable-diffusion-xl-v1-base", "flow", False),
    ],
)
def test_architecture_and_prediction_come_before_the_name(name, architecture, prediction, known):
    assert (recognise(name, architectures=[architecture], prediction=prediction) is not None) == known


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("DreamShaperXL_Turbo_v2_1.safetensors", "turbo"),
        ("juggernautXL_v9Rdphoto2Lightning.safetensors", "lightning"),
        ("flux-2-klein-9b-mine.safetensors", "klein"),
        ("flux-2-klein-base-9b.safetensors", ""),
        ("TurboDistill demo", ""),
        ("crystalcmix.safetensors", ""),
    ],
)
def test_a_merge_is_suspected_by_a_word(name, word):
    assert suspect(name) == word


def test_the_first_hint_that_says_something_counts():
    assert recognise("model.safetensors", "SDXL-Lightning 2-step", "sd_turbo").steps == 2


@pytest.mark.parametrize(
    ("family", "steps", "flow_shift", "strength"),
    [
        ("Qwen-Image-Lightning", 4, 3.0, 1.0),
        ("lightx2v", 4, 5.0, 1.0),
        ("Z-Image-Turbo", 8, 3.0, 1.0),
        ("FLUX.1 schnell", 4, 1.0, 1.0),
        ("SD3.5 Large Turbo", 4, 3.0, 1.0),
        ("Hyper-SD3", 8, 3.0, 0.125),
        ("Hyper-FLUX", 8, None, 0.125),  # the host's own, which follows the picture's size
    ],
)
def test_shifts_and_weights_are_those_of_the_families_pages(family, steps, flow_shift, strength):
    recipe = FAMILIES[family].for_steps(steps)
    assert (recipe.flow_shift, recipe.strength) == (flow_shift, strength)
    assert ("weight 0.125" in recipe.in_words()) == (strength != 1)


def test_a_flow_s_levels_have_the_recipe_s_shift_whatever_the_host_s_is():
    host, other = FlowSchedule(1.15).sigma(torch.arange(1000.0)), DiscreteSchedule().sigma(torch.arange(1000.0))
    found = FAMILIES["Qwen-Image-Lightning"].sampling.sigmas(host, [999, 749, 499, 249])
    assert found.tolist() == pytest.approx([1, 9 / 10, 3 / 4, 1 / 2, 0])  # 3 t / (1 + 2 t)
    assert SamplingRecipe("").sigmas(host, [999, 499]).tolist() == pytest.approx([1, 1.15 / 2.15, 0], abs=1e-4)
    assert float(SamplingRecipe("", flow_shift=3.0).sigmas(other, [999])[0]) == pytest.approx(14.6146, rel=1e-3)


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        (TURBO, (1, 1.0), []),
        (TURBO, (4, 1.0), []),
        (TURBO, (8, 1.0), ["steps is 8: SD-Turbo, SDXL-Turbo was made for 1 to 4 steps."]),
        ("Z-Image-Turbo", (1, 1.0), ["steps is 1: Z-Image-Turbo was made for 8 steps."]),
        ("Hyper-SD CFG", (8, 5.0), []),
        ("LCM", (4, 7.0), ["cfg is 7: LCM was made for 1, more burns the picture."]),
    ],
)
def test_settings_it_was_not_made_for_are_told(family, settings, said):
    assert FAMILIES[family].sampling.remarks(*settings) == said


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
    assert of_card(card) == SamplingRecipe("student of base", "inherit", 899, 2, exact=True, span=(1, 2))
    assert of_card(StudentCard("lora", "base", "0" * 16, "sd", "x0", "v", (999,), 4.0, (64, 64))).prediction == "x0"


@pytest.mark.parametrize(("count", "least"), [(16, 8), (4, 4), (50, 8)])
def test_a_student_of_guidance_alone_is_sampled_as_an_ordinary_model(count, least):
    timesteps = tuple(trailing_timesteps(count))
    card = StudentCard("lora", "base", "0" * 16, "sd", "v", "v", timesteps, 4.0, (64, 64), guidance_only=True)
    recipe = of_card(card)
    assert (recipe.steps, recipe.range, recipe.start, recipe.cfg) == (count, (least, 1000), 999, 1)
    assert recipe.ordinary and not recipe.renoise and recipe.exact and recipe.prediction == "inherit"
    assert recipe.timesteps(count) == list(timesteps) and recipe.timesteps(1000) == list(range(999, -1, -1))
    assert recipe.timesteps(30, 0.5)[0] == 499
    with pytest.raises(ValueError, match="steps is 1001: give 1 to 1000"):
        recipe.timesteps(1001)
    assert recipe.remarks(least) == recipe.remarks(200) == []
    assert recipe.remarks(1) == [f"steps is 1: student of base was made for {least} steps or more."]
    assert (recipe.steps_taken(1), recipe.steps_taken(least), recipe.steps_taken(30)) == (count, least, 30)
    assert "sampled as its base, with any sampler" in recipe.in_words()
    assert FAMILIES["LCM"].sampling.steps_taken(1) == 1


def test_its_steps_are_euler_s():
    recipe = SamplingRecipe("", renoise=False, ordinary=True, steps=4, span=(4, 1000))
    x, sigmas = torch.ones(1, 1, 1, 1), torch.tensor([4.0, 2.0, 1.0, 0.0])
    # Of a model that always finds the picture 0 what is left of the noise falls as sigma does.
    seen = []
    found = recipe.sample(lambda x, s: torch.zeros_like(x), x, sigmas, callback=lambda told: seen.append(told["x"]))
    assert [float(x) for x in seen] == [1.0, 0.5, 0.25] and float(found) == 0


def test_a_file_says_how_it_is_sampled(tmp_path):
    card = StudentCard("lora", "base", "0" * 16, "sd", "v", "v", (899,), 4.0, (64, 64))
    files = {"lcm": card.to_metadata(), "titled": {"modelspec.title": "SDXL-Lightning 2-step"}, "plain": None}
    for name, metadata in files.items():
        save_file({"weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors", metadata)
    assert by_file(tmp_path / "lcm.safetensors", "lcm") == of_card(card)  # its card counts more than its name
    assert by_file(tmp_path / "titled.safetensors", "titled").steps == 2
    assert by_file(tmp_path / "titled.safetensors", "dmd2_sdxl_4step").name == "DMD2"
    assert by_file(tmp_path / "plain.safetensors", "plain") is None
    assert by_file(tmp_path / "gone.ckpt", "sd_turbo.ckpt").name == "SD-Turbo, SDXL-Turbo"


@pytest.mark.parametrize(
    ("key", "width", "known"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", 2048, True),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", 768, False),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", 2048, True),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora.down.weight", 768, False),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight", 768, False),
    ],
)
def test_a_lora_is_of_the_architecture_that_its_own_keys_say(tmp_path, key, width, known):
    path = tmp_path / "sdxl_lightning_4step_lora.safetensors"
    save_file({key: torch.zeros(8, width)}, path)
    assert (by_file(path, path.name) is not None) == known
    assert by_files([(path, path.name)], "stable-diffusion-v1") is None


def test_a_checkpoint_is_of_the_architecture_that_its_own_weights_say(tmp_path):
    inside = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    for name, width in (("sd_turbo", 1024), ("lcm-lora-sd15", 768)):
        save_file({inside: torch.zeros(320, width)}, tmp_path / f"{name}.safetensors")
        assert by_file(tmp_path / f"{name}.safetensors", name) is not None
        assert by_file(tmp_path / f"{name}.safetensors", "sdxl_lightning_4step") is None


def test_thousands_of_loras_are_looked_at_in_a_moment():
    began = time.process_time()
    assert not any(recognise(f"my_style_{i}_v3_xl_woman_portrait", f"portrait {i}") for i in range(5000))
    assert time.process_time() - began < 2  # it was ten times that
