"""Schedules against diffusers and the table of Stable Diffusion; predictions there and back."""

import numpy as np
import pytest
import torch
from turbodistill.core.sampling import trailing_sigmas
from turbodistill.core.schedule import (
    DiscreteSchedule,
    FlowSchedule,
    expand,
    flow_of,
    scaled_linear,
    trailing_timesteps,
    zero_terminal,
)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = [
    ("eps", DiscreteSchedule()),
    ("v", DiscreteSchedule()),
    ("v", DiscreteSchedule(zero_terminal(scaled_linear()))),
    ("x0", DiscreteSchedule()),
    ("flow", FlowSchedule()),
    ("flow", FlowSchedule(shift=3.0)),
    ("x0", FlowSchedule()),
]


def test_alphas_cumprod_equal_diffusers():
    from diffusers import DDPMScheduler

    assert torch.allclose(scaled_linear().float(), DDPMScheduler(**SD).alphas_cumprod, rtol=1e-4)


@pytest.mark.parametrize(
    ("timestep", "sigma"),
    [(999, 14.6146), (899, 8.303), (799, 5.088), (749, 4.082), (499, 1.613), (399, 1.161), (250, 0.696)],
)
def test_sigmas_are_stable_diffusion_s(timestep, sigma):
    assert float(DiscreteSchedule().sigma(timestep)) == pytest.approx(sigma, abs=6e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 20])
def test_trailing_sigmas_equal_diffusers_euler(steps):
    from diffusers import EulerDiscreteScheduler

    theirs = EulerDiscreteScheduler(**SD, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    assert torch.allclose(trailing_sigmas(DiscreteSchedule(), steps), theirs.sigmas, rtol=1e-4)


def test_trailing_timesteps_of_four_steps():
    assert trailing_timesteps(4) == [999, 749, 499, 249]


def test_trailing_timesteps_equal_diffusers():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**SD, timestep_spacing="trailing")
    for steps in range(1, 41):  # from 48 on, exact halves fall where diffusers' running sum rounds them
        theirs.set_timesteps(steps)
        assert trailing_timesteps(steps) == theirs.timesteps.tolist(), steps


def test_a_lower_start_scales_the_timesteps():
    assert trailing_timesteps(1, start=399) == [399]
    assert trailing_timesteps(4, start=399) == [399, 299, 199, 99]


@pytest.mark.parametrize(("steps", "start"), [(0, 999), (1001, 999), (1, 1000), (5, 3), (1, -1)])
def test_impossible_timesteps_are_refused(steps, start):
    with pytest.raises(ValueError, match=r"steps is|start timestep is"):
        trailing_timesteps(steps, start)


def test_zero_terminal_equals_diffusers():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    ours = scaled_linear()
    table = zero_terminal(ours)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    assert torch.allclose(table[:-1], theirs[:-1], rtol=1e-6)
    # Where theirs is 0, ours is barely above, so that sigma stays a number.
    assert theirs[-1] == 0 and DiscreteSchedule(table).sigma_max == pytest.approx(4518, abs=1)
    assert torch.equal(ours, scaled_linear())  # the given table is left alone


def test_flow_sigmas_equal_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas
    assert torch.allclose(FlowSchedule(shift=3.0).sigma(torch.arange(999, -1, -1)), theirs, atol=1e-6)


@pytest.mark.parametrize("schedule", [DiscreteSchedule(), FlowSchedule(), FlowSchedule(shift=3.0)])
def test_timestep_inverts_sigma(schedule):
    timesteps = torch.tensor([0.0, 0.25, 1.0, 20.5, 250.0, 499.75, 998.5, 999.0])
    assert torch.allclose(schedule.timestep(schedule.sigma(timesteps)), timesteps, atol=0.02)


def test_sigma_of_every_timestep_finds_it_again():
    # An error of one here is the classic "scheduler off by one".
    schedule = DiscreteSchedule()
    timesteps = torch.arange(1000)
    assert torch.equal(schedule.timestep(schedule.sigma(timesteps)).round().long(), timesteps)


def test_sigmas_beyond_the_table_are_its_ends():
    assert DiscreteSchedule().timestep(torch.tensor([0.0, 1e4])).tolist() == [0, 999]


@pytest.mark.parametrize(("prediction", "schedule"), SCHEDULES)
def test_predictions_go_there_and_back(prediction, schedule):
    x0, noise = torch.randn(4, 2, 3, 3).double(), torch.randn(4, 2, 3, 3).double()
    sigma = schedule.sigma(torch.tensor([10, 400, 800, 998])).double()
    x = schedule.add_noise(x0, noise, sigma)
    output = schedule.from_x0(prediction, x, x0, sigma)
    assert torch.allclose(schedule.to_x0(prediction, x, output, sigma), x0, atol=1e-6)


