"""Exported files in a real ComfyUI: full-size Stable Diffusion 1.5, each format, no key missing or left over."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from turbodistill.core.denoiser import Cond
from turbodistill.core.schedule import DiscreteSchedule
from turbodistill.core.student import load_student
from turbodistill.generate.export.export import Export
from turbodistill.trainer.pipeline.denoisers import UNetDenoiser

pytestmark = [pytest.mark.host, pytest.mark.full_size, pytest.mark.timeout(1800)]
HERE = Path(__file__).parent
STYLES = ("kohya", "comfy")


@pytest.fixture(scope="module")
def full():
    file = HERE.parents[1] / "export" / "full_size.py"
    spec = importlib.util.spec_from_file_location("turbodistill_full_size", file)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def python_picture(base, student, given):
    """x0 of the student and of the teacher through diffusers' network in float32."""
    from diffusers import UNet2DConditionModel
    from turbodistill.core.naming import to_single_file

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    weights = load_file(base)
    own = {k: weights[f"model.diffusion_model.{v}"].float() for k, v in to_single_file(unet.state_dict()).items()}
    unet.load_state_dict(own, assign=True)
    denoiser = UNetDenoiser(unet.eval().requires_grad_(False), DiscreteSchedule(), "eps")
    made, _, warning = load_student(student, denoiser)
    assert not warning
    with torch.no_grad():
        return [d(given["x"], given["sigma"], Cond(given["states"])) for d in (made, denoiser)]


@pytest.fixture(scope="module")
def found(installation, full, tmp_path_factory):
    """What exported.py told and made, and x0 of student and teacher here."""
    place = tmp_path_factory.mktemp("exported")
    base = full.write(place / "base.safetensors", "sd15")
    student = full.write_student(place / "student.safetensors", base, "sd15")
    for to in (*STYLES, "merged"):
        out = place / f"{'' if to == 'merged' else 'lora-'}{to}.safetensors"
        for _ in Export(student, to, out, base).run():
            pass
    torch.manual_seed(0)
    sigma = DiscreteSchedule().sigma(torch.tensor([999.0]))
    given = {"x": sigma * torch.randn(1, 4, 8, 8), "sigma": sigma, "states": torch.randn(1, 77, 768)}
    save_file(given, place / "inputs.safetensors")
    expected = python_picture(base, student, given)
    folder, python = installation
    ran = subprocess.run(
        [python, *map(str, (HERE / "exported.py", folder, HERE.parents[2], place))], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    yield json.loads((place / "told.json").read_text()), load_file(place / "out.safetensors"), *expected
    for file in place.glob("*.safetensors"):
        file.unlink()  # pytest keeps its last folders


@pytest.mark.parametrize("name", ["base", "merged", *(f"lora-{s}" for s in STYLES)])
def test_no_key_is_missing_or_left_over(found, name):
    told = found[0]
    assert told[name] == []
    if not name.startswith("lora"):
        assert told[f"{name} parts"] == [True, True]  # text encoder and autoencoder


@pytest.mark.parametrize(("name", "bound"), [("merged", 0.02), *((f"lora-{s}", 1e-3) for s in STYLES)])
def test_the_picture_is_the_student_s(found, gap, name, bound):
    """Of a merged file to float16's rounding of its weights."""
    _, made, student, teacher = found
    assert gap(made[name], student) < bound < 0.1 < gap(made["base"], student)
    assert gap(made["base"], teacher) < 1e-3
