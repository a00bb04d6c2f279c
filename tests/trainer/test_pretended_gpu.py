"""Training on a pretended GPU: no device is mixed with another, and none waits."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from torch import amp, nn
from turbodistill.core import losses
from turbodistill.core.vision import Eye, VisionFeatures
from turbodistill.trainer.loop import batch, distill, health, steps
from turbodistill.trainer.loop.optimizer import can_skip


def _kit():
    spec = importlib.util.spec_from_file_location("turbodistill_pretend", Path(__file__).parents[1] / "pretend_gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu = _kit()
EVERY = 3  # updates between two looks at the losses


class Patches(nn.Module):
    """A vision transformer's shape: tokens of 8 x 8 pixels through four blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.encoder.layer:
            x = x + torch.tanh(layer(x))
        return x


@pytest.fixture
def trained(kit, tmp_path):
    """`trained(updates, **settings)`: what was seen in each of so many updates on the device, and the state."""

    def run(count=7, **changes):
        pixels, network = changes.pop("pixels", False), changes.pop("network", "conv")
        host = kit.unet_host() if network == "unet" else kit.conv_host()
        taps = {"taps": "down_blocks.0,mid_block"} if network == "unet" else {}
        settings = kit.config(**{"updates": 100, "log_every": EVERY, "precision": "bfloat16"} | taps | changes)
        samples = kit.pairs(host, settings, tmp_path / "pairs")
        found = []
        with gpu.pretend() as seen:
            host.denoiser.backbone.to("cuda")
            if pixels:
                network = Patches().to("cuda")
                seeing = VisionFeatures(Eye(network, 8), host.decoder)
                state = kit.state(host, settings, samples, [seeing])
            else:
                state = kit.state(host, settings, samples)
            uncond = host.encode_text([""]).to("cuda")
            seen.clear()
            for step in itertools.islice(distill.distill(state, samples, uncond), count):
                found.append((step, dict(seen.waits), dict(seen.doubles), seen.operations, dict(seen.full)))
                seen.clear()
        return found, state

    return run


