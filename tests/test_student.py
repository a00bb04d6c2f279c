"""The student over its frozen teacher: LoRA and full copy, sampled, saved and loaded."""

import pytest
import torch
from turbodistill.core.card import CardError, StudentCard, fingerprint, read_student
from turbodistill.core.sampling import seeded_noise
from turbodistill.core.student import Student, load_student, student_bytes

PREDICTIONS = ["eps", "v", "flow"]


def inputs(toys, denoiser, batch=2):
    return toys.picture(batch), denoiser.schedule.sigma(torch.linspace(500, 999, batch)), toys.cond(batch)


def card_of(student, **changes):
    lora = student.lora
    values = {
        "kind": "full" if lora is None else "lora",
        "base_model": "toy",
        "base_hash": fingerprint(student.teacher.backbone),
        "architecture": "toy",
        "prediction": student.prediction,
        "base_prediction": student.teacher.prediction,
        "timesteps": (student.start_timestep,),
        "guidance": 4.0,
        "resolution": (64, 64),
        "rank": lora.rank if lora else 0,
        "alpha": lora.alpha if lora else 0.0,
        "targets": lora.targets if lora else "all",
    }
    return StudentCard(**values | changes)


def saved(path, student, dtype=torch.float32, **changes):
    path.write_bytes(student_bytes(student, card_of(student, **changes), dtype))
    return path


# --- The student ---


@pytest.mark.parametrize("rank", [0, 4])
def test_gradients_reach_the_student_alone(toys, rank):
    teacher = toys.conv()
    student = Student(teacher, rank=rank)
    x, sigma, cond = inputs(toys, teacher)
    with student.training():
        student(x, sigma, cond).square().mean().backward()
    assert all(p.grad is None for p in teacher.backbone.parameters())
    # A fresh LoRA's down gets its first gradient when up is no longer zero.
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.trained.parameters())


@pytest.mark.parametrize("rank", [0, 4])
def test_training_restores_every_flag(toys, rank):
    teacher = toys.conv()
    teacher.backbone.conv_in.weight.requires_grad_(False)
    student = Student(teacher, rank=rank)
    flags = {n: p.requires_grad for n, p in teacher.backbone.named_parameters()}
    with pytest.raises(KeyError), student.training():
        assert not any(p.requires_grad for p in teacher.backbone.parameters())
        assert all(p.requires_grad for p in student.trained.parameters())
        raise KeyError
    assert {n: p.requires_grad for n, p in teacher.backbone.named_parameters()} == flags


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_trainings_on_one_model_the_last_to_end_restores_its_flags(toys, first):
    teacher = toys.conv()
    teacher.backbone.conv_in.weight.requires_grad_(False)
    flags = [p.requires_grad for p in teacher.backbone.parameters()]
    trainings = [Student(teacher, rank=rank).training() for rank in (4, 0)]
    for training in trainings:
        training.__enter__()
    trainings[first].__exit__(None, None, None)
    assert not any(p.requires_grad for p in teacher.backbone.parameters())
    trainings[1 - first].__exit__(None, None, None)
    assert [p.requires_grad for p in teacher.backbone.parameters()] == flags


def test_a_full_copy_shares_no_tensor_with_the_teacher(toys):
    teacher = toys.conv()
    x, sigma, cond = inputs(toys, teacher)
    before = teacher(x, sigma, cond)
    student = Student(teacher, rank=0)
    assert torch.equal(student(x, sigma, cond), before)
    with torch.no_grad():
        for p in student.trained.parameters():
            p.add_(1.0)
    assert torch.equal(teacher(x, sigma, cond), before)
    assert not torch.allclose(student(x, sigma, cond), before, atol=0.1)
    assert not any(m._forward_hooks for m in teacher.backbone.modules())


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_output_is_the_backbone_s_own(toys, prediction, rank):
    teacher = toys.conv(prediction)
    x, sigma, cond = inputs(toys, teacher)
    student = Student(teacher, rank=rank, prediction="x0")
    assert student.prediction == "x0" and student.teacher.prediction == teacher.prediction
    assert torch.allclose(student(x, sigma, cond), teacher.output(x, sigma, cond), atol=1e-6)
    assert Student(teacher, rank=0).prediction == prediction


def test_an_unknown_output_is_refused(toys):
    with pytest.raises(ValueError, match="'score': use one of inherit, x0"):
        Student(toys.conv(), prediction="score")


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_one_step_is_one_pass_over_noise_at_the_start(toys, prediction):
    teacher = toys.conv(prediction)
    student = Student(teacher, rank=0, start_timestep=399)
    noise, cond = toys.picture(), toys.cond()
    sigma = student.sigmas(1)[:1].expand(2)
    x = student.schedule.add_noise(torch.zeros_like(noise), noise, sigma)
    assert torch.allclose(student.generate(noise, cond), student(x, sigma, cond), atol=1e-5)
    assert torch.allclose(sigma, teacher.schedule.sigma(torch.tensor([399, 399])))


