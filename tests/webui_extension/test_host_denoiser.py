"""The hosts' networks as core's Denoiser: the same x0 as the toy's, right gradients, everything put back."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import amp, nn
from torch.nn import GroupNorm, LayerNorm, Linear
from turbodistill.core import borrowed
from turbodistill.core.denoiser import Cond
from turbodistill.core.schedule import FlowSchedule, scaled_linear, zero_terminal
from turbodistill.core.student import Student
from turbodistill.webui_extension import host_denoiser


@pytest.fixture(scope="module")
def models():
    """The stand-ins, by their path."""
    path = Path(__file__).parent / "stand_ins" / "models.py"
    spec = importlib.util.spec_from_file_location("turbodistill_webui_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compvis(models, toys):
    """Prediction -> AUTOMATIC1111's adapter of a toy network."""

    def build(prediction="eps", table=None):
        table = scaled_linear() if table is None else table
        return host_denoiser.CompvisDenoiser(models.unet(toys), table, prediction, torch.device("cpu"))

    return build


@pytest.fixture
def forge(models, toys):
    """Forge's name of a prediction -> its adapter of a toy network."""

    def build(prediction="epsilon", sigmas=None, numbered=True):
        predictor = models.Predictor(prediction, sigmas, numbered)
        return host_denoiser.ForgeDenoiser(models.Patcher(models.KModel(models.unet(toys), predictor)))

    return build


