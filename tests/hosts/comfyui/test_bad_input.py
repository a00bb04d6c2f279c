"""What cannot be done is refused by the node itself, in words that say what to do, and the server goes on."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from turbodistill.core.card import KEY

pytestmark = pytest.mark.host
LOAD, SAMPLE = "TurboDistillLoadStudent", "TurboDistillSample"


@pytest.fixture(autouse=True)
def the_next_prompt_works(comfyui, graph, demo):
    """The embedded model gives the same pictures before and after the mistake."""
    good = type(graph)(dict(graph.prompt))
    sample = good.sample(demo.model, demo.positive, demo.latent, seed=1)
    (before,) = comfyui.latents(good, sample)
    yield
    (after,) = comfyui.latents(good, sample)
    assert torch.equal(after, before) and before.isfinite().all()


@pytest.fixture
def refused(comfyui, graph, node_error):
    """Runs the graph for this output, which the node must refuse in words that match."""

    def run(output, node, words):
        with pytest.raises(node_error, match=words) as error:
            comfyui.latents(graph, output)
        assert error.value.node == node

    return run


@pytest.fixture
def student(checkpoints, trained, saved):
    """A LoRA student of a checkpoint: its choice."""
    return lambda name, **card: saved(name, trained(checkpoints[name].denoiser), f"{name}.safetensors", **card)


def with_student(graph, parts, choice):
    model = graph.add(LOAD, model=parts.model, student=choice, strength=1.0)
    return graph.sample(model, parts.positive, parts.latent)


# --- student files ---


def test_a_student_of_another_architecture(graph, synthetic, student, refused):
    made = with_student(graph, synthetic("sd15"), student("sdxl"))
    refused(
        made, LOAD, r"sdxl\.safetensors does not fit the connected model: .*layers are in this model.*Its base is sdxl"
    )


def test_the_built_in_student_on_another_model(graph, synthetic, refused):
    made = with_student(graph, synthetic("sdxl_v"), "the demo model's student (built in)")
    refused(made, LOAD, "does not fit the connected model: .*Its base is")


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("sd15", "stable-diffusion-v1"),
        ("sd2_v", "stable-diffusion-v2"),
        ("sdxl", "stable-diffusion-xl-v1-base"),
        ("sdxl_v", "stable-diffusion-xl-v1-base"),
        ("sd3", "stable-diffusion-v3-medium"),
    ],
)
def test_the_architecture_is_told_by_the_weights_whatever_they_predict(
    graph, synthetic, student, refused, name, called
):
    choice = student("sd15", architecture="flux-1-dev", base_hash="0" * 16)
    made = with_student(graph, synthetic(name), choice)
    refused(made, LOAD, f"made for a model of architecture flux-1-dev, the loaded one is {called}: load sd15, its base")


def test_a_student_of_another_prediction(graph, synthetic, student, refused):
    made = with_student(graph, synthetic("sdxl"), student("sdxl_v"))
    refused(made, LOAD, "a model that predicts v, the loaded one predicts eps: it is the right file, read wrongly")


def test_a_card_from_the_future(comfyui, graph, synthetic, student, checkpoints, refused):
    choice = student("sd15")
    path = comfyui.base / "models" / choice
    about = {"version": 99, "kind": "video", "timesteps": [999]}
    save_file(load_file(path), path, {KEY: json.dumps(about)})
    refused(with_student(graph, synthetic("sd15"), choice), LOAD, "card version 99, .*knows up to 1: update it")


def test_a_file_that_broke_off(comfyui, graph, synthetic, student, refused):
    choice = student("sd15")
    path = comfyui.base / "models" / choice
    path.write_bytes(path.read_bytes()[:-1000])
    refused(with_student(graph, synthetic("sd15"), choice), LOAD, "no complete safetensors file .*get it again")


def test_a_file_without_a_card(graph, synthetic, checkpoints, refused):
    made = with_student(graph, synthetic("sd15"), "checkpoints/sd15.safetensors")
    refused(made, LOAD, "holds no student card: it was not made by TurboDistill")


def test_a_file_that_has_gone(comfyui, graph, synthetic, student, refused):
    choice = student("sd15")
    listed = json.loads(comfyui.get(f"object_info/{LOAD}"))[LOAD]["input"]["required"]["student"]
    assert choice in json.dumps(listed)
    (comfyui.base / "models" / choice).unlink()
    refused(with_student(graph, synthetic("sd15"), choice), LOAD, "is not in ComfyUI's models: put it there")


# --- latents ---


@pytest.mark.parametrize(
    ("latents_of", "model", "words"),
    [("sd3", "sd15", "16 channels, this model wants 4"), ("sd15", "sd3", "4 channels, this model wants 16")],
)
def test_a_latent_of_another_model(graph, synthetic, refused, latents_of, model, words):
    other = synthetic(latents_of)
    latent = graph.sample(*other)
    parts = synthetic(model)
    refused(graph.sample(parts.model, parts.positive, latent), SAMPLE, f"{words}: encode the picture with the VAE")


# --- steps and denoise ---


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [("steps", 0, "smaller than min"), ("steps", 101, "bigger than max"), ("denoise", 0.0, "smaller than min")],
)
def test_a_number_out_of_range(graph, demo, refused, setting, value, words):
    made = graph.sample(demo.model, demo.positive, demo.latent, **{setting: value})
    refused(made, SAMPLE, rf"{setting}.*{words}|{words}.*{setting}")


@pytest.mark.parametrize(
    ("kind", "setting", "value", "words"),
    [
        ("PrimitiveInt", "steps", 0, "steps is 0: give 1 to 100"),
        ("PrimitiveInt", "steps", -1, "steps is -1: give 1 to 100"),
        ("PrimitiveFloat", "denoise", 0.0, "denoise is 0.0: give 0.01 to 1"),
    ],
)
def test_a_number_out_of_range_from_another_node(graph, demo, refused, kind, setting, value, words):
    told = graph.add(kind, value=value)
    refused(graph.sample(demo.model, demo.positive, demo.latent, **{setting: told}), SAMPLE, words)
    scheduler = graph.add("TurboDistillScheduler", model=demo.model, **({"steps": 1, "denoise": 1.0} | {setting: told}))
    sampler = graph.add("TurboDistillSampler", model=demo.model)
    made = graph.custom(demo.model, demo.positive, demo.latent, scheduler, sampler)
    refused(made, "TurboDistillScheduler", words)
