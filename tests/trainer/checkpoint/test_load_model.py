"""A checkpoint as people have it is distilled: from the file to a student that is sampled."""

import pytest
import torch
from turbodistill.core.student import load_student
from turbodistill.generate.sample import sample
from turbodistill.trainer.checkpoint.errors import ModelError
from turbodistill.trainer.checkpoint.load import load_pipeline
from turbodistill.trainer.pipeline.load import load_model
from turbodistill.trainer.run.events import Finished, Warned

MARKS = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}


@pytest.fixture(params=["small_sd1", "small_sd2", "small_sdxl", "folder"])
def source(request, small_sdxl, vocabulary, tmp_path):
    """A file of each kind, and a folder; that of Stable Diffusion XL predicts v up to no signal at all."""
    if request.param == "folder":
        path = small_sdxl.write(tmp_path / "file.safetensors", **MARKS)
        load_pipeline(path, tokenizer=vocabulary).pipe.save_pretrained(tmp_path / "mine")
        return tmp_path / "mine", {}
    marks = MARKS if request.param == "small_sdxl" else {}
    made = request.getfixturevalue(request.param)
    return made.write(tmp_path / "mine.safetensors", **marks), {"tokenizer": vocabulary}


def test_a_checkpoint_is_distilled_and_its_student_sampled(source, kit, tmp_path):
    path, options = source
    host = load_model(path, "cpu", size=(64, 64), **options)
    xl = host.denoiser.prediction == "v"
    assert host.name == "mine" and host.latent_shape == (4, 32, 32)
    assert host.denoiser.schedule.sigma_max > 4000 if xl else host.denoiser.schedule.sigma_max < 15
    assert {p.dtype for p in host.denoiser.backbone.parameters()} == {torch.float32}  # as a CPU computes
    assert not any(p.requires_grad for p in host.denoiser.backbone.parameters())
    settings = kit.config(pairs=4, batch_size=2, updates=2, taps="", adversarial_weight=0.0, regression_weight=1.0)
    events = kit.go(host, settings, tmp_path / "run")
    assert isinstance(events[-1], Finished) and not [e for e in events if isinstance(e, Warned)]
    card = events[-1].card
    assert (card.base_model, card.architecture) == ("mine", host.architecture)
    assert card.base_prediction == host.denoiser.prediction
    student, _, warning = load_student(events[-1].path, host.denoiser)
    assert warning == ""
    (picture,) = sample(host, student, ["a b"], seed=1)
    assert picture.shape == (3, 64, 64) and picture.isfinite().all()
    student.release()


def test_options_are_for_checkpoints_and_known(small_sd1, tmp_path):
    with pytest.raises(TypeError, match="load_model has no option 'revison'"):
        load_model("me/model", revison="v1")
    with pytest.raises(ModelError, match="revision is an option for files, folders and the hub: leave it out"):
        load_model(revision="v1")


def test_a_remark_on_the_checkpoint_is_logged(small_sd1, vocabulary, tmp_path, caplog):
    path = small_sd1.write(tmp_path / "mine.safetensors", **{"more.weight": torch.zeros(1)})
    load_model(path, "cpu", tokenizer=vocabulary)
    assert "1 weights in mine.safetensors are not used, such as more.weight." in caplog.messages


def test_the_command_line_takes_a_file_and_what_it_lacks(small_sd1, files, vocabulary, tmp_path, capsys):
    pytest.importorskip("tqdm")
    from turbodistill.app.cli import main
    from turbodistill.demo.files import STUDENT

    path = small_sd1.without("first_stage_model.").write(tmp_path / "mine.safetensors")
    files.Made(files.vae_weights(small_sd1.modules["vae"])).write(tmp_path / "vae.safetensors")
    given = ["sample", "a", "--model", str(path), "--tokenizer", str(vocabulary), "--out", str(tmp_path)]
    assert main(given) == 1
    assert f"turbodistill: {path} holds no vae: give as components" in capsys.readouterr().err
    assert main([*given, "--vae", str(tmp_path / "vae.safetensors"), "--student", str(STUDENT)]) == 1
    assert "was made for a model that predicts v, the loaded one predicts eps" in capsys.readouterr().err
    assert main(["sample", "a", "--revision", "v1", "--out", str(tmp_path)]) == 1
    assert "revision is an option for files, folders and the hub" in capsys.readouterr().err