class Same(nn.Module):
    """The toys' calling convention over a host's network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, time, context):
        return self.network(x, time * 1000, context)


def reference(toys, found):
    return toys.Toy(Same(found.backbone), found.schedule, found.prediction)


def noisy(toys, found):
    """A picture at two levels, with its levels and texts."""
    sigma = found.schedule.sigma(torch.tensor([999.0, 300.0]))
    return found.schedule.add_noise(toys.picture(), toys.picture(), sigma), sigma, toys.cond()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_automatic1111_s_network_denoises_as_the_toy(toys, compvis, prediction):
    found = compvis(prediction)
    given = noisy(toys, found)
    assert torch.allclose(found(*given), reference(toys, found)(*given), atol=1e-4)
    assert found.device == torch.device("cpu")


@pytest.mark.parametrize(("theirs", "ours"), [("epsilon", "eps"), ("v_prediction", "v"), ("const", "flow")])
def test_forge_s_network_denoises_as_the_toy(toys, forge, theirs, ours):
    sigmas = FlowSchedule(3.0).sigma(torch.arange(1000.0)) if ours == "flow" else None
    found = forge(theirs, sigmas)
    assert found.prediction == ours
    given = noisy(toys, found)
    # Forge tells the network a flow's level without the shift, as the models want it: no toy does.
    toy = reference(toys, found)
    toy.schedule = FlowSchedule(1.0) if ours == "flow" else found.schedule
    expected = toy(*given)
    assert torch.allclose(found(*given), expected, atol=1e-2 if ours == "flow" else 1e-4)
    assert found.options == {}


def test_a_summary_of_the_text_goes_in_as_y(toys, compvis, forge):
    for found in (compvis(), forge()):
        x, sigma, cond = noisy(toys, found)
        other = Cond(cond.context, torch.tensor([[0.3], [0.6]]))
        assert not torch.allclose(found(x, sigma, other), found(x, sigma, cond))


def test_zero_terminal_noise_levels_are_the_model_s(compvis):
    assert compvis("v", zero_terminal(scaled_linear())).schedule.sigma_max == pytest.approx(4518.8, rel=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0, 1.15])
@pytest.mark.parametrize("entries", [1000, 10000])
def test_a_flow_s_shift_is_found(models, shift, entries):
    table = FlowSchedule(shift, entries).sigma(torch.arange(float(entries)))
    _, schedule = host_denoiser.levels_of(models.Predictor("const", table))
    assert schedule.shift == pytest.approx(shift, rel=1e-3)


@pytest.mark.parametrize(
    ("prediction", "sigmas", "numbered"),
    [
        ("edm", None, True),
        ("epsilon", None, False),
        ("epsilon", torch.linspace(0.01, 10, 500), True),
        ("const", torch.linspace(0.001, 1, 1000) ** 2, True),
        ("const", torch.linspace(1, 120, 1000), True),
    ],
)
def test_noise_levels_of_another_kind_are_refused(models, prediction, sigmas, numbered):
    with pytest.raises(ValueError, match="noise levels of its own kind"):
        host_denoiser.levels_of(models.Predictor(prediction, sigmas, numbered))


@pytest.fixture(params=["compvis", "forge"])
def found(request):
    return request.getfixturevalue(request.param)()


def test_a_lora_student_learns_on_it_and_off_is_the_teacher(toys, found):
    given = noisy(toys, found)
    before = found(*given)
    student = Student(found, rank=4)
    with host_denoiser.frozen(found.backbone), student.training():
        student(*given).square().mean().backward()
    assert all(b.up.grad is not None and b.up.grad.any() for b in student.lora.each())
    assert all(p.grad is None and p.requires_grad for p in found.backbone.parameters())
    toys.nudge(student.lora)
    assert not torch.allclose(student(*given), before)
    assert torch.equal(found(*given), before)


def test_a_full_copy_leaves_the_host_s_network_alone(toys, found):
    given, network = noisy(toys, found), found.backbone
    network.half().float()
    expected = found(*given)
    network.half()
    network.dtype = torch.float16  # as SDXL's, which casts its input to it
    layer = network.blocks[0].inner
    layer.forward = lambda x, old=layer.forward: old(x)  # as an extension's, bound to this layer
    with host_denoiser.in_float32(network):
        student = Student(found, rank=0)
    assert student.backbone.dtype == torch.float32 and network.dtype == torch.float16
    assert torch.allclose(student(*given), expected, atol=1e-5)
    assert {p.dtype for p in network.parameters()} == {torch.float16}
    with torch.no_grad():
        for weight in student.backbone.parameters():
            weight.mul_(1.5)
    assert not torch.allclose(student(*given), expected)


def gradient(toys, network, fast=False):
    """What a loss through the network gives its input."""
    torch.manual_seed(1)
    x = toys.picture().requires_grad_(True)
    with amp.autocast("cpu", torch.bfloat16, enabled=fast):
        y = network(x, torch.tensor([999.0, 300.0]), toys.cond().context)
    y.float().square().mean().backward()
    return x.grad


def test_weights_of_half_precision_give_float32_s_gradients(models, toys):
    network = models.unet(toys)
    network.half().float()
    expected = gradient(toys, network)
    network.half()
    with pytest.raises(RuntimeError):
        gradient(toys, network)
    with host_denoiser.frozen(network), host_denoiser.in_float32(network):
        found = gradient(toys, network)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-8)
        fast = gradient(toys, network, fast=True)  # autocast goes before
        assert not torch.equal(fast, found) and torch.allclose(fast, found, rtol=0.1, atol=1e-2)
    assert {p.dtype for p in network.parameters()} == {torch.float16}


def test_norms_compute_in_float32_though_autocast_is_on():
    norm = GroupNorm(1, 4).half()
    with host_denoiser.in_float32(norm), amp.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(1, 4, 2, 2)).isfinite().all()
    assert norm.weight.dtype == torch.float16


def test_weights_are_put_back_after_an_error_within_a_pass(models, toys):
    network = models.unet(toys).half()
    own = list(network.parameters())

    def fail(*_):
        raise MemoryError

    hook = network.conv_out.register_forward_hook(fail)
    with pytest.raises(MemoryError), host_denoiser.in_float32(network):
        gradient(toys, network)
    hook.remove()
    assert all(a is b for a, b in zip(own, network.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


class InPlace(nn.Module):
    """As Forge's transformer blocks: it adds in place to what its norm keeps for backward."""

    def __init__(self):
        super().__init__()
        self.norm1, self.layer = LayerNorm(4), Linear(4, 4)

    def forward(self, x):
        x += self.layer(self.norm1(x))
        return x


