"""ADD's sampler inside ComfyUI's, against the core's."""

from types import SimpleNamespace

import pytest
import torch
from turbodistill.core.card import StudentCard
from turbodistill.core.denoiser import Guided
from turbodistill.core.families import FAMILIES, SamplingRecipe, of_card
from turbodistill.core.sampling import row_noise, sample_euler, sample_few_step, trailing_sigmas

PREDICTIONS = ["eps", "v", "flow"]


@pytest.fixture(params=PREDICTIONS)
def toy(request, toys):
    return toys.conv(request.param)


class Wrapped:
    """What ComfyUI hands to a sampler's function: x0 from (x, sigma), three layers above the model's sampling."""

    def __init__(self, denoiser, model):
        self.denoiser, self.calls = denoiser, []
        self.inner_model = SimpleNamespace(inner_model=model.model)

    def __call__(self, x, sigma, **extra):
        self.calls.append((x, sigma, extra))
        return self.denoiser(x, sigma)


def start(toys, schedule, steps, batch=2):
    """Noise (B, ...) already at the first of `steps` levels, and the levels."""
    sigmas = trailing_sigmas(schedule, steps)
    return toys.picture(batch) * sigmas[0], sigmas


@torch.no_grad()
def test_one_step_is_the_model_s_x0(nodes, toys, model_of, toy):
    model = Wrapped(Guided(toy, toys.cond()), model_of(toy))
    x, sigmas = start(toys, toy.schedule, 1)
    for renoise in (True, False):
        found = nodes.patcher.FewStep(SamplingRecipe("", renoise=renoise)).steps(model, x, sigmas)
        assert torch.allclose(found, model.denoiser(x, sigmas[0].expand(2)), atol=1e-5)
    assert [c[1].tolist() for c in model.calls] == [[float(sigmas[0])] * 2] * 2  # one pass each


@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_it_equals_the_core_s_sampler(nodes, toys, model_of, toy, steps):
    denoiser = Guided(toy, toys.cond())
    x, sigmas = start(toys, toy.schedule, steps)
    found = nodes.patcher.FewStep(SamplingRecipe("")).steps(Wrapped(denoiser, model_of(toy)), x, sigmas)
    assert torch.allclose(found, sample_few_step(denoiser, x, sigmas), atol=1e-5)


@torch.no_grad()
def test_fresh_noise_lifts_x0_to_the_next_level(nodes, toys, model_of, toy):
    model = Wrapped(Guided(toy, toys.cond()), model_of(toy))
    x, sigmas = start(toys, toy.schedule, 3)
    nodes.patcher.FewStep(SamplingRecipe("")).steps(model, x, sigmas)
    fresh = row_noise(x)
    for i in (0, 1):
        x0 = model.denoiser(model.calls[i][0], sigmas[i].expand(2))
        expected = toy.schedule.add_noise(x0, fresh(i), sigmas[i + 1].expand(2))
        assert torch.allclose(model.calls[i + 1][0], expected, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 4])
@torch.no_grad()
def test_without_fresh_noise_it_is_euler_s(nodes, toys, model_of, toy, steps):
    denoiser = Guided(toy, toys.cond())
    x, sigmas = start(toys, toy.schedule, steps)
    found = nodes.patcher.FewStep(SamplingRecipe("", renoise=False)).steps(Wrapped(denoiser, model_of(toy)), x, sigmas)
    assert torch.allclose(found, sample_euler(denoiser, x, sigmas), atol=1e-4)
    assert not torch.allclose(found, sample_few_step(denoiser, x, sigmas), atol=1e-2)


@pytest.mark.parametrize("renoise", [True, False])
@torch.no_grad()
def test_item_k_of_a_batch_is_its_single_run(nodes, toys, model_of, toy, renoise):
    cond = toys.cond(3)
    x, sigmas = start(toys, toy.schedule, 4, batch=3)
    sampler, model = nodes.patcher.FewStep(SamplingRecipe("", renoise=renoise)), model_of(toy)
    batch = sampler.steps(Wrapped(Guided(toy, cond), model), x, sigmas)
    for k in range(3):
        alone = sampler.steps(Wrapped(Guided(toy, cond.rows([k])), model), x[k : k + 1], sigmas)
        assert torch.allclose(alone[0], batch[k], atol=1e-4)


