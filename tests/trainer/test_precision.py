"""The arithmetic of the passes: what a device is fast in, what stays in float32, and float16's scaled gradients."""

import contextlib

import pytest
import torch
from torch import amp, nn
from torch.nn import Conv2d
from turbodistill.core.denoiser import Cond
from turbodistill.core.precision import cast_once, fast_bfloat16
from turbodistill.core.schedule import DiscreteSchedule
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.loop import distill as loop
from turbodistill.trainer.loop.distill import Diverged, distill
from turbodistill.trainer.loop.precision import autocast, cast_frozen, grad_scaler


@pytest.mark.parametrize(
    ("capability", "fast"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)]
)
def test_cards_that_emulate_bfloat16_are_not_fast_in_it(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # also where it is emulated
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert fast_bfloat16(torch.device("cuda")) is fast


def on(device, backbone=None):
    """A denoiser that says it is on another device."""
    denoiser = type("Elsewhere", (), {"device": torch.device(device), "backbone": backbone or nn.Module()})
    return denoiser()


def test_an_older_torch_without_autocast_on_apple_s_devices_trains_in_float32(monkeypatch):
    def older(device_type, *_, **__):
        raise RuntimeError(f"User specified an unsupported autocast device_type '{device_type}'")

    monkeypatch.setattr(amp, "autocast", older)
    for precision in ("auto", "float32"):
        with autocast(Config(precision=precision), on("mps")):
            pass
    with (
        pytest.raises(ConfigError, match=r"precision is 'float16', which .* not have on mps: use float32"),
        autocast(Config(precision="float16"), on("mps")),
    ):
        pass


class Last(nn.Module):
    """A UNet's last layer alone, whose input has no rounding error yet."""

    def __init__(self, nested: bool):
        super().__init__()
        layer = Conv2d(4, 4, 1, bias=False)
        nn.init.dirac_(layer.weight)
        if nested:
            self.out = nn.Sequential(nn.Identity(), layer)
        else:
            self.conv_out = layer
        self.layer = [layer]

    def forward(self, x, time, context):
        return self.layer[0](x)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_rounding_of_eps_does_not_reach_one_step_pictures(toys, nested, dtype):
    backbone = Last(nested).to(dtype)
    denoiser = toys.Toy(backbone, DiscreteSchedule(), "eps")
    x, sigma, cond = 14.6 * torch.randn(4, 4, 32, 32), torch.full((4,), 14.6), toys.cond(4)
    before, layer = dict(backbone.layer[0]._parameters), backbone.layer[0]
    alpha = denoiser.schedule.alpha_sigma(sigma)[0][0]
    with torch.no_grad():
        exact = x - 14.6 * (alpha * x)
        with amp.autocast("cpu", torch.bfloat16):
            rounded = (denoiser(x, sigma, cond) - exact).square().mean().sqrt().item()
        with autocast(Config(precision="bfloat16"), denoiser):
            error = (denoiser(x, sigma, cond) - exact).square().mean().sqrt().item()
    assert rounded > 0.015 and error < 1e-4
    assert "forward" not in layer.__dict__ and layer._parameters == before


def test_an_error_within_puts_the_layer_back(toys):
    denoiser = toys.conv()
    with contextlib.suppress(KeyError), autocast(Config(precision="bfloat16"), denoiser):
        assert "forward" in denoiser.backbone.conv_out.__dict__
        raise KeyError
    assert "forward" not in denoiser.backbone.conv_out.__dict__


# --- float16 ---


def start(kit, host, folder, **changes):
    settings = kit.config(**{"precision": "float16"} | changes)
    samples = kit.pairs(host, settings, folder)
    return kit.state(host, settings, samples), samples


def test_float16_alone_scales_its_gradients():
    cpu = torch.device("cpu")
    enabled = {p: grad_scaler(Config(precision=p), cpu).is_enabled() for p in ("float32", "bfloat16", "float16")}
    assert enabled == {"float32": False, "bfloat16": False, "float16": True}


def test_gradients_too_small_for_float16_arrive(kit, host, tmp_path, monkeypatch):
    found, norms = {}, []
    for precision in ("float32", "float16"):
        changes = {"adversarial_weight": 0.0, "regression_weight": 1e-6, "max_grad_norm": 0.0, "updates": 1}
        state, samples = start(kit, host, tmp_path, precision=precision, **changes)
        monkeypatch.setattr(
            loop, "clip_gradients", lambda module, _: norms.append(gradients(module)) or norms[-1].norm()
        )
        list(distill(state, samples, host.encode_text([""])))
        found[precision] = norms.pop()
        state.release()
    assert found["float32"].abs().max() < 1e-6  # nothing that float16 could hold without the scale
    assert (found["float16"] - found["float32"]).norm() < 0.02 * found["float32"].norm()


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_an_overflow_is_skipped_with_a_smaller_scale_and_never_applied(kit, host, tmp_path):
    state, samples = start(kit, host, tmp_path, updates=4, discriminator_updates=2)
    state.scaler = amp.GradScaler("cpu", init_scale=256.0)
    steps = distill(state, samples, host.encode_text([""]))
    next(steps)
    trained = list(state.student.trained.parameters())
    spoilt = trained[0].register_hook(lambda gradient: gradient * float("inf"))
    before = [p.detach().clone() for p in trained]
    next(steps)
    assert all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert state.scaler.get_scale() == 128 and state.update == 2
    spoilt.remove()
    next(steps)
    assert not all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    state.release()


def test_gradients_that_no_scale_helps_are_told(kit, host, tmp_path):
    state, samples = start(kit, host, tmp_path, updates=40)
    next(iter(state.student.trained.parameters())).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(Diverged, match=r"update 18: student's gradient is not finite.* set precision to float32"):
        list(distill(state, samples, host.encode_text([""])))
    state.release()


def test_the_scale_is_saved_and_a_run_may_change_its_precision(kit, host, tmp_path):
    state, samples = start(kit, host, tmp_path, updates=2)
    state.scaler = amp.GradScaler("cpu", init_scale=256.0)
    list(distill(state, samples, host.encode_text([""])))
    saved = state.state_dict()
    assert saved["scaler"]["scale"] == 256.0 and saved["scaler"]["_growth_tracker"] == 2
    state.release()
    for precision, scale in (("float16", 256.0), ("float32", 1.0)):
        other, _ = start(kit, host, tmp_path, precision=precision, updates=3)
        other.load_state_dict(saved)
        assert other.scaler.get_scale() == scale
        list(distill(other, samples, host.encode_text([""])))
        again = other.state_dict()
        other.release()
    assert again["scaler"] == {}
    back, _ = start(kit, host, tmp_path, updates=4)
    back.load_state_dict(again)  # of a float32 run
    list(distill(back, samples, host.encode_text([""])))
    assert back.update == 4 and back.scaler.get_scale() > 1000
    back.release()


def test_a_run_in_float16_goes_on_bit_for_bit(kit, host, tmp_path):
    kit.go(host, kit.config(precision="float16", updates=4, evaluate_every=2), tmp_path / "whole")
    kit.go(host, kit.config(precision="float16", updates=2, evaluate_every=2), tmp_path / "cut")
    kit.go(host, kit.config(precision="float16", updates=4, evaluate_every=2), tmp_path / "cut")
    whole, cut = kit.saved(tmp_path / "whole"), kit.saved(tmp_path / "cut")
    assert kit.same(whole["student"], cut["student"]) and whole["scaler"] == cut["scaler"]


@pytest.mark.parametrize(
    ("stored", "precision", "scaled"),
    [
        (torch.float16, "float32", True),  # passes compute in what the weights are in
        (torch.float16, "bfloat16", False),
        (torch.bfloat16, "float32", False),
        (torch.float32, "float16", True),
    ],
)
def test_gradients_are_scaled_where_passes_compute_in_float16(monkeypatch, stored, precision, scaled):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    scaler = grad_scaler(Config(precision=precision), torch.device("cuda"), nn.Linear(2, 2).to(stored))
    assert scaler.is_enabled() is scaled


def test_the_last_layer_of_narrow_weights_computes_in_float32():
    denoiser = on("cpu", Last(False).to(torch.bfloat16))
    x = torch.randn(1, 4, 2, 2)
    with autocast(Config(precision="float32"), denoiser):
        assert denoiser.backbone.conv_out(x).dtype == torch.float32
    assert denoiser.backbone.conv_out(x.bfloat16()).dtype == torch.bfloat16


# --- Frozen weights that are cast once ---


def test_weights_that_are_cast_once_give_the_same_to_the_bit_and_come_back(kit):
    denoiser = kit.unet_denoiser()
    x, sigma = torch.randn(2, 4, kit.SIDE, kit.SIDE), torch.tensor([14.6, 1.0])
    cond = Cond(torch.randn(2, kit.TOKENS, kit.STATES))
    network = denoiser.backbone.requires_grad_(False)
    before = {name: (p, p.data.data_ptr(), p.data.clone()) for name, p in network.named_parameters()}
    config = Config(precision="bfloat16")
    with torch.no_grad(), autocast(config, denoiser):
        expected = denoiser(x, sigma, cond)
    with pytest.raises(KeyError), cast_frozen(config, denoiser):
        kinds = {name: p.dtype for name, p in network.named_parameters()}
        with torch.no_grad(), autocast(config, denoiser):
            assert torch.equal(denoiser(x, sigma, cond), expected)
        raise KeyError
    assert kinds["conv_in.weight"] == torch.bfloat16
    # Norms compute in float32, and so does the last layer.
    wide = [name for name, dtype in kinds.items() if dtype == torch.float32]
    assert {"conv_out.weight", "conv_norm_out.weight"} <= set(wide)
    assert all("norm" in name or name.startswith("conv_out") for name in wide)
    for name, p in network.named_parameters():
        was, place, value = before[name]
        assert p is was and p.data_ptr() == place and torch.equal(p, value)


def test_what_is_trained_and_what_is_packed_is_not_cast():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    layers[0].requires_grad_(True)
    layers[1].weight.data = layers[1].weight.data.to(torch.float8_e4m3fn)
    with cast_once(layers, torch.bfloat16):
        kinds = [layer.weight.dtype for layer in layers]
    assert kinds == [torch.float32, torch.float8_e4m3fn, torch.bfloat16]
    assert layers[2].weight.dtype == torch.float32


def test_a_training_leaves_the_model_s_weights_as_they_were(kit, tmp_path):
    host = kit.unet_host()
    before = kit.weights(host.denoiser.backbone)
    kinds = []
    host.denoiser.backbone.register_forward_pre_hook(lambda m, _: kinds.append(m.conv_in.weight.dtype))
    *_, finished = kit.go(host, kit.config(precision="bfloat16", taps="down_blocks.0,mid_block"), tmp_path / "run")
    assert torch.bfloat16 in kinds and torch.float32 in kinds  # the pairs were made before
    assert kit.same(kit.weights(host.denoiser.backbone), before) and finished.card.training["updates"] == 2
