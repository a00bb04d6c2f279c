"""Pictures side by side under their titles."""

import pytest
import torch

GAP, BAND = 8, 26


def plain(*size, value):
    """One picture (1, H, W, 3) of a value."""
    return torch.full((1, *size, 3), value)


@pytest.mark.parametrize(
    ("size", "scale"), [((64, 64), 4), ((100, 64), 4), ((256, 256), 1), ((300, 512), 1), ((200, 300), 2), ((1, 2), 256)]
)
def test_small_pictures_are_enlarged_by_a_whole_number(nodes, size, scale):
    sheet = nodes.picture.side_by_side([("a", plain(*size, value=0.0)), ("b", plain(*size, value=1.0))])
    height, width = size[0] * scale, size[1] * scale
    assert sheet.shape == (1, height + BAND, 2 * width + GAP, 3)
    assert min(height, width) >= nodes.picture.LEAST


def test_columns_stand_in_order_with_white_between(nodes):
    columns = [(name, plain(256, 256, value=v)) for name, v in (("a", 0.0), ("b", 0.2), ("c", 0.4))]
    body = nodes.picture.side_by_side(columns)[0, BAND:]
    for i, (_, pictures) in enumerate(columns):
        left = i * (256 + GAP)
        assert torch.allclose(body[:, left : left + 256], pictures[0], atol=1 / 255)
        assert (body[:, left + 256 : left + 256 + GAP] == 1).all()


def test_every_pixel_stays_a_square(nodes):
    picture = torch.rand(1, 64, 64, 3)
    body = nodes.picture.side_by_side([("", picture)])[0, BAND:]
    assert torch.allclose(body, picture[0].repeat_interleave(4, 0).repeat_interleave(4, 1), atol=0.5 / 255 + 1e-6)


def test_a_batch_is_a_row_each(nodes):
    teacher, student = torch.rand(2, 3, 256, 256, 3)
    sheets = nodes.picture.side_by_side([("t", teacher), ("s", student)])
    assert len(sheets) == 3
    for k in range(3):
        alone = nodes.picture.side_by_side([("t", teacher[k : k + 1]), ("s", student[k : k + 1])])
        assert torch.equal(sheets[k : k + 1], alone)


def test_each_title_is_drawn_above_its_column(nodes):
    pictures = plain(256, 256, value=0.0)
    sheet = nodes.picture.side_by_side([("", pictures), ("student, 1 step: 0.05 s", pictures)])[0]
    assert (sheet[:BAND, : 256 + GAP] == 1).all()  # no title, no ink
    ink = (sheet[:BAND, 256 + GAP :] < 0.5).any(-1)
    assert ink.sum() > 100
    assert not ink[0].any() and not ink[-1].any() and not ink[:, -1].any()  # nothing is cut off
    other = nodes.picture.side_by_side([("", pictures), ("teacher, 20 steps", pictures)])[0]
    assert not torch.equal(sheet[:BAND], other[:BAND])


def test_the_longest_title_of_the_comparison_fits(nodes):
    title = "teacher, 100 steps, cfg 7.5: 123.45 s"
    sheet = nodes.picture.side_by_side([(title, plain(64, 64, value=0.0)), ("", plain(64, 64, value=0.0))])[0]
    assert (sheet[:BAND, 256:] == 1).all()


def test_values_out_of_range_and_half_precision_are_pictures_too(nodes):
    picture = torch.tensor([-0.5, 0.5, 1.5]).half().expand(1, 256, 256, 3)
    body = nodes.picture.side_by_side([("", picture)])[0, BAND:]
    assert body.dtype == torch.float32
    assert torch.allclose(body, torch.tensor([0.0, 0.5, 1.0]).expand_as(body), atol=1 / 255)
