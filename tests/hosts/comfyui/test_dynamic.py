"""Dynamic VRAM, which streams weights to the GPU for every pass: a training takes others of the same file."""

import pytest

pytestmark = [pytest.mark.host, pytest.mark.newest]


@pytest.fixture(scope="module")
def told(installation, script):
    """What dynamic.py found."""
    if "class ModelPatcherDynamic" not in (installation[0] / "comfy" / "model_patcher.py").read_text():
        pytest.skip(f"needs a ComfyUI with dynamic VRAM, 0.33 or later: {installation[0]} has none")
    return script("dynamic", "sd15")


def test_gradients_flow_on_the_device_alone(told):
    """Branches that lie where the streamed weights do, on the CPU, would meet inputs on the GPU."""
    assert told["dynamic"] == [True, False] and told["on"] == ["meta"]
    assert told["taught"] == told["branches"] > 0 and told["full"]


def test_what_others_sample_with_is_left_alone(told):
    assert told["streamed"] and told["alone"] and told["hash"] and told["again"]


def test_weights_that_cannot_be_read_again_are_refused(told):
    assert "start ComfyUI with --disable-dynamic-vram" in told["refused"]
