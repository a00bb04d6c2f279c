"""Samplers against diffusers and exact solutions, and their dialect."""

import inspect
import math

import pytest
import torch
from turbodistill.core import sampling
from turbodistill.core.denoiser import Guided
from turbodistill.core.sampling import (
    row_noise,
    sample_dpmpp_2m,
    sample_euler,
    sample_few_step,
    sample_one_step,
    seeded_noise,
    sigmas_at,
    sigmas_of,
    trailing_sigmas,
)
from turbodistill.core.schedule import DiscreteSchedule, FlowSchedule, expand

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
SAMPLERS = [sample_one_step, sample_few_step, sample_euler, sample_dpmpp_2m]


def by_diffusers(scheduler, denoiser, cond, x, steps):
    """diffusers' loop over our denoiser: x (B, ...) is noise at sigma_max -> x0 (B, ...)."""
    schedule = denoiser.schedule
    scheduler.set_timesteps(steps)
    ones = torch.ones(len(x))
    x = expand(schedule.alpha_sigma(schedule.sigma(torch.tensor([999])))[0], x) * x
    for t in scheduler.timesteps:
        sigma = schedule.sigma(t) * ones
        alpha = expand(schedule.alpha_sigma(sigma)[0], x)
        x = scheduler.step(denoiser.output(x / alpha, sigma, cond), t, x).prev_sample
    return x


