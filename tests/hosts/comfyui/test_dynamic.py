"""Dynamic VRAM, which streams weights to the GPU for every pass: a training takes others of the same file."""

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.host, pytest.mark.newest]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def told(installation, comfyui, checkpoints):
    """What dynamic.py found."""
    folder, python = installation
    if "class ModelPatcherDynamic" not in (folder / "comfy" / "model_patcher.py").read_text():
        pytest.skip(f"needs a ComfyUI with dynamic VRAM, 0.33 or later: {folder} has none")
    file = comfyui.base / "models" / "checkpoints" / checkpoints["sd15"].file
    script = [python, *map(str, (HERE / "dynamic.py", folder, HERE.parents[2], file))]
    ran = subprocess.run(script, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


def test_gradients_flow_on_the_device_alone(told):
    """Branches that lie where the streamed weights do, on the CPU, would meet inputs on the GPU."""
    assert told["dynamic"] == [True, False] and told["on"] == ["meta"]
    assert told["taught"] == told["branches"] > 0 and told["full"]


def test_what_others_sample_with_is_left_alone(told):
    assert told["streamed"] and told["alone"] and told["hash"] and told["again"]


def test_weights_that_cannot_be_read_again_are_refused(told):
    assert "start ComfyUI with --disable-dynamic-vram" in told["refused"]
