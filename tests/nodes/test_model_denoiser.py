"""A MODEL as core's Denoiser: the same x0, schedule and backbone, whatever it predicts."""

import pytest
import torch
from turbodistill.core.student import Student

PREDICTIONS = ("eps", "v", "flow")


@pytest.fixture
def pair(toys, model_of, nodes):
    """Prediction -> a toy denoiser, and the same network as a MODEL's."""

    def build(prediction):
        toy = toys.conv(prediction)
        return toy, nodes.host_denoiser.ModelDenoiser(model_of(toy))

    return build


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_denoises_as_the_network_does(toys, pair, prediction):
    toy, found = pair(prediction)
    x, cond, sigma = toys.picture(), toys.cond(), toy.schedule.sigma(torch.tensor([999.0, 300.0]))
    assert found.prediction == prediction and found.backbone is toy.backbone
    assert torch.allclose(found(x, sigma, cond), toy(x, sigma, cond), atol=1e-4)
    assert torch.allclose(found.output(x, sigma, cond), toy.output(x, sigma, cond), atol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_its_schedule_is_the_model_s(toys, pair, prediction):
    toy, found = pair(prediction)
    times = torch.tensor([0.0, 250.0, 999.0])
    assert torch.allclose(found.schedule.sigma(times), toy.schedule.sigma(times), rtol=1e-4)
    x, noise, sigma = toys.picture(), toys.picture(), toy.schedule.sigma(times[:2])
    space = found.base.model_sampling
    assert torch.allclose(found.schedule.add_noise(x, noise, sigma), space.noise_scaling(sigma, noise, x), atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0, 1.15])
@pytest.mark.parametrize("entries", [1000, 10000])
def test_a_flow_schedule_s_shift_is_found(nodes, comfyui, shift, entries):
    space = comfyui.model_sampling(comfyui.CONST, comfyui.ModelSamplingDiscreteFlow, shift, entries)
    model = comfyui.ModelPatcher(comfyui.BaseModel(torch.nn.Identity(), space))
    assert nodes.host_denoiser.schedule_of(model).shift == pytest.approx(shift, rel=1e-3)


def test_a_schedule_of_another_kind_is_refused(nodes, comfyui):
    spaces = [
        comfyui.model_sampling(comfyui.EDM, comfyui.ModelSamplingDiscrete),
        comfyui.model_sampling(comfyui.EPS, comfyui.ModelSamplingDiscreteDistilled),
        comfyui.model_sampling(comfyui.CONST, comfyui.ModelSamplingDiscrete, torch.linspace(0.001, 1, 1000) ** 2),
    ]
    for space in spaces:
        model = comfyui.ModelPatcher(comfyui.BaseModel(torch.nn.Identity(), space))
        with pytest.raises(ValueError, match="noise levels"):
            nodes.host_denoiser.schedule_of(model)


def test_a_lora_student_learns_on_it_and_off_is_the_teacher(toys, pair):
    toy, found = pair("eps")
    x, cond, sigma = toys.picture(), toys.cond(), toy.schedule.sigma(torch.tensor([999.0, 999.0]))
    before = found(x, sigma, cond)
    student = Student(found, rank=4)
    with student.training():
        student(x, sigma, cond).square().mean().backward()
    assert all(b.up.grad is not None and b.up.grad.any() for b in student.lora.each())
    toys.nudge(student.lora)
    assert not torch.allclose(student(x, sigma, cond), before)
    assert torch.equal(found(x, sigma, cond), before)


def test_a_full_copy_leaves_the_model_s_network_alone(toys, pair):
    toy, found = pair("v")
    x, cond, sigma = toys.picture(), toys.cond(), toy.schedule.sigma(torch.tensor([999.0, 300.0]))
    before = found(x, sigma, cond)
    student = Student(found, rank=0)
    assert torch.allclose(student(x, sigma, cond), before, atol=1e-5)
    with torch.no_grad():
        for weight in student.backbone.parameters():
            weight.mul_(1.5)
    assert not torch.allclose(student(x, sigma, cond), before)
    assert torch.equal(found(x, sigma, cond), before) and found.base.diffusion_model is toy.backbone


def test_latents_are_scaled_on_their_way_in_and_out(nodes, toys, model_of, comfyui):
    form = comfyui.LatentFormat()
    form.scale_factor = 0.18215
    found = nodes.host_denoiser.ModelDenoiser(model_of(toys.conv("eps"), latent_format=form))
    x = toys.picture()
    assert torch.allclose(found.latent_in(x), x * 0.18215) and torch.allclose(found.latent_out(found.latent_in(x)), x)


def test_conditions_are_the_rows_of_the_batch(nodes, toys, model_of):
    states = toys.cond(1).context
    found = nodes.host_denoiser.conditions(model_of(toys.conv("eps")), [[states, {}]], toys.picture(3))
    assert len(found) == 3 and found.pooled is None and torch.equal(found.context[2:], states)


@pytest.mark.parametrize("option", ["area", "mask", "control", "start_percent"])
def test_a_condition_that_is_not_the_same_all_over_is_refused(nodes, toys, model_of, option):
    model, states = model_of(toys.conv("eps")), toys.cond(1).context
    with pytest.raises(ValueError, match=option):
        nodes.host_denoiser.conditions(model, [[states, {option: 1}]], toys.picture())
    with pytest.raises(ValueError, match="2 parts"):
        nodes.host_denoiser.conditions(model, [[states, {}], [states, {}]], toys.picture())
