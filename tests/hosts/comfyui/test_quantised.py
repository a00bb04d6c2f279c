"""Quantised weights, as newer ComfyUIs hold them: a student learns beside them, and its file fits them."""

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.host, pytest.mark.newest]

HERE = Path(__file__).parent
FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise")


@pytest.fixture(scope="module")
def told(installation, comfyui, checkpoints, tmp_path_factory):
    """What quantised.py found."""
    folder, python = installation
    if not (folder / "comfy" / "quant_ops.py").exists():
        pytest.skip(f"needs a ComfyUI with quantised weights, 0.33 or later: {folder} has none")
    file = comfyui.base / "models" / "checkpoints" / checkpoints["flux"].file
    script = [python, *map(str, (HERE / "quantised.py", folder, HERE.parents[2], file, tmp_path_factory.mktemp("q")))]
    ran = subprocess.run(script, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("kind", FORMATS)
def test_gradients_are_those_of_the_numbers_that_they_stand_for(told, kind):
    assert told[kind]["gap"] < 0.05 and told[kind]["gradients"] > 0.999
    assert told[kind]["merged"] == 0  # the LoRA is not lost where a picture is made


@pytest.mark.parametrize("kind", FORMATS)
def test_a_student_s_file_fits_them(told, kind):
    assert told[kind]["patches"] == 1 and told[kind]["warning"] == ""


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_copy_of_them_is_refused(told, kind):
    assert "rank 0 trains a full copy" in told[kind]["refused"]
