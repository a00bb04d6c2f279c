"""Detect One-Step Model: each family by its files' usual names, and what its model's one step then is."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from turbodistill.core.families import FAMILIES, recognise

pytestmark = pytest.mark.host
FILES = {  # those that Stable Diffusion 1 comes in; the others are made by hand of their family's name
    "Hyper-SD": "Hyper-SD15-1step-Unet.safetensors",
    "Hyper-SD unified LoRA": "Hyper-SD15-1step-lora.safetensors",
    "SDXS": "sdxs-512-dreamshaper.safetensors",
    "LCM": "LCM_Dreamshaper_v7_4k.safetensors",
}
BY_HAND = ("SD-Turbo, SDXL-Turbo", "SDXL-Lightning", "DMD2", "NitroFusion Realism", "NitroFusion Vibrant")
# What each family's own recipe says: where noise enters, and the timestep that the network is told.
RECIPES = {
    "Hyper-SD": (800, 800),
    "DMD2": (399, 399),
    "NitroFusion Realism": (999, 249),
    "NitroFusion Vibrant": (999, 499),
}


@torch.no_grad()
def one_step(denoiser, family, noise, context):
    """Unit noise (B, C, H, W) -> x0, by the family's own recipe on diffusers' network."""
    start, told = RECIPES.get(family, (999, 999))
    sigma = denoiser.schedule.sigma(start)
    # ComfyUI's rule for the size of the noise: what enters at the top is the whole noisy picture's.
    x = noise * ((sigma**2 + 1).sqrt() if start == 999 else sigma)
    output = denoiser.backbone(x / (sigma**2 + 1).sqrt(), told, context).sample
    if family == "SDXL-Lightning":
        return output
    x0 = x - sigma * output
    if family == "LCM":
        t = 10 * told
        return x0 * t / (t**2 + 0.25) ** 0.5 + x * 0.25 / (t**2 + 0.25)
    return x0


def detect(graph, model, family="recognise by its files", made_for_steps=0):
    return graph.add("TurboDistillDetectOneStep", model=model, family=family, made_for_steps=made_for_steps)


@pytest.fixture
def renamed(comfyui, checkpoints):
    """The Stable Diffusion 1 under another name, for as long as the test runs."""
    made = []

    def link(name):
        folder = comfyui.base / "models" / "checkpoints"
        os.link(folder / checkpoints["sd15"].file, folder / name)
        made.append(folder / name)
        return name

    yield link
    for path in made:
        path.unlink()


@pytest.mark.parametrize("family", [*FILES, *BY_HAND])
def test_a_family_is_sampled_in_its_own_way(
    comfyui, graph, synthetic, renamed, checkpoints, condition, noise, gap, family
):
    if family in FILES:
        base, positive, latent = synthetic("sd15", renamed(FILES[family]))
        found = detect(graph, base)
    else:
        base, positive, latent = synthetic("sd15")
        found = detect(graph, base, family, 1)
    (latents,) = comfyui.latents(graph, graph.sample(found, positive, latent, seed=5))
    drawn = noise(5, *latents.shape)
    expected = one_step(checkpoints["sd15"].denoiser, family, drawn, condition("sd15").context)
    assert gap(latents * checkpoints["sd15"].scale, expected) < 1e-4
    recipe = recognise(FILES[family]) if family in FILES else FAMILIES[family].for_steps(1)
    words = comfyui.text(graph, found[1])
    assert words == recipe.in_words() and words.startswith(family)


def test_a_lora_s_name_goes_before_the_checkpoint_s(comfyui, graph, synthetic, renamed, checkpoints, trained, saved):
    base, _, _ = synthetic("sd15", renamed("LCM_Dreamshaper_v7_4k.safetensors"))
    saved("sd15", trained(checkpoints["sd15"].denoiser), "Hyper-SD15-8steps-lora.safetensors")
    path = comfyui.base / "models" / "loras" / "Hyper-SD15-8steps-lora.safetensors"
    save_file(load_file(path), path)  # as others' files are: without our card
    lora = graph.add(
        "LoraLoaderModelOnly", model=base, lora_name="Hyper-SD15-8steps-lora.safetensors", strength_model=1.0
    )
    assert comfyui.text(graph, detect(graph, lora)[1]).startswith("Hyper-SD: made for 8 steps")
    assert comfyui.text(graph, detect(graph, base)[1]).startswith("LCM")


def test_a_student_says_of_itself_what_it_is(comfyui, graph, synthetic, checkpoints, trained, saved):
    base, _, _ = synthetic("sd15")
    saved("sd15", trained(checkpoints["sd15"].denoiser), "my-turbo.safetensors")
    lora = graph.add("LoraLoaderModelOnly", model=base, lora_name="my-turbo.safetensors", strength_model=1.0)
    assert comfyui.text(graph, detect(graph, lora)[1]).startswith("student of")


def test_the_user_s_word_counts_more_than_the_name(comfyui, graph, synthetic, renamed):
    base, _, _ = synthetic("sd15", renamed("Hyper-SD15-4steps.safetensors"))
    assert comfyui.text(graph, detect(graph, base)[1]).startswith("Hyper-SD: made for 4 steps")
    assert "timestep 800" in comfyui.text(graph, detect(graph, base, made_for_steps=1)[1])
    assert comfyui.text(graph, detect(graph, base, "DMD2", 1)[1]).startswith("DMD2: made for 1 step, noise enters at")


@pytest.mark.parametrize(
    "name",
    [
        "sdxl_lightning_4step.safetensors",  # which Stable Diffusion 1 is none of
        "dreamshaper_8LCM.safetensors",
    ],
)
def test_another_architecture_s_name_and_a_merge_s_ask_for_the_family(
    comfyui, graph, synthetic, renamed, node_error, name
):
    base, _, _ = synthetic("sd15", renamed(name))
    with pytest.raises(node_error, match=f"recognised in {name}: choose the family"):
        comfyui.text(graph, detect(graph, base)[1])


def test_an_unknown_name_asks_for_the_family(comfyui, graph, synthetic, node_error):
    base, _, _ = synthetic("sd15")
    with pytest.raises(node_error, match=r"recognised in sd15\.safetensors: choose the family") as error:
        comfyui.text(graph, detect(graph, base)[1])
    assert error.value.node == "TurboDistillDetectOneStep"
