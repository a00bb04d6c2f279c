"""A training that goes on from a student's file."""

import logging

import pytest
import torch
from turbodistill.core.card import fingerprint, read_student
from turbodistill.core.foreign_lora import ForeignLoRA
from turbodistill.core.sampling import seeded_noise
from turbodistill.core.student import Student
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


@pytest.mark.parametrize("changes", [{"prediction": "x0"}, {"start_timestep": 800}])
def test_a_student_that_is_read_in_another_way_is_refused(kit, host, tmp_path, first, changes):
    before = kit.weights(host.denoiser.backbone)
    with pytest.raises(ConfigError, match=r"init_student: .*student.safetensors has prediction and start timestep"):
        kit.go(host, kit.config(init_student=str(first), **changes), tmp_path / "second")
    assert kit.same(kit.weights(host.denoiser.backbone), before)
    assert not any(m._forward_hooks for m in host.denoiser.backbone.modules())


def test_one_of_other_layers_is_refused(kit, host, tmp_path, first):
    with pytest.raises(ConfigError, match=r"init_student: .*names match"):
        kit.go(host, kit.config(init_student=str(first), targets=r"blocks\.0"), tmp_path / "second")


def preview(kit, host, settings, folder):
    return next(e for e in kit.go(host, settings, folder) if isinstance(e, Preview))


@pytest.mark.parametrize("rank", [2, 5])
def test_a_student_of_another_fine_tune_is_begun_from(kit, tmp_path, rank, caplog):
    """What the student changed of its own base is what it changes of the other one, at first."""
    taps = "down_blocks.0,mid_block"
    own, other = kit.unet_host(), kit.unet_host()
    with torch.no_grad():  # a fine-tune of it
        for weight in other.denoiser.backbone.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    other.base_hash = fingerprint(other.denoiser.backbone)
    *_, finished = kit.go(own, kit.config(taps=taps), tmp_path / "first")
    settings = kit.config(taps=taps, rank=rank, init_student=str(finished.path))
    with caplog.at_level(logging.INFO):
        found = preview(kit, other, settings, tmp_path / "second")
    assert "the student begins from student of toy (student.safetensors)" in caplog.text
    lora = ForeignLoRA(finished.path, of_ours=True).changes(other.denoiser.backbone)
    student = Student(other.denoiser, 1)  # nothing yet
    noise = torch.stack([seeded_noise([seed], other.latent_shape)[0] for seed in found.seeds])
    plain = student.generate(noise, other.encode_text(found.prompts))
    student.release()
    with lora.merged(other.denoiser.backbone):
        merged = Student(other.denoiser, 1)
        expected = merged.generate(noise, other.encode_text(found.prompts))
        merged.release()
    assert torch.allclose(found.student, expected, atol=2e-2)
    assert not torch.allclose(found.student, plain, atol=0.1)


def test_a_full_copy_of_another_model_is_refused(kit, host, tmp_path):
    *_, finished = kit.go(host, kit.config(rank=0), tmp_path / "first")
    host.base_hash = "another"
    with pytest.raises(ConfigError, match=r"is a full copy of toy, which would take its place: extract its LoRA"):
        kit.go(host, kit.config(rank=0, init_student=str(finished.path)), tmp_path / "third")


def test_a_file_that_is_missing_is_named(kit, host, tmp_path):
    with pytest.raises(ConfigError, match=r"init_student: .*gone.safetensors does not exist"):
        kit.go(host, kit.config(init_student=str(tmp_path / "gone.safetensors")), tmp_path / "run")


def test_a_copy_of_quantised_weights_is_refused_before_any_pair_is_made(kit, host, tmp_path):
    first = next(m for m in host.denoiser.backbone.modules() if isinstance(m, torch.nn.Linear))
    first.weight = torch.nn.Parameter(first.weight.detach().to(torch.int8), requires_grad=False)  # as packed ones are
    with pytest.raises(ConfigError, match=r"rank 0 trains a full copy, but 1 of .* are quantised .*give a rank"):
        kit.go(host, kit.config(rank=0), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("pairs-*"))
