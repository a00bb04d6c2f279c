"""Taps on blocks through which text goes beside the picture."""

import pytest
import torch
from torch import nn
from torch.nn import Linear
from turbodistill.core.denoiser import picture_part
from turbodistill.core.features import TeacherFeatures, as_picture
from turbodistill.core.vision import vision_taps

TEXT, CHANNELS = 3, 4  # tokens of toys.cond, channels of toys.picture


class Joint(nn.Module):
    """A block of two streams; `text_first` is the order in which it gives them back."""

    def __init__(self, text_first):
        super().__init__()
        self.layer, self.text_first = Linear(CHANNELS, CHANNELS), text_first

    def forward(self, text, picture):
        picture = picture + self.layer(picture).tanh() + text.mean(1, keepdim=True)
        return (text, picture) if self.text_first else (picture, text)


class Single(nn.Module):
    """A block of one sequence, to which it adds in place."""

    def __init__(self):
        super().__init__()
        self.layer = Linear(CHANNELS, CHANNELS)

    def forward(self, tokens):
        tokens += self.layer(tokens.mean(1, keepdim=True)).tanh()
        return tokens


class Transformer(nn.Module):
    """Two blocks of two streams by a host's name, two of one sequence, as Flux."""

    def __init__(self, kind):
        super().__init__()
        self.kind, first = kind, kind != "double_blocks"
        self.text_in = Linear(6, CHANNELS)
        self.add_module(kind, nn.ModuleList(Joint(first) for _ in range(2)))
        self.single_blocks = nn.ModuleList(Single() for _ in range(2))

    def forward(self, x, time, context):
        text, picture = self.text_in(context), x.flatten(2).transpose(1, 2)
        for block in getattr(self, self.kind):
            one, other = block(text, picture)
            text, picture = (one, other) if block.text_first else (other, one)
        tokens = torch.cat([text, picture], 1)
        for block in self.single_blocks:
            tokens = block(tokens)
        return tokens[:, TEXT:].transpose(1, 2).reshape(x.shape)


@pytest.fixture(params=["joint_blocks", "double_blocks", "transformer_blocks"])
def teacher(request, toys):
    return toys.Toy(Transformer(request.param), toys.conv("flow").schedule, "flow")


def test_the_default_taps_are_of_the_picture(teacher, toys):
    x, sigma, cond = toys.picture(), torch.full((2,), 0.5), toys.cond()
    features = TeacherFeatures(teacher)
    assert features.taps == [f"{teacher.backbone.kind}.{i}" for i in range(2)]
    maps = features(x, sigma, cond)
    first = getattr(teacher.backbone, teacher.backbone.kind)[0]
    tokens = first(teacher.backbone.text_in(cond.context), x.flatten(2).transpose(1, 2))[int(first.text_first)]
    assert torch.equal(maps[0], tokens.transpose(1, 2).reshape(2, CHANNELS, 8, 8))


def test_the_text_in_one_sequence_is_left_out(teacher, toys):
    x, sigma, cond = toys.picture(), torch.full((2,), 0.5), toys.cond()
    (last,) = TeacherFeatures(teacher, ["single_blocks.1"])(x, sigma, cond)
    assert torch.allclose(last, teacher.output(x, sigma, cond), atol=1e-5)


def test_a_block_that_adds_in_place_leaves_the_tap_before_as_it_was(teacher, toys):
    x, sigma, cond = toys.picture(), torch.full((2,), 0.5), toys.cond()
    taps = ["single_blocks.0", "single_blocks.1"]
    both = TeacherFeatures(teacher, taps)(x, sigma, cond)
    (alone,) = TeacherFeatures(teacher, taps[:1])(x, sigma, cond)
    assert torch.equal(both[0], alone) and not torch.allclose(both[0], both[1])


@pytest.mark.parametrize("tap", ["single_blocks.0", "single_transformer_blocks.0"])
def test_one_sequence_may_come_apart(tap):
    text, picture = torch.zeros(1, 2, 4), torch.ones(1, 6, 4)
    assert torch.equal(picture_part(tap, torch.cat([text, picture], 1), 2), picture)
    assert torch.equal(picture_part("single_transformer_blocks.0", (text, picture), 2), picture)
    assert torch.equal(picture_part("input_blocks.1.1", (picture, text), 2), picture)


@pytest.mark.parametrize(("height", "width", "patch"), [(13, 9, 2), (7, 5, 2), (9, 8, 4)])
def test_a_last_patch_may_lie_over_the_edge(height, width, patch):
    rows, columns = -(-height // patch), -(-width // patch)
    maps = torch.randn(2, 5, rows, columns)
    assert torch.equal(as_picture(maps.flatten(2).transpose(1, 2), torch.zeros(2, 4, height, width)), maps)


@pytest.mark.parametrize("tokens", [77, 64 + 77, 63])
def test_tokens_with_text_among_them_are_no_picture(tokens):
    with pytest.raises(ValueError, match=f"{tokens} tokens do not tile"):
        as_picture(torch.zeros(1, tokens, 3), torch.zeros(1, 16, 16, 16))


@pytest.mark.parametrize(
    ("blocks", "tapped"),
    [(12, [2, 4, 6, 8]), (24, [5, 9, 13, 17]), (8, [1, 2, 3, 5]), (7, [0, 2, 4, 6]), (4, [1, 3]), (1, [0])],
)
def test_taps_of_a_vision_transformer(blocks, tapped):
    network = nn.Module()
    network.layer = nn.ModuleList(Linear(2, 2) for _ in range(blocks))
    assert vision_taps(network) == [f"layer.{i}" for i in tapped]


def test_a_network_without_blocks_has_no_taps():
    with pytest.raises(ValueError, match="no known blocks in Linear: give a vision transformer"):
        vision_taps(Linear(2, 2))
