"""The optimizers: with moments of eight bits they learn nearly the same, are saved whole, and refused where missing."""

import importlib.util

import pytest
import torch
from torch import nn
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.loop import optimizer as room
from turbodistill.trainer.loop import start
from turbodistill.trainer.loop.optimizer import adam, load_state, saved_state, set_lr

TORCHAO = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not TORCHAO, reason="needs torchao: pip install torchao")


def test_where_torchao_is_missing_that_is_said(kit, host, monkeypatch):
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="optimizer is 'adamw8bit', which needs torchao: pip install torchao"):
        start.check(host, kit.config(optimizer="adamw8bit"))
    start.check(host, kit.config())
    with pytest.raises(ConfigError, match="needs torchao"):
        adam(nn.Linear(2, 2), 1e-3, (0.9, 0.99), "adamw8bit")


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
        moved[kind] = learn(network, adam(network, 1e-3, (0.9, 0.99), kind), 8) - before
    off = (moved["adamw"] - moved["adamw8bit"]).norm() / moved["adamw"].norm()
    assert 0 < off < 0.1


@needs_torchao
def test_its_moments_take_a_quarter():
    network = layers()
    optimizer = adam(network, 1e-3, (0.9, 0.99), "adamw8bit")
    learn(network, optimizer, 1)
    large = saved_state(optimizer)["state"][0]["exp_avg"]
    assert large["codes"].dtype == torch.uint8 and large["codes"].numel() == 64 * 256
    assert large["scale"].numel() == 64  # one for 256 numbers


@needs_torchao
def test_it_goes_on_to_the_bit(tmp_path):
    from turbodistill.trainer.run.state_file import read_state, write_state

    network = layers()
    optimizer = adam(network, 1e-3, (0.9, 0.99), "adamw8bit")
    learn(network, optimizer, 3)
    write_state(tmp_path / "state", {"network": network.state_dict(), "optimizer": saved_state(optimizer)})
    whole = learn(network, optimizer, 3, 3)
    saved = read_state(tmp_path / "state")
    other = layers()
    other.load_state_dict(saved["network"])
    again = adam(other, 1e-3, (0.9, 0.99), "adamw8bit")
    load_state(again, saved["optimizer"])
    assert torch.equal(learn(other, again, 3, 3), whole)


@needs_torchao
@pytest.mark.parametrize("rank", [2, 0])
def test_a_training_with_it_is_resumed_to_the_bit(kit, tmp_path, rank):
    settings = {"optimizer": "adamw8bit", "taps": "", "rank": rank, "save_every": 2, "lr": 1e-3}
    whole = kit.go(kit.unet_host(), kit.config(**settings, updates=4), tmp_path / "whole")[-1]
    kit.go(kit.unet_host(), kit.config(**settings, updates=2), tmp_path / "part")
    resumed = kit.go(kit.unet_host(), kit.config(**settings, updates=4), tmp_path / "part")[-1]
    assert kit.same(kit.tensors(whole.path), kit.tensors(resumed.path))
    assert kit.updates(tmp_path / "part") == [1, 2, 3, 4]
