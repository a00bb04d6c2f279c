"""A MODEL of the real ComfyUI as core's Denoiser: the same x0, and gradients through the loaded weights."""

import functools
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from turbodistill.core.schedule import DiscreteSchedule

pytestmark = pytest.mark.host

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def through(installation, comfyui, checkpoints, condition, tmp_path_factory):
    """A checkpoint's short name -> inputs, and what adapter.py found; ComfyUI starts once for each."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp(name)
        checkpoint = checkpoints[name]
        channels = 16 if name == "sd3" else 4
        torch.manual_seed(7)
        x = torch.randn(2, channels, 8, 8)
        # Levels of the table: between two, ComfyUI tells the network the nearest timestep, we the fraction.
        sigma = torch.tensor([0.99, 0.3]) if name == "sd3" else DiscreteSchedule().sigma(torch.tensor([990, 300]))
        given = {"x": x * sigma.view(-1, 1, 1, 1), "sigma": sigma, **_text(name, condition, checkpoint)}
        save_file(given, folder / "in.safetensors")
        file = comfyui.base / "models" / "checkpoints" / checkpoint.file
        command = [HERE / "adapter.py", installation[0], HERE.parents[2], file, "in.safetensors", "out.safetensors"]
        ran = subprocess.run(
            [installation[1], *map(str, command)],
            cwd=folder,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        return given, load_file(folder / "out.safetensors")

    return run


def _text(name, condition, checkpoint):
    if name == "sd3":
        return {"states": torch.randn(1, 77, checkpoint.width), "pooled": torch.randn(1, checkpoint.pooled)}
    cond = condition(name)
    pooled = torch.zeros(1, checkpoint.pooled) if cond.pooled is None else cond.pooled
    return {"states": cond.context, "pooled": pooled}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl_v", "sd3"])
def test_gradients_reach_every_lora_and_the_weights_stay_to_the_bit(through, name):
    _, found = through(name)
    assert found["frozen"]  # it was loaded in inference mode, where no gradient is to be had
    assert found["branches"] > 40 and found["taught"] == found["branches"]
    assert found["same"] and found["again"]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl_v"])
def test_it_denoises_as_diffusers_classes_do(through, checkpoints, condition, gap, name):
    given, found = through(name)
    expected, cond = checkpoints[name].denoiser, condition(name)
    with torch.no_grad():
        x0 = expected(given["x"], given["sigma"], cond.repeat(2))
    assert gap(found["x0"], x0) < 1e-4
    assert torch.allclose(found["levels"], expected.schedule.sigma(torch.arange(1000.0)), rtol=1e-4)


def test_a_flow_model_s_x0_and_output_agree(through, gap):
    given, found = through("sd3")
    sigma = given["sigma"].view(-1, 1, 1, 1)
    assert gap(given["x"] - sigma * found["output"], found["x0"]) < 1e-4
    t = torch.arange(1, 1001) / 1000
    assert torch.allclose(found["levels"], 3 * t / (1 + 2 * t), atol=1e-4)  # SD3's shift is 3
