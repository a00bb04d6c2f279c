"""Exported files in a real ComfyUI: full-size Stable Diffusion 1.5, 2.1, XL, every format, no key missing or left."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from turbodistill.generate.export.export import Export

pytestmark = [pytest.mark.host, pytest.mark.full_size, pytest.mark.timeout(1800)]
HERE = Path(__file__).parent
STYLES = ("kohya", "comfy")


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl", "sdxl-v"])
def found(request, installation, full, tmp_path_factory):
    """What exported.py told and made, and x0 of student and teacher here."""
    full.skip_without_memory(request.param)
    place = tmp_path_factory.mktemp("exported")
    base = full.write(place / "base.safetensors", request.param)
    tokenizer = installation[0] / "comfy" / "sd1_tokenizer"
    full.apart(full.distil, place, request.param, tokenizer)
    for to in (*STYLES, "merged"):
        out = place / f"{'' if to == 'merged' else 'lora-'}{to}.safetensors"
        for _ in Export(place / "student.safetensors", to, out, base).run():
            pass
    full.apart(full.one_step, place, request.param, tokenizer)
    expected = load_file(place / "expected.safetensors")
    folder, python = installation
    ran = subprocess.run(
        [python, *map(str, (HERE / "exported.py", folder, HERE.parents[2], place))], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    yield json.loads((place / "told.json").read_text()), load_file(place / "out.safetensors"), expected
    shutil.rmtree(place)  # pytest keeps its last folders


@pytest.mark.parametrize("name", ["base", "merged", *(f"lora-{s}" for s in STYLES)])
def test_no_key_is_missing_or_left_over(request, found, full, name):
    """But for the marks of v-prediction, by which ComfyUI tells it, and which it counts as left over in any file."""
    told, marks = found[0], list(full.KINDS[request.node.callspec.params["found"]].marks)
    lora = name.startswith("lora")
    assert told[name] == ([f"left over keys: dict_keys({marks})"] if marks and not lora else [])
    if not lora:
        assert told[f"{name} parts"] == [True, True]  # text encoder and autoencoder


@pytest.mark.parametrize("name", ["merged", *(f"lora-{s}" for s in STYLES)])
def test_the_picture_is_the_student_s(request, found, gap, name):
    """Where the weights are float32, but for a merged file's, to 1e-3; else to float16's rounding of them."""
    _, made, expected = found
    rounded = name == "merged" or "sdxl" in request.node.callspec.id
    assert (
        gap(made[name], expected["student"])
        < (0.02 if rounded else 1e-3)
        < 0.1
        < gap(made["base"], expected["student"])
    )
    assert gap(made["base"], expected["teacher"]) < 1e-3
