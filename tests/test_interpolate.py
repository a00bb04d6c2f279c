"""Between two tensors."""

import math

import pytest
import torch
from turbodistill.core.denoiser import Cond
from turbodistill.core.interpolate import lerp, mixed, slerp, turned


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_great_circle_keeps_the_length_of_noise_and_the_line_does_not(share):
    a, b = noise(0, 4, 16, 16), noise(1, 4, 16, 16)
    between = slerp(a, b, share)
    assert between.std() == pytest.approx(1, abs=0.05)
    if share == 0.5:
        assert lerp(a, b, share).std() < 0.75
    if share in (0.0, 1.0):
        assert torch.allclose(between, b if share else a, atol=1e-5)


def test_a_great_circle_turns_evenly_and_mixes_lengths():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    third = slerp(a, b, 1 / 3)
    assert third.norm() == pytest.approx(2 + 2 / 3, abs=1e-5)
    assert math.degrees(math.atan2(third[1], third[0])) == pytest.approx(30, abs=1e-3)


def test_one_direction_and_none_are_joined_by_a_line():
    a = noise(0, 100)
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a, atol=1e-6)
    assert torch.equal(slerp(torch.zeros(3), torch.ones(3), 0.5), torch.full((3,), 0.5))


@pytest.mark.parametrize("angle", [0.1, 1.0, 2.0, 100.0])
def test_turned_noise_is_unit_noise_and_near_for_a_little(angle):
    a, b = noise(0, 4, 32, 32), noise(1, 4, 32, 32)
    found = turned(a, b, angle)
    assert found.std() == pytest.approx(1, abs=0.05)
    assert ((found - a).norm() < 0.2 * a.norm()) == (angle == 0.1)


def test_conditions_are_mixed_field_by_field():
    a = Cond(torch.zeros(1, 2, 3), torch.tensor([[1.0, 0.0]]), {"ids": torch.tensor([[4]]), "size": torch.zeros(1, 1)})
    b = Cond(torch.ones(1, 4, 3), torch.tensor([[0.0, 1.0]]), {"ids": torch.tensor([[4]]), "size": torch.ones(1, 1)})
    found = mixed(a, b, 0.5)
    assert found.context.shape == (1, 4, 3) and (found.context == 0.5).all()
    assert torch.allclose(found.pooled, torch.full((1, 2), math.sqrt(0.5)))
    assert found.extra["ids"].item() == 4 and found.extra["size"].item() == 0.5
    assert mixed(a, b, 0.0) is a and mixed(a, b, 1.0) is b
