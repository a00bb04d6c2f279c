"""A MODEL as core's Denoiser: the same x0, schedule and backbone, whatever it predicts."""

import pytest
import torch
from torch.nn import LayerNorm, Linear
from turbodistill.core.student import Student

PREDICTIONS = ("eps", "v", "flow")


@pytest.fixture
def pair(toys, model_of, nodes):
    """Prediction -> a toy denoiser, and the same network as a MODEL's."""

    def build(prediction):
        toy = toys.conv(prediction)
        return toy, nodes.denoiser.ModelDenoiser(model_of(toy))

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
    assert nodes.denoiser.levels_of(model).shift == pytest.approx(shift, rel=1e-3)


def by_logarithm(comfyui):
    """A thousand levels that the network is told as EDM does."""

    class ModelSamplingContinuousEDM(comfyui.ModelSamplingDiscrete):
        def timestep(self, sigma):
            return 0.25 * sigma.log()

    return ModelSamplingContinuousEDM


def test_a_schedule_of_another_kind_is_refused(nodes, comfyui):
    spaces = [
        comfyui.model_sampling(comfyui.EDM, comfyui.ModelSamplingDiscrete),
        comfyui.model_sampling(comfyui.EPS, comfyui.ModelSamplingDiscreteDistilled),
        comfyui.model_sampling(comfyui.CONST, comfyui.ModelSamplingDiscrete, torch.linspace(0.001, 1, 1000) ** 2),
        comfyui.model_sampling(comfyui.V_PREDICTION, by_logarithm(comfyui)),
    ]
    for space in spaces:
        model = comfyui.ModelPatcher(comfyui.BaseModel(torch.nn.Identity(), space))
        with pytest.raises(ValueError, match="noise levels"):
            nodes.denoiser.levels_of(model)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_latents_that_are_no_pictures_are_refused(nodes, toys, model_of, comfyui, dimensions):
    form = comfyui.LatentFormat()
    form.latent_dimensions = dimensions
    with pytest.raises(ValueError, match=f"latents have {dimensions} dimensions"):
        nodes.denoiser.ModelDenoiser(model_of(toys.conv("flow"), latent_format=form))


def test_a_model_that_wants_a_picture_is_refused(nodes, toys, model_of):
    model = model_of(toys.conv("eps"))
    model.model.concat_keys = ("mask", "masked_image")
    with pytest.raises(ValueError, match="takes a picture or a mask beside the latent"):
        nodes.denoiser.ModelDenoiser(model)


def test_a_condition_with_a_picture_is_refused(nodes, toys, model_of, monkeypatch):
    model, states = model_of(toys.conv("eps")), toys.cond(1).context
    extra = model.model.extra_conds
    monkeypatch.setattr(
        model.model, "extra_conds", lambda **given: extra(**given) | {"c_concat": next(iter(extra(**given).values()))}
    )
    with pytest.raises(ValueError, match="takes a picture or a mask beside the latent"):
        nodes.denoiser.conditions(model, [[states, {}]], toys.picture())


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


def test_a_full_copy_of_half_precision_is_in_float32(toys, pair):
    toy, found = pair("v")
    x, cond, sigma = toys.picture(), toys.cond(), toy.schedule.sigma(torch.tensor([999.0, 300.0]))
    toy.backbone.half().float()
    expected = found(x, sigma, cond)
    toy.backbone.half()
    student = Student(found, rank=0)
    assert torch.allclose(student(x, sigma, cond), expected, atol=1e-5)
    assert {p.dtype for p in student.backbone.parameters()} == {torch.float32}
    assert {p.dtype for p in toy.backbone.parameters()} == {torch.float16}


class Layer(torch.nn.Module):
    """A layer of ComfyUI's own, which casts its weight to its input's type where it is told to."""

    comfy_cast_weights = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(4))

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) if self.comfy_cast_weights else self.weight)


@pytest.mark.parametrize(
    ("weights", "cast", "within"),
    [
        (torch.float16, None, torch.float32),
        (torch.bfloat16, None, None),
        (torch.float8_e4m3fn, torch.float16, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, None, None),
    ],
)
def test_what_computes_in_float16_is_computed_in_float32(nodes, model_of, toys, weights, cast, within):
    toy = toys.conv("eps")
    toy.backbone = Layer().to(weights)
    model = model_of(toy)
    model.model.manual_cast_dtype = cast
    with pytest.raises(KeyError), nodes.denoiser.differentiable(model):
        assert model.model.manual_cast_dtype == within
        assert toy.backbone.comfy_cast_weights == (within == torch.float32 != cast)
        raise KeyError
    assert model.model.manual_cast_dtype == cast and not toy.backbone.comfy_cast_weights


