"""Crops and differentiable augmentation of what a discriminator sees."""

import pytest
import torch
from turbodistill.core.augment import CROP, CUT, GREY, NUMBERS, SHIFT, augmented, cropped

STILL = torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 9.0, 9.0]])  # no change, and what is left out lies outside


def changed(**numbers):
    """A view that changes one thing alone."""
    names = ("top", "left", "brightness", "saturation", "contrast", "down", "right", "cut_top", "cut_left")
    view = STILL.clone()
    for name, value in numbers.items():
        view[0, names.index(name)] = value
    return view


@pytest.fixture
def picture():
    return torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def test_a_view_of_no_change_is_the_picture(picture):
    assert torch.allclose(augmented(picture, STILL), picture, atol=1e-6)


def test_colours_change_as_the_paper_s(picture):
    assert torch.allclose(augmented(picture, changed(brightness=1.0)), picture + 0.25, atol=1e-6)
    grey = augmented(picture, changed(saturation=0.0))
    assert torch.allclose(grey, picture.mean(1, keepdim=True).expand_as(picture), atol=1e-6)
    contrast = augmented(picture, changed(contrast=1.0))
    assert torch.allclose(contrast - picture.mean(), (picture - picture.mean()) * 1.5, atol=1e-6)


def test_it_moves_by_an_eighth_at_most_and_what_comes_in_is_grey(picture):
    moved = augmented(picture, changed(down=1.0, right=0.0))
    rows, columns = round(SHIFT * 16), round(SHIFT * 24)
    assert torch.allclose(moved[..., rows:, :-columns], picture[..., :-rows, columns:], atol=1e-6)
    assert (moved[..., :rows, :] == GREY).all() and (moved[..., -columns:] == GREY).all()


def test_a_square_of_half_the_sides_is_left_out(picture):
    cut = augmented(picture, changed(cut_top=0.5, cut_left=0.5))
    gone = (cut == GREY).all(1)[0]
    assert gone.sum() == pytest.approx(CUT * 16 * CUT * 24, rel=0.2)
    assert gone[8, 12] and not gone[0, 0] and not gone[15, 23]
    assert torch.allclose(cut[0, :, ~gone], picture[0, :, ~gone], atol=1e-6)


def test_gradients_come_through_all_of_it(picture):
    view = torch.rand(1, NUMBERS, generator=torch.Generator().manual_seed(1))
    picture.requires_grad_()
    seen = augmented(picture, view)
    seen.square().sum().backward()
    assert picture.grad.isfinite().all() and (picture.grad != 0).float().mean() > 0.3


def test_each_picture_has_a_view_of_its_own():
    alike = torch.rand(1, 3, 16, 16).repeat(4, 1, 1, 1)
    seen = augmented(alike, torch.rand(4, NUMBERS, generator=torch.Generator().manual_seed(2)))
    assert all(not torch.allclose(seen[0], other, atol=0.01) for other in seen[1:])


@pytest.mark.parametrize(("side", "shape"), [(0, (16, 24)), (8, (8, 8)), (20, (16, 20)), (99, (16, 24))])
def test_a_crop_is_no_larger_than_what_there_is(picture, side, shape):
    assert cropped(picture, side).shape[-2:] == shape


def test_crops_reach_every_corner_and_without_a_view_are_the_middle():
    x = torch.arange(25.0).reshape(1, 1, 5, 5).repeat(3, 1, 1, 1)
    view = torch.zeros(3, NUMBERS)
    view[1, :CROP], view[2, :CROP] = 0.999, torch.tensor([0.0, 0.999])
    first = [int(each[0, 0, 0]) for each in cropped(x, 3, view)]
    assert first == [0, 12, 2]
    assert int(cropped(x, 3)[0, 0, 0, 0]) == 6
