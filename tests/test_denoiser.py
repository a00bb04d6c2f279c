"""Conditions as batches, and classifier-free guidance."""

import pytest
import torch
from turbodistill.core.denoiser import Cond, Guidance, Guided, guided


def full(batch):
    return Cond(torch.randn(batch, 3, 6), torch.randn(batch, 5), {"y": torch.randn(batch, 2)})


def test_rows_and_cat_are_inverse():
    cond = full(4)
    again = Cond.cat([cond.rows(slice(1)), cond.rows(slice(1, 4))])
    assert len(again) == 4
    assert torch.equal(again.context, cond.context)
    assert torch.equal(again.pooled, cond.pooled) and torch.equal(again.extra["y"], cond.extra["y"])


def test_a_batch_of_one_is_repeated_and_cast():
    cond = full(1).repeat(3).to(torch.float64)
    assert cond.context.shape == (3, 3, 6) and cond.pooled.shape == (3, 5) and cond.extra["y"].shape == (3, 2)
    assert cond.context.dtype == cond.pooled.dtype == cond.extra["y"].dtype == torch.float64


def test_the_summary_is_the_pooled_text_else_the_mean_of_used_tokens():
    cond = full(2)
    assert torch.equal(cond.summary, cond.pooled)
    padded = Cond(torch.cat([torch.ones(1, 2, 4), torch.zeros(1, 6, 4)], 1))
    assert torch.equal(padded.summary, torch.ones(1, 4))
    assert torch.equal(Cond(torch.zeros(1, 2, 4)).summary, torch.zeros(1, 4))  # the empty text divides by nothing


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_guidance_is_uncond_plus_scale_times_the_difference(toys, scale):
    denoiser, x, sigma = toys.conv(), toys.picture(3), torch.tensor([1.0, 5.0, 14.0])
    cond, uncond = toys.cond(3), toys.cond(1, 0.0)
    negative = denoiser(x, sigma, uncond.repeat(3))
    expected = negative + scale * (denoiser(x, sigma, cond) - negative)
    assert torch.allclose(guided(denoiser, x, sigma, cond, uncond, Guidance(scale)), expected, atol=1e-4)
    assert torch.allclose(Guided(denoiser, cond, uncond, Guidance(scale))(x, sigma), expected, atol=1e-4)


def test_no_guidance_costs_one_row_a_sample(toys):
    denoiser = toys.Recorder()
    x, sigma, cond = toys.picture(2), torch.ones(2), toys.cond(2)
    guided(denoiser, x, sigma, cond, toys.cond(1), Guidance())
    guided(denoiser, x, sigma, cond, None, Guidance(7.0))
    guided(denoiser, x, sigma, cond, toys.cond(1), Guidance(7.0))
    assert [len(call[0]) for call in denoiser.calls] == [2, 2, 4]


def test_rows_of_a_guided_denoiser(toys):
    model = Guided(toys.conv(), toys.cond(3), toys.cond(1, 0.0), Guidance(3.0))
    x, sigma = toys.picture(3), torch.full((3,), 5.0)
    assert torch.allclose(model.rows(slice(1, 2))(x[1:2], sigma[1:2]), model(x, sigma)[1:2], atol=1e-5)
    assert model.schedule is model.denoiser.schedule


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_output_and_x0_say_the_same(toys, prediction):
    denoiser, x, cond = toys.conv(prediction), toys.picture(), toys.cond()
    sigma = denoiser.schedule.sigma(torch.tensor([300, 900]))
    # The contract's own `output`, from x0, is the adapter's.
    derived = super(type(denoiser), denoiser).output(x, sigma, cond)
    assert torch.allclose(derived, denoiser.output(x, sigma, cond), atol=1e-4)
    assert denoiser.device == torch.device("cpu")


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_rescaled_guidance_is_diffusers_own_of_velocities(toys, prediction):
    denoiser = toys.conv(prediction)
    rescale = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion").rescale_noise_cfg
    x, sigma, cond, uncond = 3 * toys.picture(2), torch.tensor([2.0, 5.0]), toys.cond(2), toys.cond(1)
    schedule = denoiser.schedule
    positive, plain = denoiser(x, sigma, cond), guided(denoiser, x, sigma, cond, uncond, Guidance(7.0))
    text, cfg = (schedule.from_x0("v", x, x0, sigma) for x0 in (positive, plain))
    found = guided(denoiser, x, sigma, cond, uncond, Guidance(7.0, rescale=0.7))
    assert torch.allclose(found, schedule.to_x0("v", x, rescale(cfg, text, 0.7), sigma), atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_guidance_acts_in_its_interval_alone(toys):
    denoiser, x, cond, uncond = toys.conv(), toys.picture(2), toys.cond(2), toys.cond(1)
    model = Guided(denoiser, cond, uncond, Guidance(7.0, start=0.2, end=0.6))
    for share, acts in ((0.0, False), (0.19, False), (0.21, True), (0.59, True), (0.61, False), (1.0, False)):
        sigma = denoiser.schedule.sigma(torch.tensor([(1 - share) * 999.0])).expand(2)
        expected = guided(denoiser, x, sigma, cond, uncond, Guidance(7.0 if acts else 1.0))
        assert torch.equal(model(x, sigma), expected), share


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_rows_of_other_levels_have_guidance_or_none_each_for_itself(toys, rescale):
    denoiser, x, cond, uncond = toys.conv(), toys.picture(4), toys.cond(4), toys.cond(1)
    guidance = Guidance(7.0, rescale, start=0.2, end=0.6)
    sigma = denoiser.schedule.sigma(torch.tensor([900.0, 700.0, 500.0, 100.0]))
    assert guidance.acts(denoiser.schedule, sigma).tolist() == [False, True, True, False]
    found = guided(denoiser, x, sigma, cond, uncond, guidance)
    for i in range(4):
        row = slice(i, i + 1)
        alone = Guidance(7.0 if i in (1, 2) else 1.0, rescale)
        expected = guided(denoiser, x[row], sigma[row], cond.rows(row), uncond, alone)
        assert torch.allclose(found[row], expected, atol=1e-5), i
    spy = toys.Recorder()
    guided(spy, x, sigma, cond, uncond, guidance)
    assert [len(call[0]) for call in spy.calls] == [6]  # one pass, of no more rows than it takes
