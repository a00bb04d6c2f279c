"""A training that goes on from a student's file."""

import pytest
import torch
from turbodistill.core.card import read_student
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.run.events import Preview


@pytest.fixture
def first(kit, host, tmp_path):
    """The file of a student that was trained for two updates."""
    *_, finished = kit.go(host, kit.config(), tmp_path / "first")
    return finished.path


@pytest.mark.parametrize("rank", [2, 0])
def test_the_first_pictures_are_the_older_student_s(kit, host, tmp_path, rank):
    *_, shown, finished = kit.go(host, kit.config(rank=rank), tmp_path / "first")
    settings = kit.config(rank=rank, init_student=str(finished.path))
    again = next(e for e in kit.go(host, settings, tmp_path / "second") if isinstance(e, Preview))
    assert again.update == 0
    assert torch.allclose(again.student, shown.student, atol=1e-2)  # the file is in half precision
    assert not torch.allclose(again.student, again.teacher, atol=1e-2)


def test_the_card_names_the_file(kit, host, tmp_path, first):
    *_, finished = kit.go(host, kit.config(init_student=str(first)), tmp_path / "second")
    assert finished.card.training["init_student"] == "student.safetensors"
    assert "init_student" not in read_student(first)[1].training


def test_once_begun_it_may_be_left_out(kit, host, tmp_path, first):
    kit.go(host, kit.config(init_student=str(first)), tmp_path / "second")
    *_, finished = kit.go(host, kit.config(updates=4), tmp_path / "second")
    assert finished.card.training["updates"] == 2 + 4  # the first student's, too


@pytest.mark.parametrize("changes", [{"rank": 3}, {"rank": 0}, {"prediction": "x0"}, {"start_timestep": 800}])
def test_a_student_of_another_kind_is_refused(kit, host, tmp_path, first, changes):
    before = kit.weights(host.denoiser.backbone)
    with pytest.raises(
        ConfigError, match=r"init_student: .*student.safetensors has base model, prediction, start timestep and rank"
    ):
        kit.go(host, kit.config(init_student=str(first), **changes), tmp_path / "second")
    assert kit.same(kit.weights(host.denoiser.backbone), before)
    assert not any(m._forward_hooks for m in host.denoiser.backbone.modules())


def test_one_of_other_layers_or_model_is_refused(kit, host, tmp_path, first):
    with pytest.raises(ConfigError, match=r"init_student: .*names match"):
        kit.go(host, kit.config(init_student=str(first), targets=r"blocks\.0"), tmp_path / "second")
    host.base_hash = "another"
    with pytest.raises(ConfigError, match=r"init_student: .*another"):
        kit.go(host, kit.config(init_student=str(first)), tmp_path / "third")


def test_a_file_that_is_missing_is_named(kit, host, tmp_path):
    with pytest.raises(ConfigError, match=r"init_student: .*gone.safetensors does not exist"):
        kit.go(host, kit.config(init_student=str(tmp_path / "gone.safetensors")), tmp_path / "run")


def test_a_copy_of_quantised_weights_is_refused_before_any_pair_is_made(kit, host, tmp_path):
    first = next(m for m in host.denoiser.backbone.modules() if isinstance(m, torch.nn.Linear))
    first.weight = torch.nn.Parameter(first.weight.detach().to(torch.int8), requires_grad=False)  # as packed ones are
    with pytest.raises(ConfigError, match=r"rank 0 trains a full copy, but 1 of .* are quantised .*give a rank"):
        kit.go(host, kit.config(rank=0), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("pairs-*"))