def test_backward_reads_what_blocks_that_add_in_place_were_given():
    network = nn.Module()
    network.transformer_blocks = nn.ModuleList([InPlace(), InPlace()])
    x = torch.randn(2, 3, 4, requires_grad=True)

    def run():
        y = x * 1
        for block in network.transformer_blocks:
            y = block(y)
        return torch.autograd.grad(y.square().mean(), x)[0]

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run()
    with borrowed.cloned_inputs(network, host_denoiser.ADDED_TO):
        found = run()
    y = x
    for block in network.transformer_blocks:
        y = y + block.layer(block.norm1(y))
    assert torch.allclose(found, torch.autograd.grad(y.square().mean(), x)[0], atol=1e-6)
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_what_was_made_in_inference_mode_is_thawed_with_its_bits_and_flags(models, toys):
    with torch.inference_mode():
        network = models.unet(toys)
        network.register_buffer("table", torch.arange(3.0))
    network.conv_in.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    flags = [p.requires_grad for p in network.parameters()]
    borrowed.leave_inference_mode(network)
    assert not any(t.is_inference() for t in network.state_dict(keep_vars=True).values())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == flags


class Whole(torch.Tensor):
    """A weight as ComfyUI-GGUF holds one: packed numbers with a shape of their own, and its own clone."""

    def clone(self):
        return self

    def detach(self):
        return self


def test_packed_weights_that_are_their_own_clone_are_thawed_too():
    with torch.inference_mode():
        weight = torch.arange(6, dtype=torch.uint8).as_subclass(Whole)
        weight.logical = (3, 4)
        network = nn.Module()
        network.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    assert network.weight.is_inference()
    borrowed.leave_inference_mode(network)
    assert not network.weight.is_inference() and network.weight is not weight
    assert type(network.weight) is Whole and network.weight.logical == (3, 4)
    assert network.weight.tolist() == list(range(6)) and next(network.parameters()) is network.weight


def test_flags_and_types_are_put_back_where_a_weight_was_replaced(models, toys):
    network = models.unet(toys)
    network.conv_out.weight.requires_grad_(False)
    with pytest.raises(KeyError), host_denoiser.frozen(network):
        assert not any(p.requires_grad for p in network.parameters())
        network.conv_in.weight = nn.Parameter(torch.zeros(8, 4, 3, 3).double(), requires_grad=False)
        raise KeyError
    assert network.conv_in.weight.dtype == torch.float32
    assert network.conv_in.weight.requires_grad and not network.conv_out.weight.requires_grad


def test_every_pass_is_watched(toys, compvis):
    found, seen = compvis(), []
    given = noisy(toys, found)
    with borrowed.watched(found.backbone, lambda: seen.append(1)):
        found(*given)
        found(*given)
    found(*given)
    assert len(seen) == 2


@pytest.mark.parametrize("host", ["compvis", "forge"])
@pytest.mark.parametrize("rank", [2, 0])
def test_on_a_gpu_nothing_is_mixed_and_no_pass_waits(models, toys, pretended, host, rank):
    with pretended.pretend() as seen:
        if host == "compvis":
            network = models.unet(toys).to("cuda")
            teacher = host_denoiser.CompvisDenoiser(network, scaled_linear(), "eps", pretended.CUDA)
        else:
            patcher = models.Patcher(models.KModel(models.unet(toys), models.Predictor("epsilon", None, True)))
            patcher.model.to("cuda")
            patcher.load_device = pretended.CUDA
            teacher = host_denoiser.ForgeDenoiser(patcher)
        student = Student(teacher, rank)
        cond, x = toys.cond().to("cuda"), toys.picture().to("cuda")
        sigma = student.schedule.sigma(torch.tensor([999.0, 300.0])).to("cuda")
        for _ in range(2):  # tables go over in the first
            seen.clear()
            with student.training(), host_denoiser.in_float32(teacher.backbone):
                teacher_s = teacher(x, sigma, cond)
                student(x, sigma, cond).sub(teacher_s).square().mean().backward()
        assert dict(seen.waits) == {} and dict(seen.doubles) == {}
        assert all(p.grad is not None for p in student.trained.parameters())
        student.release()