def test_the_callback_is_told_every_step(nodes, toys, model_of):
    toy, told = toys.conv(), []
    model = Wrapped(lambda x, sigma: x * 0.5, model_of(toy))
    x, sigmas = start(toys, toy.schedule, 3)
    nodes.patcher.FewStep(SamplingRecipe("")).steps(model, x, sigmas, {"seed": 3}, told.append, disable=True)
    assert [t["i"] for t in told] == [0, 1, 2]
    for t, sigma, (seen, level, extra) in zip(told, sigmas, model.calls, strict=False):
        assert t.keys() == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert t["x"] is seen and torch.equal(t["denoised"], seen * 0.5)
        assert t["sigma"] == t["sigma_hat"] == sigma and torch.equal(level, sigma.expand(2)) and extra == {"seed": 3}


def test_a_schedule_may_end_above_zero(nodes, toys, model_of):
    # SplitSigmas hands over to a second sampler at a level of noise.
    toy = toys.conv()
    model = Wrapped(lambda x, sigma: torch.zeros_like(x), model_of(toy))
    x, sigmas = start(toys, toy.schedule, 4)
    found = nodes.patcher.FewStep(SamplingRecipe("")).steps(model, x, sigmas[:3])
    assert len(model.calls) == 2 and torch.allclose(found, row_noise(x)(1) * sigmas[2])


@torch.no_grad()
def test_sampling_keeps_no_gradient(nodes, toys, model_of):
    toy = toys.conv()
    x, sigmas = start(toys, toy.schedule, 2)
    with torch.enable_grad():
        found = nodes.patcher.FewStep(SamplingRecipe("")).steps(
            Wrapped(Guided(toy, toys.cond()), model_of(toy)), x, sigmas
        )
    assert not found.requires_grad


# --- the first level ---


def first_input(nodes, comfyui, model, sampler, sigmas, noise, latent):
    """What the sampler's function begins with, in ComfyUI's own `KSAMPLER.sample`."""
    seen = []
    guider = SimpleNamespace(inner_model=model.model)
    sampler.sampler_function = lambda model, x, *args, **settings: seen.append(x) or x
    sampler.sample(guider, sigmas, {}, None, noise, latent)
    return seen[0]


@pytest.mark.parametrize("exact", [True, False])
def test_our_students_begin_at_sigma_and_others_where_comfyui_does(nodes, comfyui, toys, model_of, exact):
    toy, noise, latent = toys.conv(), toys.picture(), toys.picture()
    model, sampler = model_of(toy), nodes.patcher.FewStep(SamplingRecipe("", exact=exact))
    top = trailing_sigmas(toy.schedule, 1)
    found = first_input(nodes, comfyui, model, sampler, top, noise, latent)
    level = top[0] if exact else (1 + top[0] ** 2).sqrt()
    assert torch.allclose(found, latent + level * noise, atol=1e-5)
    lower = trailing_sigmas(toy.schedule, 1, start=599)  # img2img: the same for both
    found = first_input(nodes, comfyui, model, sampler, lower, noise, latent)
    assert torch.allclose(found, latent + lower[0] * noise, atol=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_a_flow_begins_with_the_noise_itself(nodes, comfyui, toys, model_of, exact):
    toy, noise, latent = toys.conv("flow"), toys.picture(), toys.picture()
    found = first_input(
        nodes,
        comfyui,
        model_of(toy),
        nodes.patcher.FewStep(SamplingRecipe("", exact=exact)),
        trailing_sigmas(toy.schedule, 1),
        noise,
        latent,
    )
    assert torch.allclose(found, noise)


def test_students_alone_are_exact():
    card = StudentCard("lora", "base", "0" * 16, "sd", "v", "v", (999,), 4.0, (64, 64))
    assert of_card(card).exact and not any(f.sampling.exact for f in FAMILIES.values())