@pytest.mark.parametrize(("ours", "theirs"), [("eps", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("steps", [1, 4, 10])
@torch.no_grad()
def test_euler_equals_diffusers_ddim(toys, ours, theirs, steps):
    from diffusers import DDIMScheduler

    denoiser, cond = toys.conv(ours), toys.cond()
    x = toys.picture() * denoiser.schedule.sigma_max
    scheduler = DDIMScheduler(**SD, prediction_type=theirs, clip_sample=False)
    found = sample_euler(Guided(denoiser, cond), x, trailing_sigmas(denoiser.schedule, steps))
    assert torch.allclose(found, by_diffusers(scheduler, denoiser, cond, x, steps), atol=2e-3)


@pytest.mark.parametrize(("ours", "theirs"), [("eps", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("steps", [2, 4, 16])
@torch.no_grad()
def test_dpmpp_2m_equals_diffusers(toys, ours, theirs, steps):
    from diffusers import DPMSolverMultistepScheduler

    denoiser, cond = toys.conv(ours), toys.cond()
    x = toys.picture() * denoiser.schedule.sigma_max
    scheduler = DPMSolverMultistepScheduler(**SD, prediction_type=theirs, solver_type="midpoint")
    found = sample_dpmpp_2m(Guided(denoiser, cond), x, trailing_sigmas(denoiser.schedule, steps))
    assert torch.allclose(found, by_diffusers(scheduler, denoiser, cond, x, steps), atol=2e-3)


def gaussian(spread):
    """The exact denoiser of N(0, spread^2), and the exact end of its ODE from x at sigma."""
    return (
        lambda x, sigma: x * spread**2 / (spread**2 + expand(sigma, x) ** 2),
        lambda x, sigma: x * spread / (spread**2 + sigma**2) ** 0.5,
    )


def test_samplers_approach_the_exact_solution():
    model, exact = gaussian(0.5)
    schedule, unit = DiscreteSchedule(), torch.randn(2, 1, 2, 2)
    x = unit * schedule.sigma_max
    truth = exact(x, schedule.sigma_max)

    def error(sampler, steps):
        falling = torch.logspace(math.log10(schedule.sigma_max), -2, steps)
        return float((sampler(model, x, torch.cat([falling, torch.zeros(1)])) - truth).norm())

    assert error(sample_euler, 200) < error(sample_euler, 20) / 5  # first order
    assert error(sample_dpmpp_2m, 20) < error(sample_euler, 20) / 4  # and a second order is better


@pytest.mark.parametrize("sampler", [sample_euler, sample_dpmpp_2m])
def test_a_schedule_may_end_above_zero(sampler):
    # Two models in turn, or a second pass at a higher resolution, hand over at a level of noise.
    model, exact = gaussian(0.5)
    x = 14.6 * torch.randn(2, 1, 2, 2)
    found = sampler(model, x, torch.logspace(math.log10(14.6), 0, 200))
    truth = exact(x, 14.6) / exact(1.0, 1.0)  # the ODE's end from 14.6, taken back up to sigma 1
    assert torch.allclose(found, truth, rtol=0.05, atol=1e-2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_signature_is_k_diffusion_s(sampler):
    names = list(inspect.signature(sampler).parameters)
    assert names[:6] == ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    assert all(p.default is None for p in list(inspect.signature(sampler).parameters.values())[3:])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_callback_is_told_every_step_and_extra_args_reach_the_model(sampler):
    schedule, told, given = DiscreteSchedule(), [], []

    def model(x, sigma, **kwargs):
        given.append(kwargs)
        return x * 0.5

    extra = {"schedule": schedule} if sampler is sample_few_step else {}
    sampler(
        model, torch.randn(2, 1, 2, 2), trailing_sigmas(schedule, 3), {"cond": 1}, told.append, disable=True, **extra
    )
    steps = 1 if sampler is sample_one_step else 3
    assert [t["i"] for t in told] == list(range(steps)) and given == [{"cond": 1}] * steps
    for t, sigma in zip(told, trailing_sigmas(schedule, 3), strict=False):
        assert t.keys() == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert torch.equal(t["denoised"], t["x"] * 0.5) and t["sigma"] == t["sigma_hat"] == sigma


@pytest.mark.parametrize("schedule", [DiscreteSchedule(), FlowSchedule(shift=3.0)])
def test_in_one_step_every_sampler_is_the_same(toys, schedule):
    denoiser = toys.conv("flow" if isinstance(schedule, FlowSchedule) else "eps")
    model, x = Guided(denoiser, toys.cond()), toys.picture()
    sigmas = trailing_sigmas(schedule, 1)
    one = sample_one_step(model, x, sigmas)
    assert torch.equal(one, sample_few_step(model, x, sigmas))
    assert torch.equal(one, sample_dpmpp_2m(model, x, sigmas))
    assert torch.allclose(one, sample_euler(model, x, sigmas), atol=1e-4)


def test_one_step_of_stable_diffusion():
    assert trailing_sigmas(DiscreteSchedule(), 1).tolist() == pytest.approx([14.6146, 0], abs=1e-3)
    assert trailing_sigmas(DiscreteSchedule(), 1, start=399).tolist() == pytest.approx([1.161, 0], abs=1e-3)
    assert sigmas_of(DiscreteSchedule(), [749.5]).tolist() == pytest.approx([4.09, 0], abs=1e-2)  # between two


@pytest.mark.parametrize("rows", [1000, 10000])
def test_levels_of_a_host_s_table(rows):
    table = FlowSchedule(shift=3.0).sigma(torch.arange(1, rows + 1) * 1000 / rows - 1)
    found = sigmas_at(table, [999, 499, 0])
    assert torch.allclose(found, sigmas_of(FlowSchedule(shift=3.0), [999, 499, 0]), atol=1e-5)


@pytest.mark.parametrize("schedule", [DiscreteSchedule(), FlowSchedule(shift=3.0)])
def test_few_steps_renoise_the_denoised_to_the_next_level(schedule):
    sigmas, fresh, seen = trailing_sigmas(schedule, 3), [], []

    def model(x, sigma):
        seen.append(x)
        return torch.full_like(x, 0.25 * (len(seen)))

    def noise(i):
        fresh.append((i, torch.randn(2, 1, 2, 2)))
        return fresh[-1][1]

    result = sample_few_step(model, torch.randn(2, 1, 2, 2), sigmas, schedule=schedule, noise=noise)
    assert [i for i, _ in fresh] == [0, 1]  # none after the last
    for i, eps in fresh:
        clean = torch.full_like(eps, 0.25 * (i + 1))
        assert torch.allclose(seen[i + 1], schedule.add_noise(clean, eps, sigmas[i + 1 : i + 2].expand(2)))
    assert torch.equal(result, torch.full_like(result, 0.75))


@pytest.mark.parametrize("sampler", [sample_one_step, sample_euler, sample_dpmpp_2m])
@torch.no_grad()
def test_item_k_of_a_batch_is_its_single_seed(toys, sampler):
    denoiser, cond, seeds = toys.conv(), toys.cond(3), [7, 8, 2**40]
    sigmas = trailing_sigmas(denoiser.schedule, 4)

    def sample(rows):
        noise = seeded_noise([seeds[k] for k in rows], (4, 8, 8))
        return sampler(Guided(denoiser, cond.rows(rows)), noise * sigmas[0], sigmas)

    batch = sample([0, 1, 2])
    for k in range(3):
        assert torch.allclose(sample([k])[0], batch[k], atol=1e-3)
    assert not torch.allclose(batch[0], batch[1], atol=0.1)


def test_row_noise_is_told_by_each_row_alone():
    x = seeded_noise([3, 4, 5], (2, 4, 4))
    noise = row_noise(x)
    assert torch.equal(noise(1)[2:], row_noise(x[2:])(1))
    assert torch.equal(row_noise(14.6 * x)(0), noise(0))  # another space's scale
    assert not torch.equal(noise(0), noise(1)) and not torch.equal(noise(0)[0], noise(0)[1])
    many = row_noise(seeded_noise(range(64), (2, 4, 4)))(0)
    assert abs(many.mean()) < 0.1 and many.std() == pytest.approx(1, abs=0.1)


def test_seeded_noise_is_each_seed_s_own():
    noise = seeded_noise([3, 4, 3], (2, 3, 3))
    assert torch.equal(noise[1:2], seeded_noise([4], (2, 3, 3)))
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])


def test_seeded_noise_leaves_torch_s_own_generator_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    seeded_noise([1, 2], (2, 2))
    assert torch.equal(torch.randn(3), expected)


def test_the_teachers_samplers_are_by_their_k_diffusion_names():
    for name, sampler in sampling.TEACHER_SAMPLERS.items():
        assert getattr(sampling, f"sample_{name}") is sampler
