"""Each adapter of a network equals what its own pipeline computes, at every noise level."""

import pytest
import torch
from turbodistill.core.denoiser import Guidance, Guided
from turbodistill.core.features import TeacherFeatures
from turbodistill.core.sampling import sample_euler


def set_stock_scheduler(pipe):
    """One of diffusers' own that begins at the last timestep; Qwen-Image's `shift_terminal` is not ours."""
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, shift_terminal=None)


def euler(model, noise, guidance=1.0, prompts=("a red fox", "an owl")):
    """Core's own sampling over the noise levels that the pipeline has just used."""
    sigmas = model.pipe.scheduler.sigmas.float()
    bound = Guided(model.denoiser, model.encode_text(list(prompts)), model.encode_text([""]), Guidance(guidance))
    with torch.no_grad():
        return sample_euler(bound, sigmas[0] * noise, sigmas)


@pytest.mark.parametrize("steps", [1, 3])
def test_sampling_equals_the_pipeline_s_own(tiny_kit, name, steps):
    model = tiny_kit.host(name)
    set_stock_scheduler(model.pipe)
    noise, more = tiny_kit.noise(model), {"guidance_scale": 3.5} if name == "flux-dev" else {}
    theirs = tiny_kit.pictures(model.pipe, name, noise, steps, "latent", **more)
    ours = euler(model, noise)
    assert ours.isfinite().all() and (ours - noise).abs().mean() > 0.1
    near = 1e-2 if name == "sd-v" else 1e-4  # Euler ends a zero-terminal schedule at sigma 4096, the hosts at 4518
    assert torch.allclose(tiny_kit.latents_for(name, ours), theirs, atol=near)
    pictures = tiny_kit.pictures(model.pipe, name, noise, steps, **more)
    assert torch.allclose(model.decode(ours), pictures, atol=near)


GUIDED = {
    "sd": {"guidance_scale": 3.0},
    "sd-v": {"guidance_scale": 3.0},
    "sdxl": {"guidance_scale": 3.0},
    "sd3": {"guidance_scale": 3.0},
    "flux-dev": {"guidance_scale": 3.5, "true_cfg_scale": 3.0, "negative_prompt": ["", ""]},
    "chroma": {"guidance_scale": 3.0},
    "lumina2": {"guidance_scale": 3.0, "cfg_normalization": False},
    "z-image": {"guidance_scale": 2.0},  # it adds so many differences to the conditional answer
    "sana": {"guidance_scale": 3.0},
}


@pytest.mark.parametrize("name", GUIDED)
def test_the_empty_prompt_is_the_pipeline_s_unconditional_one(tiny_kit, name):
    """As guidance shows it, which takes three times the difference to it."""
    model = tiny_kit.host(name)
    set_stock_scheduler(model.pipe)
    noise = tiny_kit.noise(model)
    theirs = tiny_kit.pictures(model.pipe, name, noise, 2, "latent", **GUIDED[name])
    ours = euler(model, noise, 3.0)
    assert (ours - euler(model, noise)).abs().max() > 1e-3
    assert torch.allclose(tiny_kit.latents_for(name, ours), theirs, atol=3e-2 if name == "sd-v" else 1e-3)


def test_stable_diffusion_xl_s_empty_prompt_is_a_text_where_zeros_are_not_asked_for(tiny_kit):
    model = tiny_kit.host("sdxl", tiny_kit.tiny.make("sdxl", zeros=False))
    cond = model.encode_text(["", "a red fox"])
    assert cond.context[0].any() and cond.pooled[0].any()
    zeros = tiny_kit.host("sdxl").encode_text(["", "a red fox"])
    assert not zeros.context[0].any() and not zeros.pooled[0].any()
    assert (
        torch.equal(zeros.context[1], cond.context[1])
        and zeros.extra["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    )


def test_a_batch_equals_its_single_samples(tiny_kit, name):
    """Texts of different lengths among them."""
    model = tiny_kit.host(name)
    prompts = ["a", "a red fox and an owl in a forest at night", ""]
    noise = torch.randn(3, *model.latent_shape)
    sigma = model.denoiser.schedule.sigma(torch.tensor([999.0, 600.0, 200.0]))
    cond = model.encode_text(prompts)
    together = model.denoiser(noise, sigma, cond)
    for k, prompt in enumerate(prompts):
        row = slice(k, k + 1)
        assert torch.allclose(model.denoiser(noise[row], sigma[row], cond.rows(row)), together[row], atol=1e-4)
        alone = model.encode_text([prompt])
        assert torch.allclose(alone.context, cond.context[row], atol=1e-5)
        assert torch.allclose(model.denoiser(noise[row], sigma[row], alone), together[row], atol=1e-4)
    other = model.denoiser(noise, sigma, cond.rows([1, 0, 0]))
    assert not torch.allclose(other, together, atol=1e-6)


def test_features_are_the_picture_s_where_it_is(tiny_kit, name):
    """What changes at one place of the latents changes most at that place of every map."""
    model = tiny_kit.host(name)
    features = TeacherFeatures(model.denoiser)
    cond = model.encode_text(["a red fox", ""])
    x, sigma = torch.randn(2, *model.latent_shape), model.denoiser.schedule.sigma(torch.tensor([500.0, 500.0]))
    changed = x.clone()
    height, width = x.shape[2:]
    changed[:, :, height * 3 // 4 :, width // 4 : width // 2] += 3
    with torch.no_grad():
        maps = list(zip(features(x, sigma, cond), features(changed, sigma, cond), strict=True))
    assert len(maps) == len(features.taps) >= 1
    for before, after in maps[:1]:  # the first, before attention has spread it
        difference = (after - before).abs().sum(1)
        rows, columns = difference.shape[1:]
        for sample in difference:
            row, column = divmod(int(sample.argmax()), columns)
            assert row >= rows * 3 // 4 - 1 and columns // 4 - 1 <= column < columns // 2 + 1
    assert all(after.isfinite().all() for _, after in maps)


def test_guidance_is_told_at_the_trained_value_alone(tiny_kit):
    told = []
    for name in ("flux-dev", "flux-schnell"):
        model = tiny_kit.host(name)
        hook = model.denoiser.backbone.register_forward_pre_hook(
            lambda _module, _args, kwargs: told.append(kwargs["guidance"]), with_kwargs=True
        )
        model.denoiser(tiny_kit.noise(model), torch.ones(2), model.encode_text(["a", "b"]))
        hook.remove()
    assert told[0].tolist() == [3.5, 3.5] and told[1] is None
