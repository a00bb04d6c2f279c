"""How a MODEL's output is read, the noise levels it is sampled at, and that both ride on a clone."""

import pytest
import torch
from turbodistill.core.families import FAMILIES, SamplingRecipe
from turbodistill.core.sampling import sigmas_of
from turbodistill.core.schedule import DiscreteSchedule, FlowSchedule, expand

SD = DiscreteSchedule()


@pytest.fixture
def base(toys, model_of):
    """Prediction -> a MODEL of that kind."""
    return lambda prediction: model_of(toys.conv(prediction))


def space_of(model):
    return model.get_model_object("model_sampling")


@pytest.mark.parametrize(
    ("prediction", "reading"),
    [(p, r) for p in ("eps", "v") for r in ("eps", "v", "x0")] + [("flow", "flow"), ("flow", "x0")],
)
def test_the_output_is_read_as_told(nodes, toys, base, prediction, reading):
    toy, model = toys.conv(prediction), base(prediction)
    patched = nodes.patcher.with_sampling(model, SamplingRecipe("", reading))
    x, out, sigma = toys.picture(), toys.picture(), toy.schedule.sigma(torch.tensor([999.0, 300.0]))
    found = space_of(patched).calculate_denoised(sigma, out, x)
    assert torch.allclose(found, toy.schedule.to_x0(reading, x, out, sigma), atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_inherit_changes_nothing(nodes, base, prediction):
    model = base(prediction)
    patched = nodes.patcher.with_sampling(model, SamplingRecipe("plain"))
    assert patched is not model and patched.object_patches == {} and patched.patches == {}
    assert space_of(patched) is space_of(model)
    assert nodes.patcher.sampling_of(patched) == SamplingRecipe("plain")


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_the_model_it_came_from_stays_as_it_was(nodes, toys, base, prediction):
    model = base(prediction)
    space, kind = space_of(model), type(space_of(model))
    x, out, sigma = toys.picture(), toys.picture(), space_of(model).sigmas[[-1, 500]]
    before = space.calculate_denoised(sigma, out, x)
    patched = nodes.patcher.with_sampling(model, SamplingRecipe("one", "x0"))
    assert model.object_patches == model.attachments == {}
    with patched.loaded():  # even while the network that they share is the clone's
        assert space_of(model) is space and type(space) is kind
        assert torch.equal(space.calculate_denoised(sigma, out, x), before)
    assert torch.equal(space_of(patched).calculate_denoised(sigma, out, x), out)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@pytest.mark.parametrize(
    "sampling", [SamplingRecipe("", "x0"), SamplingRecipe("", "lcm"), SamplingRecipe("", shift=250)]
)
def test_the_schedule_stays_the_model_s(nodes, base, prediction, sampling):
    model = base(prediction)
    old, new = space_of(model), space_of(nodes.patcher.with_sampling(model, sampling))
    assert new.sigmas is old.sigmas and new.sigma_max == old.sigma_max
    assert isinstance(new, type(old)) and new.state_dict().keys() == old.state_dict().keys()
    noise, latent, sigma = (*torch.randn(2, 1, 4, 8, 8), old.sigmas[-1:])
    assert torch.equal(new.noise_scaling(sigma, noise, latent, True), old.noise_scaling(sigma, noise, latent, True))
    assert torch.equal(new.calculate_input(sigma, noise), old.calculate_input(sigma, noise))
    assert nodes.patcher.prediction_of(nodes.patcher.with_sampling(model, sampling)) == prediction  # the network's own


def test_lcm_s_boundary_scalings(nodes, toys, base):
    # arXiv 2310.04378: f = c_skip x + c_out x0, c_skip = s^2 / (t^2 + s^2), c_out = t / sqrt(t^2 + s^2).
    space = space_of(nodes.patcher.with_sampling(base("eps"), SamplingRecipe("", "lcm")))
    t = torch.tensor([0, 1, 20, 999])
    x, out, sigma = toys.picture(4), toys.picture(4), space.sigmas[t]
    scaled, spread = expand(10.0 * t, x), 0.5
    skip, kept = spread**2 / (scaled**2 + spread**2), scaled / (scaled**2 + spread**2).sqrt()
    found = space.calculate_denoised(sigma, out, x)
    assert torch.allclose(found, skip * x + kept * (x - expand(sigma, x) * out), atol=1e-4)
    assert torch.equal(found[0], x[0])  # the boundary condition: at t = 0 the input is the picture
    assert torch.allclose(found[3], (x - expand(sigma, x) * out)[3], rtol=1e-4, atol=1e-3)  # far from it, x0


def test_lcm_s_boundary_condition_holds_for_a_flow_too(nodes, toys, base):
    space = space_of(nodes.patcher.with_sampling(base("flow"), SamplingRecipe("", "lcm")))
    x, out = toys.picture(), toys.picture()
    assert torch.equal(space.calculate_denoised(torch.zeros(2), out, x), x)
    ones = torch.ones(2)
    assert torch.allclose(space.calculate_denoised(ones, out, x), x - out, atol=1e-3)


@pytest.mark.parametrize(("family", "told"), [("NitroFusion Realism", 249), ("NitroFusion Vibrant", 499)])
def test_nitro_tells_the_network_another_timestep(nodes, toys, model_of, family, told):
    heard = []
    toy = toys.conv()
    model = model_of(toy, process_timestep=lambda t: heard.append(t.tolist()) or t / 1000)
    patched = nodes.patcher.with_sampling(model, FAMILIES[family].sampling)
    x, sigma, context = toys.picture(), SD.sigma(torch.tensor([999.0, 0.0])), toys.cond().context
    with patched.loaded() as network:
        x0 = network.apply_model(x, sigma, context)
    assert heard == [[told, 0]]
    out = toy.backbone(x * (sigma**2 + 1).rsqrt()[:, None, None, None], torch.tensor([told / 1000, 0.0]), context)
    assert torch.allclose(x0, SD.to_x0("eps", x, out, sigma), atol=1e-4)  # the level itself is the model's


@pytest.mark.parametrize("second", ["eps", "v", "x0", "lcm"])
def test_the_last_reading_counts(nodes, toys, base, second):
    model, sampling = base("v"), SamplingRecipe("second", second)
    twice = nodes.patcher.with_sampling(nodes.patcher.with_sampling(model, SamplingRecipe("first", "x0")), sampling)
    once = nodes.patcher.with_sampling(model, sampling)
    x, out, sigma = toys.picture(), toys.picture(), SD.sigma(torch.tensor([999.0, 300.0]))
    assert torch.equal(*(space_of(m).calculate_denoised(sigma, out, x) for m in (twice, once)))
    assert nodes.patcher.sampling_of(twice) == sampling


@pytest.mark.parametrize(
    ("first", "second"),
    [(SamplingRecipe("", "x0"), SamplingRecipe("")), (SamplingRecipe("", shift=250), SamplingRecipe("", shift=250))],
    ids=["inherit after x0", "the same shift twice"],
)
def test_of_two_nodes_in_a_row_the_last_counts(nodes, toys, base, first, second):
    model = base("eps")
    twice = nodes.patcher.with_sampling(nodes.patcher.with_sampling(model, first), second)
    once = nodes.patcher.with_sampling(model, second)
    x, out, sigma = toys.picture(), toys.picture(), SD.sigma(torch.tensor([999.0, 300.0]))
    assert torch.equal(*(space_of(m).calculate_denoised(sigma, out, x) for m in (twice, once)))
    assert torch.equal(*(space_of(m).timestep(sigma) for m in (twice, once)))


def test_how_it_is_sampled_survives_further_nodes(nodes, base):
    sampling = FAMILIES["LCM"].sampling
    patched = nodes.patcher.with_sampling(base("eps"), sampling)
    later = patched.clone()
    later.add_patches({"diffusion_model.conv_in.weight": (torch.zeros(8, 4, 3, 3),)})
    assert nodes.patcher.sampling_of(later) is sampling and space_of(later) is space_of(patched)


def test_a_plain_turbo_checkpoint_needs_no_node(nodes, base):
    assert nodes.patcher.sampling_of(base("eps")) == SamplingRecipe("one-step model")


@pytest.mark.parametrize("reading", ["eps", "v", "flow", "x0"])
def test_what_the_network_predicts_is_told_in_the_card_s_words(nodes, comfyui, reading):
    kind = {"eps": comfyui.EPS, "v": comfyui.V_PREDICTION, "flow": comfyui.CONST, "x0": comfyui.X0}[reading]
    space = comfyui.model_sampling(kind, comfyui.ModelSamplingDiscrete)
    assert nodes.patcher.prediction_of(comfyui.ModelPatcher(comfyui.BaseModel(None, space))) == reading


@pytest.mark.parametrize("kind", ["one of tomorrow", "EDM"])
def test_another_parametrisation_is_none_of_the_card_s(nodes, comfyui, kind):
    space = comfyui.model_sampling(getattr(comfyui, kind, object), comfyui.ModelSamplingDiscrete)
    assert nodes.patcher.prediction_of(comfyui.ModelPatcher(comfyui.BaseModel(None, space))) == "unknown"


# --- the levels ---


def levels(comfyui, name, *settings):
    """A MODEL with the levels of a class of ComfyUI's, and no network."""
    reading = comfyui.CONST if "Flow" in name else comfyui.EPS
    space = comfyui.model_sampling(reading, getattr(comfyui, f"ModelSampling{name}"), *settings)
    return comfyui.ModelPatcher(comfyui.BaseModel(None, space))


def test_one_step_of_stable_diffusion(nodes, comfyui):
    sigmas = nodes.patcher.sigmas_for(levels(comfyui, "Discrete"), [999])
    assert sigmas.tolist() == pytest.approx([14.6146, 0], abs=1e-3)
    assert sigmas.dtype == torch.float32 and sigmas.device.type == "cpu"


@pytest.mark.parametrize("timesteps", [[999], [999, 749, 499, 249], [800], [399], [7, 6, 5, 4, 3, 2, 1, 0]])
def test_levels_of_the_table_are_the_core_s(nodes, comfyui, timesteps):
    found = nodes.patcher.sigmas_for(levels(comfyui, "Discrete"), timesteps)
    assert torch.allclose(found, sigmas_of(SD, timesteps), rtol=1e-5)


@pytest.mark.parametrize("entries", [1000, 10000])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("timesteps", [[999], [999, 749, 499, 249], [599, 299]])
def test_levels_of_a_flow_are_the_core_s(nodes, comfyui, entries, shift, timesteps):
    model = levels(comfyui, "DiscreteFlow", shift, entries, 1)
    found = nodes.patcher.sigmas_for(model, timesteps)
    assert torch.allclose(found, sigmas_of(FlowSchedule(shift), timesteps), atol=1e-5)
    if timesteps[0] == 999:
        assert found[0] == 1  # pure noise


def test_levels_of_a_distilled_table_are_within_half_a_row(nodes, comfyui):
    model = levels(comfyui, "DiscreteDistilled")
    timesteps = [999, 749, 499, 249, 19, 0]
    found = nodes.patcher.sigmas_for(model, timesteps)
    assert len(space_of(model).sigmas) == 50 and found[0] == pytest.approx(14.6146, abs=1e-3)
    for sigma, t in zip(found[:-1], timesteps, strict=True):
        assert sigma in space_of(model).sigmas
        assert abs(float(SD.timestep(sigma)) - t) <= 20
    assert found[-2] == found[-3] == space_of(model).sigma_min  # there is none below


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["Discrete", "DiscreteFlow", "DiscreteDistilled"])
def test_every_family_s_levels_fall_to_zero(nodes, comfyui, family, name):
    model = levels(comfyui, name)
    for steps in (1, 2, 4, 8):
        sigmas = nodes.patcher.sigmas_for(model, FAMILIES[family].for_steps(steps).timesteps(steps))
        assert len(sigmas) == steps + 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