@pytest.mark.parametrize("before", [False, True])
def test_a_core_that_knows_of_training_is_told(nodes, model_of, toys, monkeypatch, before):
    """Flux's fused rotary embedding has no gradient otherwise."""
    management = nodes.denoiser.comfy.model_management
    monkeypatch.setattr(management, "in_training", before)
    with pytest.raises(KeyError), nodes.denoiser.differentiable(model_of(toys.conv("flow"))):
        assert management.in_training is True
        raise KeyError
    assert management.in_training is before
    monkeypatch.delattr(management, "in_training")  # as in older cores
    with nodes.denoiser.differentiable(model_of(toys.conv("flow"))):
        assert not hasattr(management, "in_training")


class SingleBlock(torch.nn.Module):
    """As Flux's: it adds in place to what its norm keeps for backward."""

    def __init__(self):
        super().__init__()
        self.pre_norm, self.layer = LayerNorm(4), Linear(4, 4)

    def forward(self, x):
        x += self.layer(self.pre_norm(x))
        return x


def test_backward_reads_what_blocks_that_add_in_place_were_given(nodes, model_of, toys):
    toy = toys.conv("eps")
    toy.backbone = torch.nn.Module()
    toy.backbone.single_blocks = torch.nn.ModuleList([SingleBlock(), SingleBlock()])
    model, x = model_of(toy), torch.randn(2, 3, 4, requires_grad=True)

    def run():
        y = x * 1
        for block in toy.backbone.single_blocks:
            y = block(y)
        return torch.autograd.grad(y.square().mean(), x)[0]

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run()
    with nodes.denoiser.differentiable(model):
        found = run()
    y = x
    for block in toy.backbone.single_blocks:
        y = y + block.layer(block.pre_norm(y))
    assert torch.allclose(found, torch.autograd.grad(y.square().mean(), x)[0], atol=1e-6)
    assert not any(m._forward_pre_hooks for m in toy.backbone.modules())


def test_latents_are_scaled_on_their_way_in_and_out(nodes, toys, model_of, comfyui):
    form = comfyui.LatentFormat()
    form.scale_factor = 0.18215
    found = nodes.denoiser.ModelDenoiser(model_of(toys.conv("eps"), latent_format=form))
    x = toys.picture()
    assert torch.allclose(found.latent_in(x), x * 0.18215) and torch.allclose(found.latent_out(found.latent_in(x)), x)


def test_conditions_are_the_rows_of_the_batch(nodes, toys, model_of):
    states = toys.cond(1).context
    found = nodes.denoiser.conditions(model_of(toys.conv("eps")), [[states, {}]], toys.picture(3))
    assert len(found) == 3 and found.pooled is None and torch.equal(found.context[2:], states)


@pytest.mark.parametrize("option", ["area", "mask", "control", "start_percent"])
def test_a_condition_that_is_not_the_same_all_over_is_refused(nodes, toys, model_of, option):
    model, states = model_of(toys.conv("eps")), toys.cond(1).context
    with pytest.raises(ValueError, match=option):
        nodes.denoiser.conditions(model, [[states, {option: 1}]], toys.picture())
    with pytest.raises(ValueError, match="2 parts"):
        nodes.denoiser.conditions(model, [[states, {}], [states, {}]], toys.picture())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rank", [2, 0])
def test_on_a_gpu_nothing_is_mixed_and_no_pass_waits(toys, comfyui, model_of, nodes, pretended, prediction, rank):
    with pretended.pretend() as seen:
        model = model_of(toys.conv(prediction))
        model.load_device = pretended.CUDA
        model.model.to("cuda")
        student = Student(nodes.denoiser.ModelDenoiser(model), rank)
        cond, x = toys.cond().to("cuda"), toys.picture().to("cuda")
        sigma = student.schedule.sigma(torch.tensor([999.0, 300.0])).to("cuda")
        for _ in range(2):  # tables go over in the first
            seen.clear()
            with student.training(), nodes.denoiser.differentiable(model):
                teacher = student.teacher(x, sigma, cond)
                student(x, sigma, cond).sub(teacher).square().mean().backward()
        assert dict(seen.waits) == {} and dict(seen.doubles) == {}
        assert all(p.grad is not None and p.grad.device.type == "cuda" for p in student.trained.parameters())
        student.release()
