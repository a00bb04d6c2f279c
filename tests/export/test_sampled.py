"""A student merged into a checkpoint or a diffusers folder: sampled by its card, and refused as a teacher."""

import json

import pytest
import torch
import turbodistill as td
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from turbodistill.app import cli
from turbodistill.core.schedule import trailing_timesteps
from turbodistill.generate.few_step import few_step_model
from turbodistill.generate.sample import sample
from turbodistill.trainer.checkpoint.errors import ModelError

CHANGES = {
    "as the base": {},
    "full": {"full": True},
    "x0": {"prediction": "x0"},
    "early": {"timesteps": (399,)},
    "few steps": {"timesteps": (999, 499)},
    "guidance alone": {"timesteps": tuple(trailing_timesteps(9)), "guidance_only": True},
}


@pytest.fixture(scope="module", params=["merged", "diffusers"])
def to(request):
    return request.param


def exported(kit, base, place, to, student):
    out = place / ("out.safetensors" if to == "merged" else "out")
    kit.export(student, to, out, base=base.folder, dtype="float32")
    return out


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_it_makes_the_student_s_picture(kit, make, tmp_path, to, changes):
    base = make("sd1")
    student = base.student(tmp_path / "student.safetensors", torch.float32, **changes)
    steps = len(changes.get("timesteps", (0,)))
    how = {"tokenizer": base.tokenizer} if to == "merged" else {}
    host = td.load_model(exported(kit, base, tmp_path, to, student), "cpu", (64, 64), with_student=True, **how)
    model, remarks = few_step_model(host, None)
    assert model.recipe.name == "student of tiny-sd1" and model.recipe.steps == steps and not remarks
    plain = td.load_model(base.folder, "cpu", (64, 64))
    expected = list(sample(plain, td.load_student(student, plain)[0], ["a fox"], 0, steps))
    found = list(sample(host, model, ["a fox"], 0, steps))
    assert (found[0] - expected[0]).abs().max() < 1e-3


def test_the_commands_know_it(kit, make, tmp_path, to, capsys):
    base = make("sd1")
    student = base.student(tmp_path / "student.safetensors")
    out = exported(kit, base, tmp_path, to, student)
    how = ["--tokenizer", str(base.tokenizer)] if to == "merged" else []
    given = ["sample", "a fox", "--model", str(out), "--size", "64x64", "--out", str(tmp_path / "p"), *how]
    assert cli.main(given) == 0
    (picture,) = (tmp_path / "p").iterdir()
    assert "Steps: 1, " in Image.open(picture).text["parameters"]
    capsys.readouterr()
    assert cli.main([*given, "--student", str(student)]) == 1
    assert "has a student of tiny-sd1 merged into it: leave student.safetensors out" in capsys.readouterr().err
    assert cli.main(["info", str(out)]) == 0
    told = capsys.readouterr().out
    assert "One-step student of tiny-sd1, a full model" in told and "merged into this checkpoint: sample it" in told
    (tmp_path / "prompts.txt").write_text("a fox\n")
    given = ["distill", "--model", str(out), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "r")]
    assert cli.main([*given, *how]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "has a student of tiny-sd1 merged into it, so it is no teacher: give tiny-sd1 instead" in line


def test_a_loaded_pipeline_of_it_is_no_teacher(kit, make, tmp_path):
    base = make("sd1")
    out = exported(kit, base, tmp_path, "diffusers", base.student(tmp_path / "student.safetensors"))
    pipe = StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    with pytest.raises(ModelError, match="so it is no teacher"):
        td.load_model(pipe)


def test_a_full_student_s_file_stays_no_base(make, tmp_path):
    path = make("sd1").student(tmp_path / "full.safetensors", full=True)
    assert all(n.startswith("model.diffusion_model.") for n in load_file(path))
    with pytest.raises(ModelError, match="is a student that TurboDistill made of tiny-sd1: give it as the"):
        td.load_model(path, "cpu", with_student=True)


def test_a_folder_s_card_that_cannot_be_read_is_told(kit, make, tmp_path):
    base = make("sd1")
    out = exported(kit, base, tmp_path, "diffusers", base.student(tmp_path / "student.safetensors"))
    assert json.loads((out / "turbodistill.json").read_text())["kind"] == "full"
    (out / "turbodistill.json").write_text("{")
    with pytest.raises(ModelError, match=r"turbodistill.json cannot be read .*: get the folder again"):
        td.load_model(out, "cpu", with_student=True)