def test_few_steps_begin_at_the_student_s_start(toys):
    teacher = toys.Recorder()
    student = Student(teacher, rank=0, start_timestep=799)
    seen = []
    student._network = toys.Recorder(lambda x, sigma, cond: seen.append(float(sigma[0])) or torch.zeros_like(x))
    student.generate(toys.picture(), toys.cond(), steps=4)
    assert seen == pytest.approx([float(teacher.schedule.sigma(t)) for t in (799, 599, 399, 199)])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_row_s_noise_makes_its_picture_alone(toys, steps):
    student, seeds, cond = Student(toys.conv(), rank=0), [11, 12, 13], toys.cond(3)
    noise = seeded_noise(seeds, (4, 8, 8))
    batch = student.generate(noise, cond, steps)
    for k in range(3):
        one = student.generate(noise[k : k + 1], cond.rows([k]), steps)
        assert torch.allclose(one[0], batch[k], atol=1e-3)
    assert torch.equal(student.generate(noise, cond, steps), batch)


# --- Files ---


@pytest.mark.parametrize("output", ["inherit", "x0"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kind", ["conv", "unet"])
def test_a_student_file_goes_there_and_back(toys, tmp_path, kind, rank, output):
    teacher = getattr(toys, kind)()
    student = Student(teacher, rank=rank, alpha=2.0, prediction=output, start_timestep=899)
    if rank:
        toys.nudge(student.lora)
    else:
        with torch.no_grad():
            for p in student.trained.parameters():
                p.add_(0.05)
    noise, cond = toys.picture(), toys.cond()
    expected = student.generate(noise, cond)
    path = saved(tmp_path / "student.safetensors", student)
    student.release()
    loaded, card, warning = load_student(path, teacher)
    assert torch.allclose(loaded.generate(noise, cond), expected, atol=1e-4)
    assert (card.timesteps, loaded.start_timestep, loaded.prediction, warning) == ((899,), 899, student.prediction, "")


def test_a_full_student_of_a_diffusers_unet_is_a_single_file(toys, tmp_path):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    teacher = toys.unet()
    tensors, _ = read_student(saved(tmp_path / "student.safetensors", Student(teacher, rank=0)))
    assert "model.diffusion_model.input_blocks.0.0.weight" in tensors
    back = convert_ldm_unet_checkpoint(dict(tensors), dict(teacher.backbone.config))
    teacher.backbone.load_state_dict(back)  # strict: none missing, none over


def test_another_base_is_warned_of(toys, tmp_path):
    path = saved(tmp_path / "student.safetensors", Student(toys.conv(), rank=2))
    _, _, warning = load_student(path, toys.conv(seed=1))
    assert "was made for toy" in warning and "another" in warning


@pytest.mark.parametrize("rank", [0, 2])
def test_another_architecture_is_refused_and_left_clean(toys, tmp_path, rank):
    path = saved(tmp_path / "student.safetensors", Student(toys.conv(), rank=rank))
    teacher = toys.unet()
    with pytest.raises(CardError, match=r"student.safetensors does not fit this model: .*names match"):
        load_student(path, teacher)
    assert not any(m._forward_hooks for m in teacher.backbone.modules())


@pytest.mark.parametrize("rank", [0, 2])
def test_layers_of_another_size_are_refused(toys, tmp_path, rank):
    path = saved(tmp_path / "student.safetensors", Student(toys.unet(), rank=rank))
    wider = toys.UNetDenoiser(toys.small_unet(text=10), toys.conv().schedule, "eps")
    with pytest.raises(CardError, match="does not fit this model"):
        load_student(path, wider)


def test_another_prediction_is_refused(toys, tmp_path):
    path = saved(tmp_path / "student.safetensors", Student(toys.conv("eps"), rank=2))
    with pytest.raises(CardError, match=r"predicts eps, the loaded one predicts v: it is the right file"):
        load_student(path, toys.conv("v"))


@pytest.mark.parametrize(("value", "dtype"), [(1e6, torch.float16), (float("nan"), torch.float32)])
@pytest.mark.parametrize("rank", [2, 0])
def test_weights_that_a_file_cannot_hold_are_told(toys, value, dtype, rank):
    student = Student(toys.conv(), rank)
    with torch.no_grad():
        next(iter(student.trained.parameters())).fill_(value)
    card = StudentCard("lora", "toy", "0" * 16, "sd", "eps", "eps", (999,), 1.0, (64, 64))
    with pytest.raises(ValueError, match=r"weights are no numbers in torch.float.*: the training has diverged"):
        student_bytes(student, card, dtype)