RECIPES = {
    "latents": {},
    "full copy": {"rank": 0, "lr": 1e-5},
    "pixels": {"pixels": True},
    "matching": {"distillation": "matching", "distillation_weight": 0.5, "fake_score_rank": 2},
    "adversarial diffusion": {"distillation_weight": 2.5, "teacher_steps": 2},
    "nfsd": {"distillation": "nfsd", "distillation_weight": 1.0},
    "exact R1": {"r1": "exact", "r1_weight": 0.01},
    "relativistic, mismatch, features, image": {
        "adversarial": "relativistic", "mismatch_weight": 0.5, "feature_weight": 0.2, "condition_image": True,
    },
    "several steps": {"student_steps": 3, "fresh_noise_share": 0.3},
    "accumulation": {"gradient_accumulation": 2, "discriminator_updates": 2},
    "two time scales, R1 of the data": {
        "distillation": "matching", "distillation_weight": 0.5, "fake_score_rank": 2, "fake_score_updates": 3,
        "discriminator_updates": 2, "r1": "data",
    },
    "checkpointing": {"gradient_checkpointing": True, "network": "unet"},
    "guidance alone": {"guidance_only": True, "guidance_start": 0.1, "guidance_end": 0.8},
    "float32": {"precision": "float32"},
    "float16": {"precision": "float16"},
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_update_waits_but_where_the_losses_are_looked_at(trained, recipe):
    found, _ = trained(**RECIPES[recipe])
    for step, waits, doubles, _, _ in found[3:]:  # tables and caches are there by then
        looks = step.update % EVERY == 0
        assert doubles == {}
        assert bool(step.losses) == looks and (step.health is not None) == looks
        told = {place: n for place, n in waits.items() if recipe != "float16" or "tolist" in place}  # and its scale
        assert sum(told.values()) == looks and (looks or not waits), waits


@pytest.mark.parametrize("recipe", ["float32", "matching", "accumulation", "guidance alone"])
def test_a_student_of_the_device_is_that_of_the_cpu(kit, trained, tmp_path, recipe):
    changes = {"precision": "float32", **RECIPES[recipe]}
    _, theirs = trained(6, **changes)
    host = kit.conv_host()
    settings = theirs.config
    state = kit.state(host, settings, kit.pairs(host, settings, tmp_path / "pairs"))
    samples = kit.pairs(host, settings, tmp_path / "pairs")
    for _ in itertools.islice(distill.distill(state, samples, host.encode_text([""])), 6):
        pass
    ours, found = kit.weights(state.student.trained), kit.weights(theirs.student.trained)
    off = max((ours[name] - found[name]).abs().max() for name in ours)
    assert off < 1e-3  # the device looks its levels up in float32; Adam moves each weight by a hundredth


def test_losses_that_are_looked_at_seldom_are_means(kit, tmp_path):
    host, found = kit.conv_host(), {}
    for every in (1, 3):
        settings = kit.config(updates=7, log_every=every)
        samples = kit.pairs(host, settings, tmp_path / "pairs")
        state = kit.state(host, settings, samples)
        found[every] = list(distill.distill(state, samples, host.encode_text([""])))
        state.release()
    each = [step.losses["adversarial"] for step in found[1]]
    seldom = [(step.update, step.losses["adversarial"]) for step in found[3] if step.losses]
    assert seldom == [(3, pytest.approx(sum(each[:3]) / 3)), (6, pytest.approx(sum(each[3:6]) / 3)), (7, each[6])]


def test_what_is_not_finite_is_not_applied_and_told_at_the_next_look(kit, tmp_path, monkeypatch):
    host = kit.conv_host()
    settings = kit.config(updates=20, log_every=5)
    samples = kit.pairs(host, settings, tmp_path / "pairs")
    state = kit.state(host, settings, samples)
    assert can_skip(state.optimizer)
    running = distill.distill(state, samples, host.encode_text([""]))
    next(running)
    before = kit.weights(state.student.trained)
    monkeypatch.setattr(losses, "regression", lambda output, target: output.sum() * float("nan"))
    assert [next(running).update for _ in range(3)] == [2, 3, 4]
    assert kit.same(kit.weights(state.student.trained), before)
    with pytest.raises(distill.Diverged, match="update 5: regression is not finite"):
        next(running)
    assert kit.same(kit.weights(state.student.trained), before)


# --- Faults that it must find ---


def cpu_tensor_in_a_loss(monkeypatch):
    monkeypatch.setattr(losses, "regression", lambda a, b: (a - b).square().mean() * torch.ones(1).sum().expand(1))


def generator_of_the_cpu(monkeypatch):
    monkeypatch.setattr(
        losses,
        "approximate_r1",
        lambda a, b: torch.randn(a[0].shape, generator=torch.Generator(), device=a[0].device).mean(),
    )


def a_float64_constant(monkeypatch):
    monkeypatch.setattr(
        losses, "regression", lambda a, b: (a - b).square().mean() * torch.ones((), dtype=torch.float64).to(a.device)
    )


def numpy_in_the_loop(monkeypatch):
    own = health.spread_of_batch
    monkeypatch.setattr(health, "spread_of_batch", lambda x: own(x) + 0 * float(x.detach().numpy().mean()))


def no_autocast(monkeypatch):
    monkeypatch.setattr(steps, "autocast", lambda *_: amp.autocast("cuda", enabled=False))


def an_item(monkeypatch):
    own = losses.regression
    monkeypatch.setattr(losses, "regression", lambda a, b: own(a, b) * (1 if own(a, b).item() > -1 else 0))


def a_condition_on_the_device(monkeypatch):
    own = losses.regression
    monkeypatch.setattr(losses, "regression", lambda a, b: own(a, b) if own(a, b) > -1 else 0 * own(a, b))


def a_mask_of_rows(monkeypatch):
    own = losses.regression
    monkeypatch.setattr(losses, "regression", lambda a, b: own(a[a[:, 0, 0, 0] > -1e9], b))


def a_copy_that_waits(monkeypatch):
    monkeypatch.setattr(batch, "to_device", lambda tensor, device: tensor.to(device))


def a_constant_from_the_cpu(monkeypatch):
    own = losses.regression
    monkeypatch.setattr(losses, "regression", lambda a, b: own(a, b) * torch.tensor([1.0], device=a.device).mean())


def a_copy_back(monkeypatch):
    own = distill.update_average
    monkeypatch.setattr(
        distill, "update_average", lambda state: (own(state), next(state.student.trained.parameters()).cpu())[0]
    )


FAULTS = {
    cpu_tensor_in_a_loss: "on the CPU",
    generator_of_the_cpu: "generator",
    a_float64_constant: "double",
    numpy_in_the_loop: "numpy",
    no_autocast: "type",  # weights in bfloat16 refuse numbers in float32
    an_item: "item",
    a_condition_on_the_device: "__bool__",
    a_mask_of_rows: "aten::index",
    a_copy_that_waits: "copy to cuda",
    a_constant_from_the_cpu: "tensor in",
    a_copy_back: "copy to cpu",
}


def products_in_full(found):
    """Lines that multiply in float32 where the settings say bfloat16, but for the last layer."""
    return {line for *_, full in found for line in full if "core/precision.py" not in line}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_found(trained, monkeypatch, fault):
    if fault:
        fault(monkeypatch)
    said = ""
    try:
        found, _ = trained(4, r1_weight=1.0)
        said += "".join(f"{waits}" for _, waits, *_ in found[3:])
        said += "".join(f"double {doubles}" for _, _, doubles, *_ in found if doubles)
        said += "".join(f"float32 {line}" for line in products_in_full(found))
    except RuntimeError as error:
        said = str(error)
    assert FAULTS.get(fault, "") in said and (fault or said in ("", "{}"))
