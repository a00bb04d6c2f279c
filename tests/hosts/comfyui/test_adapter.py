"""A MODEL of the real ComfyUI as core's Denoiser, for every architecture: the same x0, features, LoRA, gradients."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from turbodistill.core.denoiser import Cond
from turbodistill.core.schedule import DiscreteSchedule

pytestmark = [pytest.mark.host, pytest.mark.newest, pytest.mark.timeout(900)]  # one script tells all

HERE = Path(__file__).parent
HEIGHT, WIDTH, TOKENS = 8, 12, 77  # of the latents and the text
ARCHITECTURES = ("sd15", "sd2_v", "sdxl", "sd3", "flux", "schnell")
FLOW = {"sd3": 3.0, "flux": math.exp(1.15), "schnell": 1.0}  # and their shifts
LOW = [(name, dtype) for name in ("sd3", "flux") for dtype in ("float16", "bfloat16", "float8_e4m3fn")]
LOW += [("sd15", "float16"), ("sd15", "float8_e4m3fn")]
NATIVE = ("sd15", "sd3", "schnell")  # computed in float16, as on an accelerator
JOBS = (
    {name: {"look": "whole"} for name in ARCHITECTURES}
    | {name: {"look": "shallow"} for name in ("sdxl_v", "inpainting", "fill", "sdxl_edm")}
    | {f"{name} {dtype}": {"look": "low", "dtype": dtype} for name, dtype in LOW}
    | {f"{name} wide": {"look": "gradient"} for name in NATIVE}
    | {f"{name} native": {"look": "gradient", "dtype": "float16", "native": True} for name in NATIVE}
)


@pytest.fixture(scope="module")
def given(checkpoints):
    """A short name -> the same inputs for ComfyUI and here."""

    def draw(name):
        checkpoint = checkpoints[name]
        flow = checkpoint.prediction == "flow"
        torch.manual_seed(7)
        # Levels of the table: between two, ComfyUI tells the network the nearest timestep, we the fraction.
        sigma = torch.tensor([0.99, 0.3]) if flow else DiscreteSchedule().sigma(torch.tensor([990, 300]))
        x = torch.randn(2, 16 if flow else 4, HEIGHT, WIDTH) * sigma.view(-1, 1, 1, 1)
        states, pooled = torch.randn(1, TOKENS, checkpoint.width), torch.randn(1, checkpoint.pooled)
        return {"x": x, "sigma": sigma, "states": states, "pooled": pooled}

    return draw


@pytest.fixture(scope="module")
def found(installation, comfyui, checkpoints, given, tmp_path_factory):
    """What adapter.py told of every job, and the tensors it left, by the job's name; ComfyUI starts once."""
    folder = tmp_path_factory.mktemp("adapter")
    jobs = {}
    for job, settings in JOBS.items():
        name = job.split()[0]
        save_file(given(name), folder / f"{job}.safetensors")
        file = comfyui.base / "models" / "checkpoints" / checkpoints[name].file
        jobs[job] = {"checkpoint": str(file), "dtype": None, "native": False} | settings
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ran = subprocess.run(
        [installation[1], *map(str, (HERE / "adapter.py", installation[0], HERE.parents[2], folder))],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads((folder / "told.json").read_text())
    return {job: told[job] | load_file(folder / f"{job}.out.safetensors") for job in jobs}


# --- What is denoised ---


@pytest.mark.parametrize("name", [*ARCHITECTURES, "sdxl_v"])
def test_its_x0_is_comfyui_s_own(found, name):
    assert found[name]["own"] < 1e-6


@pytest.mark.parametrize("name", ["sd15", "sd2_v", "sdxl", "sdxl_v"])
def test_it_denoises_as_diffusers_classes_do(found, given, checkpoints, gap, name):
    inputs, expected = given(name), checkpoints[name].denoiser
    cond = Cond(inputs["states"])
    if name.startswith("sdxl"):
        size = 8.0 * torch.tensor([HEIGHT, WIDTH])
        sizes = torch.cat([size, torch.zeros(2), size])[None]  # as made, cropped at, wanted
        cond = Cond(inputs["states"], inputs["pooled"], {"time_ids": sizes})
    with torch.no_grad():
        x0 = expected(inputs["x"], inputs["sigma"], cond.repeat(2))
    assert gap(found[name]["x0"], x0) < 1e-4
    assert torch.allclose(found[name]["levels"], expected.schedule.sigma(torch.arange(1000.0)), rtol=1e-4)


@pytest.mark.parametrize("name", FLOW)
def test_a_flow_model_s_x0_output_and_shift_agree(found, given, gap, name):
    x, sigma = given(name)["x"], given(name)["sigma"].view(-1, 1, 1, 1)
    assert gap(x - sigma * found[name]["output"], found[name]["x0"]) < 1e-4
    t, shift = torch.arange(1, 1001) / 1000, FLOW[name]
    assert torch.allclose(found[name]["levels"], shift * t / (1 + (shift - 1) * t), atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_condition_is_heard(found, name):
    heard = found[name]["conditions"]
    wanted = {"context"} | ({"pooled"} if name not in ("sd15", "sd2_v") else set())
    assert heard.keys() == wanted | ({"guidance"} if name in ("flux", "schnell") else set())
    assert heard.pop("guidance", 0) > 0.1 if name == "flux" else heard.pop("guidance", 0) == 0
    assert min(heard.values()) > 0.05


# --- LoRA ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_reach_every_lora_and_the_weights_stay_to_the_bit(found, name):
    told = found[name]
    assert told["frozen"]  # it was loaded in inference mode, where no gradient is to be had
    assert told["lora"]["finite"] and told["lora"]["taught"] == told["lora"]["branches"]
    assert told["same"] and told["flags"] and told["again"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_are_the_layers_they_are_named_after(found, checkpoints, name):
    layers = [k for k, v in checkpoints[name].weights.items() if k.endswith(".weight") and v.ndim > 1]
    attention = [k for k in layers if re.search(r"attn\d?\.(to_[qkv]|to_out\.0|qkv|proj)\.weight$", k)]
    targets = found[name]["lora"]["targets"]
    assert targets["all"] == len(layers) == found[name]["lora"]["branches"]
    assert targets["attention"] == len(attention) < targets["transformer"] < targets["all"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_comfyui_s_own_loader_takes_every_layer_of_a_student(found, name):
    told = found[name]["export"]
    assert told["taken"] == told["names"] == found[name]["lora"]["branches"]
    assert told["gap"] < 1e-4 < 0.05 < told["teacher"]


# --- Features ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_default_taps_are_maps_of_the_picture(found, name):
    told = found[name]["features"]
    assert 2 <= len(told["taps"]) == len(told["shapes"]) <= 5
    for batch, _, height, width in told["shapes"]:
        assert batch == 2 and height * WIDTH == width * HEIGHT  # 77 tokens of text would tile no picture
    assert told["finite"] and told["alone"]  # a map is the same whatever blocks come after
    assert told["moved"] > 0.1 and told["to_x"] > 0 and told["to_weights"] == 0


@pytest.mark.parametrize("name", FLOW)
def test_taps_are_the_picture_tokens_that_go_on(found, name):
    told = found[name]["features"]["picture_tokens"]
    assert len(told) == (1 if name == "sd3" else 2) and max(told.values()) == 0


# --- Checkpointing and precision ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_checkpointing_changes_no_gradient(found, checkpoints, name):
    told = found[name]["gradient_checkpointing"]
    kinds = (r"in_layers\.0", r"transformer_blocks\.\d+", r"(joint|double|single)_blocks\.\d+", r"\.(op|conv)\.weight")
    count = sum(len({k[: m.end()] for k in checkpoints[name].weights if (m := re.search(kind, k))}) for kind in kinds)
    assert told["blocks"] == told["changed"] == count
    assert told["left"] == 0
    assert told["gradients"] and told["gap"] < 1e-5


@pytest.mark.parametrize(("name", "dtype"), LOW)
def test_weights_of_low_precision_carry_a_lora(found, name, dtype):
    told = found[f"{name} {dtype}"]
    assert told["weights"] == [f"torch.{dtype}"] and told["frozen"] and told["same"]
    for arithmetic in ("plain", "autocast"):
        assert told[arithmetic]["finite"] and told[arithmetic]["taught"] == told[arithmetic]["branches"]
    assert told["autocast"]["loss"] == pytest.approx(told["plain"]["loss"], rel=0.02)


@pytest.mark.parametrize(("name", "dtype"), LOW)
def test_a_full_copy_of_them_is_trained_in_float32(found, name, dtype):
    told = found[f"{name} {dtype}"]["copy"]
    assert told["types"] == ["torch.float32"] and told["taught"] == 1 and told["finite"] and told["gap"] < 1e-4


@pytest.mark.parametrize("name", NATIVE)
def test_small_gradients_survive_a_model_that_computes_in_float16(found, name):
    small, expected = found[f"{name} native"]["gradient"], found[f"{name} wide"]["gradient"]
    assert expected.abs().median() < 2**-20  # most would round to few bits of float16, or none
    assert torch.cosine_similarity(small.flatten(), expected.flatten(), 0) > 0.999


# --- What cannot be done ---


def test_a_model_that_wants_a_picture_or_has_other_levels_is_refused(found):
    assert "takes a picture or a mask beside the latent" in found["inpainting"]["refused"]
    assert "takes a picture or a mask beside the latent" in found["fill"]["refused"]
    assert "predicts v over 1000 noise levels of its own kind" in found["sdxl_edm"]["refused"]
    assert all(found[name]["same"] for name in ("inpainting", "fill", "sdxl_edm"))
