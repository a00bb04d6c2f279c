"""Packed weights: near the real ones, with the gradient of their own numbers, nothing kept, and back to the bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import amp, nn
from turbodistill.core import eight_bits
from turbodistill.core.eight_bits import bytes_saved, in_eight_bits, packable, packed, unpacked
from turbodistill.core.gradient_checkpointing import checkpointed
from turbodistill.core.lora import LoRA, quantised
from turbodistill.core.precision import cast_once


class Blocks(nn.Module):
    """A convolution in, two blocks of large layers, and a convolution out."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 32, 3, padding=1)
        self.resnets = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 32, 3, padding=1)) for _ in range(2)
        )
        self.wide = nn.Linear(32, 512)
        self.back = nn.Linear(512, 32)
        self.conv_out = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for block in self.resnets:
            h = h + block(h)
        tokens = h.flatten(2).transpose(1, 2)
        h = h + self.back(F.silu(self.wide(tokens))).transpose(1, 2).unflatten(2, h.shape[2:])
        return self.conv_out(h)


@pytest.fixture
def network():
    return Blocks().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 4, 6, 6)


def test_large_layers_of_torch_s_own_are_packed_but_for_the_last(network):
    class Own(nn.Linear):
        """A host's."""

    network.own = Own(512, 512)
    network.last = nn.Conv2d(4, 4, 3)
    names = {"resnets.0.0", "resnets.0.2", "resnets.1.0", "resnets.1.2", "wide", "back"}
    assert set(packable(network)) == names
    network.conv_out = nn.Conv2d(32, 512, 3)  # as large as any
    assert set(packable(network)) == names


@pytest.mark.parametrize("shape", [(3, 7), (3, 7, 3, 3)])
def test_a_packed_weight_is_off_by_half_a_step_of_its_channel_at_most(shape):
    weight = torch.randn(shape) * torch.tensor([1e-3, 1.0, 1e3]).reshape(3, *(1 for _ in shape[1:]))
    numbers, scale = packed(weight)
    assert numbers.dtype == torch.int8 and numbers.shape == weight.shape
    largest = weight.flatten(1).abs().amax(1)
    off = (unpacked(numbers, scale, torch.float32) - weight).flatten(1).abs().amax(1)
    assert (off <= largest / 254 * 1.001).all()
    assert unpacked(*packed(torch.zeros(shape)), torch.float32).abs().max() == 0


def test_passes_and_gradients_are_those_of_the_rounded_weights(network, x):
    rounded = Blocks().requires_grad_(False)
    rounded.load_state_dict(network.state_dict())
    for name in packable(network):
        layer = rounded.get_submodule(name)
        scale = layer.weight.flatten(1).abs().amax(1) / 127
        wide = scale.reshape(-1, *(1 for _ in layer.weight.shape[1:]))
        layer.weight.copy_((layer.weight / wide).round() * wide)
    found = []
    for each in (rounded, network):
        given = x.clone().requires_grad_(True)
        with in_eight_bits(network):
            output = each(given)
            (gradient,) = torch.autograd.grad(output.square().sum(), given)
        found.append((output, gradient))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    plain = network(x)
    assert 0 < (found[1][0] - plain).norm() / plain.norm() < 0.02


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_a_lora_over_packed_weights_learns_as_over_the_real_ones(network, x, toys, low, checkpointing):
    lora = LoRA(network, 4)
    toys.nudge(lora)
    lora.enabled = True

    def gradients():
        lora.zero_grad()
        with amp.autocast("cpu", torch.bfloat16, enabled=low):
            output = network(x)
        output.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in lora.parameters()])

    plain = gradients()
    with in_eight_bits(network):
        if checkpointing:
            with checkpointed(network, [lora]):
                found = gradients()
        else:
            found = gradients()
    assert F.cosine_similarity(plain, found, 0) > 0.99
    assert (plain - found).norm() / plain.norm() < 0.1


def test_no_pass_keeps_a_weight_in_full(network, x):
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    given = x.requires_grad_(True)
    with in_eight_bits(network), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(given)
        weights = [p for p in network.parameters() if p.dtype == torch.int8]
        assert {t.data_ptr() for t in kept if t.dtype == torch.int8} == {p.data_ptr() for p in weights}
        sizes = {p.numel() for p in weights}
        assert len(weights) == 6 and not any(t.numel() in sizes for t in kept if t.is_floating_point())


def test_what_is_saved_is_counted(network):
    parameters = list(network.parameters())

    def size():
        return sum(p.numel() * p.element_size() for p in parameters)

    before, told = size(), bytes_saved(network)
    scales = 4 * (64 + 32 + 64 + 32 + 512 + 32)
    with in_eight_bits(network):
        assert before - size() - scales == told > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_comes_back_to_the_bit(network, x, dtype):
    network.to(dtype).requires_grad_(True)
    own = {k: v.clone() for k, v in network.state_dict().items()}
    parameters = [id(p) for p in network.parameters()]
    with pytest.raises(KeyError, match="cancelled"), in_eight_bits(network):
        assert quantised(network.wide.weight) and not network.wide.weight.requires_grad
        raise KeyError("cancelled")
    assert all(torch.equal(v, own[k]) and v.dtype == dtype for k, v in network.state_dict().items())
    assert [id(p) for p in network.parameters()] == parameters
    assert all(p.requires_grad for p in network.parameters())
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_an_error_half_way_leaves_nothing_packed(network, monkeypatch):
    own, calls = packed, iter(range(9))

    def failing(weight):
        if next(calls) == 2:
            raise RuntimeError("CUDA out of memory")
        return own(weight)

    monkeypatch.setattr(eight_bits, "packed", failing)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(RuntimeError, match="out of memory"), in_eight_bits(network):
        raise AssertionError
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_what_is_packed_is_not_cast(network):
    with in_eight_bits(network), cast_once(network, torch.bfloat16):
        types = {name: p.dtype for name, p in network.named_parameters()}
    assert types["wide.weight"] == torch.int8 and types["conv_in.weight"] == torch.bfloat16


def test_it_is_as_near_as_what_torchao_packs():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    layer = nn.Sequential(nn.Linear(64, 512)).requires_grad_(False)
    own = layer[0].weight.clone()
    ours = unpacked(*packed(own), torch.float32)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    theirs = layer[0].weight.dequantize()
    assert (ours - own).norm().item() == pytest.approx((theirs - own).norm().item(), rel=0.05)


def test_a_state_is_packed_and_comes_back_to_half_a_step():
    network = nn.Sequential(nn.Linear(200, 100), nn.LayerNorm(100))
    state = network.state_dict()
    stored = eight_bits.packed_state(state)
    assert stored["0.weight"].dtype == torch.int8 and stored["0.weight.scale"].shape == (100, 1)
    assert all(stored[name].dtype == torch.float16 for name in ("0.bias", "1.weight", "1.bias"))
    back = eight_bits.unpacked_state(stored)
    assert back.keys() == state.keys()
    step = state["0.weight"].abs().amax(1, keepdim=True) / 127
    assert ((back["0.weight"] - state["0.weight"]).abs() <= 0.501 * step).all()
