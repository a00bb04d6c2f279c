"""The same numbers as ComfyUI's own nodes, as `turbodistill sample` and as diffusers give on the same weights."""

import pytest
import torch
from turbodistill.app.demo import SHIPPED
from turbodistill.core.student import load_student
from turbodistill.trainer.pipeline.load import load_model

pytestmark = [pytest.mark.host, pytest.mark.newest]
TURBO = "SD-Turbo, SDXL-Turbo"


def detected(graph, model, family, made_for_steps=0):
    return graph.add("TurboDistillDetectOneStep", model=model, family=family, made_for_steps=made_for_steps)[0]


# --- ComfyUI's own nodes ---


# Euler's step back from the noise rounds in float32 at sigma 14.6, which x0 itself does not: hence no equal bits.
@pytest.mark.parametrize("denoise", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_turbo_is_sampled_as_by_core_s_turbo_nodes(comfyui, graph, synthetic, gap, name, denoise):
    base, positive, latent = synthetic(name)
    model = detected(graph, base, TURBO)
    picture = graph.sample(model, positive, latent, seed=11)  # any latent that is not empty
    ours = graph.sample(model, positive, picture, seed=5, denoise=denoise)
    sigmas = graph.add("SDTurboScheduler", model=base, steps=1, denoise=denoise)
    euler = graph.add("KSamplerSelect", sampler_name="euler")
    theirs = graph.custom(base, positive, picture, sigmas, euler, seed=5)
    given, found, expected = comfyui.latents(graph, picture, ours, theirs)
    assert gap(found, expected) < 1e-5 and gap(found, given) > 0.1


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
@pytest.mark.parametrize("name", ["demo", "sd15"])
def test_the_separate_nodes_are_the_whole_one(comfyui, graph, demo, synthetic, name, steps, denoise):
    model, positive, latent = demo[:3] if name == "demo" else synthetic(name)
    ours = graph.sample(model, positive, latent, seed=5, steps=steps, denoise=denoise)
    sigmas = graph.add("TurboDistillScheduler", model=model, steps=steps, denoise=denoise)
    sampler = graph.add("TurboDistillSampler", model=model)
    custom = graph.custom(model, positive, latent, sigmas, sampler, seed=5)
    advanced = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=5),
        guider=graph.add("BasicGuider", model=model, conditioning=positive),
        sampler=sampler,
        sigmas=sigmas,
        latent_image=latent,
    )
    whole, *parts = comfyui.latents(graph, ours, custom, advanced)
    assert all(torch.equal(part, whole) for part in parts)


# At the top LCM's boundary scalings are eps's own to float32, so that only x0 can differ from the base's reading.
@pytest.mark.parametrize(("family", "reading", "differs"), [("SDXL-Lightning", "x0", True), ("LCM", "lcm", False)])
def test_a_reading_is_core_s(comfyui, graph, synthetic, gap, family, reading, differs):
    base, positive, latent = synthetic("sdxl")
    model = detected(graph, base, family, made_for_steps=1)
    patched = graph.add("ModelSamplingDiscrete", model=base, sampling=reading, zsnr=False)
    sigmas = graph.add("TurboDistillScheduler", model=model, steps=1, denoise=1.0)
    euler = graph.add("KSamplerSelect", sampler_name="euler")
    theirs = graph.custom(patched, positive, latent, sigmas, euler, seed=5)
    ours = graph.sample(model, positive, latent, seed=5)
    found, expected, plain = comfyui.latents(graph, ours, theirs, graph.sample(base, positive, latent, seed=5))
    assert gap(found, expected) < 1e-4
    assert (gap(plain, expected) > 0.1) is differs


@pytest.mark.share
def test_four_steps_of_lightning_are_core_s_euler(comfyui, graph, synthetic, gap):
    base, positive, latent = synthetic("sdxl")
    model = detected(graph, base, "SDXL-Lightning")
    sigmas = graph.add("TurboDistillScheduler", model=model, steps=4, denoise=1.0)
    euler = graph.add("KSamplerSelect", sampler_name="euler")
    theirs = graph.custom(base, positive, latent, sigmas, euler, seed=5)
    found, expected = comfyui.latents(graph, graph.sample(model, positive, latent, seed=5, steps=4), theirs)
    assert gap(found, expected) < 1e-5


@pytest.mark.share
def test_a_flow_model_in_one_step_is_core_s_euler(comfyui, graph, synthetic, gap):
    model, positive, latent = synthetic("sd3")
    theirs = graph.add(
        "KSampler",
        model=model,
        positive=positive,
        negative=positive,
        latent_image=latent,
        seed=5,
        steps=1,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    found, expected = comfyui.latents(graph, graph.sample(model, positive, latent, seed=5), theirs)
    assert gap(found, expected) < 1e-5


# --- the embedded model, outside ComfyUI ---


@pytest.fixture(scope="module")
def embedded():
    """What `turbodistill sample` samples with: the host and the shipped student."""
    host = load_model(device="cpu")
    student, _, warning = load_student(SHIPPED, host.denoiser)
    assert not warning
    return host, student


@pytest.mark.share
@pytest.mark.parametrize("steps", [1, 4])
def test_the_student_is_that_of_the_command_line(comfyui, graph, demo, embedded, noise, gap, steps):
    host, student = embedded
    made = graph.sample(demo.model, demo.positive, demo.latent, seed=9, steps=steps)
    shown = graph.add("PreviewImage", images=graph.add("VAEDecode", samples=made, vae=demo.vae))
    (latents,), run = comfyui.latents_and_run(graph, made)
    with student.merged():
        expected = student.generate(noise(9, *latents.shape), host.encode_text([demo.text]).repeat(4), steps)
    assert gap(latents * host.vae.config.scaling_factor, expected) < 1e-4
    expected = host.decode(expected).permute(0, 2, 3, 1)
    difference = (comfyui.pictures(run, shown) - expected).abs()
    assert difference.max() < 1.5 / 255  # a picture is rounded down to 8 bits


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' use of numpy
@pytest.mark.parametrize("steps", [1, 4])
@torch.no_grad()
def test_the_student_is_that_of_diffusers_schedulers(comfyui, graph, demo, embedded, noise, gap, steps):
    from diffusers import EulerDiscreteScheduler

    host, student = embedded
    cond = host.encode_text([demo.text]).repeat(4)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(steps)
    sampler = graph.add("KSamplerSelect", sampler_name="euler")
    sigmas = graph.add("TurboDistillScheduler", model=demo.model, steps=steps, denoise=1.0)
    made = graph.sample(demo.model, demo.positive, demo.latent, seed=9)
    if steps > 1:  # between its steps diffusers takes Euler's, ours adds fresh noise
        made = graph.custom(demo.model, demo.positive, demo.latent, sigmas, sampler, seed=9)
    (latents,) = comfyui.latents(graph, made)
    # Our students enter at the noise's own size, as diffusers does; ComfyUI's Euler at sqrt(1 + sigma^2).
    size = scheduler.init_noise_sigma if steps == 1 else (scheduler.init_noise_sigma**2 + 1) ** 0.5
    x = noise(9, *latents.shape) * size
    with student.merged():
        for t in scheduler.timesteps:
            output = host.denoiser.backbone(scheduler.scale_model_input(x, t), t, cond.context).sample
            x = scheduler.step(output, t, x).prev_sample
    assert gap(latents * host.vae.config.scaling_factor, x) < 1e-4
