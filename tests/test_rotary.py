"""Rotary embedding as it is differentiated: pairs turned by angles, as complex numbers are."""

import pytest
import torch
import torch.nn.functional as F
from turbodistill.core.rotary import give_gradients, normed_and_rotated, rotated


@pytest.fixture
def angles():
    torch.manual_seed(0)
    return torch.randn(1, 1, 5, 4, dtype=torch.float64)


@pytest.fixture
def table(angles):
    return torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))


@pytest.mark.parametrize("halves", [False, True])
def test_pairs_are_turned_by_their_angles(angles, table, halves):
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    real, imaginary = x.chunk(2, -1) if halves else (x[..., ::2], x[..., 1::2])
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    parts = [turned.real, turned.imag]
    wanted = torch.cat(parts, -1) if halves else torch.stack(parts, -1).flatten(-2)
    assert torch.allclose(rotated(x, table, halves), wanted)


def test_a_part_is_turned_and_a_longer_table_is_cut(table):
    x, scale = torch.randn(2, 3, 5, 12, dtype=torch.float64), torch.rand(12, dtype=torch.float64)
    found = normed_and_rotated(x, table, True, scale, 1e-6, 8)
    normed = F.rms_norm(x, (12,), scale, 1e-6)
    assert torch.equal(found[..., 8:], normed[..., 8:])
    assert torch.equal(found[..., :8], rotated(normed[..., :8], table, True))
    short = x[:, :, :3, :8]
    assert torch.equal(normed_and_rotated(short, table, False, None, 0.0, 0), rotated(short, table[:, :, :3]))


def test_without_the_library_nothing_happens():
    give_gradients()
    assert not hasattr(torch.ops.comfy_kitchen, "apply_rope")
