"""Where prompts come from inside a real ComfyUI: its own pictures, wildcard files, the list that suits a model."""

import pytest
from PIL import Image

pytestmark = pytest.mark.host


@pytest.mark.newest
def test_pictures_that_comfyui_saved_give_their_prompts(comfyui, graph, demo):
    ours = graph.sample(demo.model, demo.positive, demo.latent)
    owl = graph.add("CLIPTextEncode", clip=demo.clip, text="an owl,\nat night")
    none = graph.add("CLIPTextEncode", clip=demo.clip, text="blurry")
    theirs = graph.add(
        "KSampler", model=demo.base, positive=owl, negative=none, latent_image=demo.latent, seed=1, steps=3, cfg=2.5,
        sampler_name="euler", scheduler="normal", denoise=1.0,
    )  # fmt: skip
    folder = comfyui.base / "output" / "made"
    for k, (sampled, other) in enumerate(((ours, theirs), (theirs, ours))):
        alone = type(graph)(dict(graph.prompt))
        decoded = alone.add("VAEDecode", samples=sampled, vae=demo.vae)
        alone.add("SaveImage", images=decoded, filename_prefix=f"made/{k}")
        del alone.prompt[other.name]  # a picture has the whole graph
        comfyui.run(alone)
    Image.new("RGB", (8, 8)).save(folder / "plain.png")
    read = graph.add("TurboDistillPrompts", source="the file below", text="", file=str(folder))
    prompts = comfyui.text(graph, read[1]).splitlines()
    assert sorted(prompts) == sorted([demo.text, "an owl, at night"])
    about = comfyui.text(graph, read[2])
    assert about.startswith("2 prompts of 8 pictures in ") and "1 have none that can be read" in about


def test_wildcards_lie_in_the_input_folder_and_a_changed_one_is_read_again(comfyui, graph):
    folder = comfyui.base / "input" / "wildcards"
    folder.mkdir(exist_ok=True)
    (folder / "colour.txt").write_text("red\n")
    prompts = graph.add("TurboDistillPrompts", source="the text below", text="a __colour__ fox", file="")
    assert comfyui.text(graph, prompts[1]) == "a red fox"
    (folder / "colour.txt").write_text("blue\n")
    assert comfyui.text(graph, prompts[1]) == "a blue fox"


def test_the_list_that_suits_the_model_is_told(comfyui, graph, demo):
    prompts = graph.add("TurboDistillPrompts", source="built in: auto", text="", file="", model=demo.base)
    told = "prompts: the built-in list of prose, since nothing says that the model learnt tags"
    assert comfyui.text(graph, prompts[2]) == told
