"""Quantised weights, as newer ComfyUIs hold them: a student learns beside them, and its file fits them."""

import pytest

pytestmark = [pytest.mark.host, pytest.mark.newest]


@pytest.fixture(scope="module")
def told(installation, script):
    """What quantised.py found, by the format of the weights."""
    if not (installation[0] / "comfy" / "quant_ops.py").exists():
        pytest.skip(f"needs a ComfyUI with quantised weights, 0.33 or later: {installation[0]} has none")
    return script("quantised", "flux")


def test_gradients_are_those_of_the_numbers_that_they_stand_for(told):
    assert {"float8_e4m3fn", "nvfp4", "int8_tensorwise"} == told.keys()
    for found in told.values():
        assert found["gap"] < 0.05 and found["gradients"] > 0.999
        assert found["merged"] == 0  # the LoRA is not lost where a picture is made


def test_a_student_s_file_fits_them(told):
    assert [(found["patches"], found["warning"]) for found in told.values()] == [(1, "")] * 3


def test_a_full_copy_of_them_is_refused(told):
    assert all("rank 0 trains a full copy" in found["refused"] for found in told.values())
