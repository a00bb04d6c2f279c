"""The optimizers: Adam of eight bits learns nearly the same, Prodigy finds its rate; all are saved, or refused."""

import importlib.util

import pytest
import torch
from torch import nn
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.loop import optimizer as room
from turbodistill.trainer.loop import start
from turbodistill.trainer.loop.optimizer import adam, load_state, of_student, saved_state, set_lr


def needs(module, name):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"needs {name}: pip install {name}")


needs_torchao, needs_prodigy = needs("torchao", "torchao"), needs("pytorch_optimizer", "pytorch-optimizer")
EIGHT_BITS = {"optimizer": "adamw8bit", "lr": 1e-3}
PRODIGY = {"optimizer": "prodigy", "lr": 1.0}
KINDS = [pytest.param(EIGHT_BITS, marks=needs_torchao), pytest.param(PRODIGY, marks=needs_prodigy)]


@pytest.mark.parametrize(("settings", "library"), [(EIGHT_BITS, "torchao"), (PRODIGY, "pytorch-optimizer")])
def test_where_a_library_is_missing_that_is_said(kit, host, monkeypatch, settings, library):
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    kind = settings["optimizer"]
    with pytest.raises(ConfigError, match=f"optimizer is '{kind}', which needs {library}: pip install {library}"):
        start.check(host, kit.config(**settings))
    start.check(host, kit.config())
    with pytest.raises(ConfigError, match=f"needs {library}"):
        of_student(nn.Linear(2, 2), Config(**settings))


def test_prodigy_takes_the_learning_rate_as_a_factor():
    with pytest.raises(ConfigError, match=r"lr is 0\.0002 and optimizer 'prodigy', .*: set lr to 1 \(0\.1 to 1\)"):
        Config(optimizer="prodigy")
    assert Config(optimizer="prodigy", lr=0.5).lr == 0.5


def test_a_saved_state_of_plain_adam_is_torch_s_own():
    layer = nn.Linear(3, 3)
    optimizer = adam(layer, 1e-3, (0.9, 0.99))
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    ours, theirs = saved_state(optimizer), optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for moments, own in zip(ours["state"].values(), theirs["state"].values(), strict=True):
        assert all(moments[k] is own[k] for k in own)


@pytest.mark.parametrize("moment", [{"codes": 1}, {}, {"a": torch.zeros(2)}])
def test_moments_of_an_unknown_kind_are_refused(moment):
    layer = nn.Linear(3, 3)
    optimizer = adam(layer, 1e-3, (0.9, 0.99))
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    saved = saved_state(optimizer)
    saved["state"][0] = {"step": torch.tensor(1.0), "exp_avg": moment}
    with pytest.raises(ValueError, match="kind that is not known"):
        load_state(optimizer, saved)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8))


def learn(network, optimizer, updates, begin=0):
    for update in range(begin, begin + updates):
        draws = torch.Generator().manual_seed(update)
        x = torch.randn(16, 64, generator=draws)
        set_lr(optimizer, 1e-3 / (1 + update))
        network(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@needs_torchao
def test_it_moves_as_adam_does():
    moved = {}
    for kind in ("adamw", "adamw8bit"):
        network = layers()
        before = torch.cat([p.detach().flatten() for p in network.parameters()])
        moved[kind] = learn(network, of_student(network, Config(optimizer=kind)), 8) - before
    off = (moved["adamw"] - moved["adamw8bit"]).norm() / moved["adamw"].norm()
    assert 0 < off < 0.1


@needs_torchao
def test_its_moments_take_a_quarter():
    network = layers()
    optimizer = of_student(network, Config(**EIGHT_BITS))
    learn(network, optimizer, 1)
    large = saved_state(optimizer)["state"][0]["exp_avg"]
    assert large["codes"].dtype == torch.uint8 and large["codes"].numel() == 64 * 256
    assert large["scale"].numel() == 64  # one for 256 numbers


@needs_prodigy
def test_prodigy_finds_a_learning_rate():
    """From a guess of a millionth it comes near the target in 100 updates; at a tenth of its factor in more."""
    target = torch.linspace(-1, 1, 50)
    left = {}
    for factor in (1.0, 0.1):
        layer = nn.Linear(1, 50, bias=False)
        nn.init.zeros_(layer.weight)
        optimizer = of_student(layer, Config(**PRODIGY | {"lr": factor}))
        rates = []
        for _ in range(100):
            (layer.weight[:, 0] - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            rates.append(optimizer.param_groups[0]["d"])
        left[factor] = (layer.weight[:, 0].detach() - target).norm() / target.norm()
        assert rates == sorted(rates) and rates[0] <= 1e-5 and rates[-1] > 1e-3
    assert left[1.0] < 0.1 < left[0.1] < 1


@needs_prodigy
def test_prodigy_keeps_what_the_memory_estimate_counts():
    from turbodistill.trainer.run.memory import STATE_SIZES

    network = layers()
    optimizer = of_student(network, Config(**PRODIGY))
    learn(network, optimizer, 1)
    kept = sum(t.numel() for moments in optimizer.state.values() for t in moments.values())
    assert kept == STATE_SIZES["prodigy"] * sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("settings", KINDS)
def test_it_goes_on_to_the_bit(tmp_path, settings):
    from turbodistill.trainer.run.state_file import read_state, write_state

    network = layers()
    optimizer = of_student(network, Config(**settings))
    learn(network, optimizer, 3)
    write_state(tmp_path / "state", {"network": network.state_dict(), "optimizer": saved_state(optimizer)})
    whole = learn(network, optimizer, 3, 3)
    saved = read_state(tmp_path / "state")
    other = layers()
    other.load_state_dict(saved["network"])
    again = of_student(other, Config(**settings))
    load_state(again, saved["optimizer"])
    assert torch.equal(learn(other, again, 3, 3), whole)


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("rank", [2, 0])
def test_a_training_with_it_is_resumed_to_the_bit(kit, tmp_path, settings, rank):
    settings = settings | {"taps": "", "rank": rank, "save_every": 2}
    whole = kit.go(kit.unet_host(), kit.config(**settings, updates=4), tmp_path / "whole")[-1]
    kit.go(kit.unet_host(), kit.config(**settings, updates=2), tmp_path / "part")
    resumed = kit.go(kit.unet_host(), kit.config(**settings, updates=4), tmp_path / "part")[-1]
    assert kit.same(kit.tensors(whole.path), kit.tensors(resumed.path))
    assert kit.updates(tmp_path / "part") == [1, 2, 3, 4]


@needs_prodigy
def test_what_follows_the_student_learns_by_adam(kit, tmp_path):
    kit.go(kit.unet_host(), kit.config(**PRODIGY, taps=""), tmp_path)
    saved = kit.saved(tmp_path)
    assert "d_max" in saved["optimizer"]["param_groups"][0]
    assert "d_max" not in saved["discriminator_optimizer"]["param_groups"][0]