@pytest.mark.parametrize(("prediction", "schedule"), SCHEDULES)
def test_the_true_output_is_what_the_papers_say(prediction, schedule):
    x0, noise = torch.randn(4, 2, 3, 3).double(), torch.randn(4, 2, 3, 3).double()
    sigma = schedule.sigma(torch.tensor([10, 400, 800, 998])).double()
    output = schedule.from_x0(prediction, schedule.add_noise(x0, noise, sigma), x0, sigma)
    alpha, s = (expand(v, x0) for v in schedule.alpha_sigma(sigma))
    truth = {"eps": noise, "v": alpha * noise - s * x0, "x0": x0, "flow": noise - x0}[prediction]
    assert torch.allclose(output, truth, atol=1e-6)


@pytest.mark.parametrize("schedule", [DiscreteSchedule(), FlowSchedule(shift=3.0)])
def test_noise_in_inverts_add_noise(schedule):
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    sigma = schedule.sigma(torch.tensor([100, 500, 999]))
    assert torch.allclose(schedule.noise_in(schedule.add_noise(x0, noise, sigma), x0, sigma), noise, atol=1e-3)


def test_add_noise_equals_diffusers_after_scaling():
    from diffusers import DDPMScheduler

    schedule, x0, noise = DiscreteSchedule(), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    timesteps = torch.tensor([1, 500, 999])
    sigma = schedule.sigma(timesteps)
    scaled = expand(schedule.alpha_sigma(sigma)[0], x0) * schedule.add_noise(x0, noise, sigma)
    assert torch.allclose(scaled, DDPMScheduler(**SD).add_noise(x0, noise, timesteps), atol=1e-4)


@pytest.mark.parametrize(("ours", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_x0_equals_diffusers(ours, theirs):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SD, prediction_type=theirs, clip_sample=False)
    scheduler.set_timesteps(1000)
    schedule, x, output = DiscreteSchedule(), torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    for t in (20, 400, 999):
        sigma = schedule.sigma(torch.tensor([t]))
        scaled = expand(schedule.alpha_sigma(sigma)[0], x) * x
        expected = scheduler.step(output, t, scaled).pred_original_sample
        assert torch.allclose(schedule.to_x0(ours, x, output, sigma), expected, atol=1e-3)


@pytest.mark.parametrize(("schedule", "prediction"), [(DiscreteSchedule(), "flow"), (FlowSchedule(), "eps")])
def test_a_prediction_of_the_wrong_family_is_refused(schedule, prediction):
    x, sigma = torch.zeros(1, 1, 1, 1), torch.ones(1)
    for convert in (schedule.to_x0, schedule.from_x0):
        with pytest.raises(ValueError, match="does not go with"):
            convert(prediction, x, x, sigma)


def test_tables_of_any_type_are_taken():
    table = torch.from_numpy(np.linspace(0.99, 0.01, 10, dtype=np.float32))
    schedule = DiscreteSchedule(table)
    assert schedule.timesteps == 10 and schedule.sigma_max == pytest.approx(99**0.5, rel=1e-4)


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0])
@pytest.mark.parametrize("entries", [1000, 10000])
def test_a_flow_schedule_is_known_by_its_levels(shift, entries):
    assert flow_of(FlowSchedule(shift, entries).sigma(torch.arange(float(entries)))).shift == pytest.approx(
        shift, rel=1e-3
    )


@pytest.mark.parametrize("levels", [torch.linspace(0.001, 1, 1000) ** 2, DiscreteSchedule().sigmas])
def test_levels_of_another_kind_are_no_flow(levels):
    assert flow_of(levels) is None


def test_a_zero_terminal_table_has_finite_sigmas_as_in_the_hosts():
    table = zero_terminal(scaled_linear())
    as_diffusers = table.clone()
    as_diffusers[-1] = 0
    assert torch.equal(DiscreteSchedule(as_diffusers).sigmas, DiscreteSchedule(table).sigmas)
    assert DiscreteSchedule(as_diffusers).sigma_max == pytest.approx(4518.7, abs=1)
    assert as_diffusers[-1] == 0  # the model's own table stays


@pytest.mark.parametrize(
    "values", [[0.9, float("nan"), 0.1], [0.9, 0.0, 0.0], [0.1, 0.5, 0.9], [1.1, 0.5], [0.9, -0.1]]
)
def test_a_table_that_is_no_schedule_is_told(values):
    with pytest.raises(ValueError, match="noise schedule is unusable: alphas_cumprod must fall"):
        DiscreteSchedule(torch.tensor(values))
