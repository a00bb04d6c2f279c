"""Gradient checkpointing: the same numbers, activations computed twice, and the backbone left as it was."""

import pytest
import torch
from torch import amp, nn
from torch.nn import Linear
from torch.utils.checkpoint import CheckpointError
from turbodistill.core.gradient_checkpointing import blocks, checkpointed
from turbodistill.core.lora import LoRA

WIDTH = 6


class Block(nn.Module):
    """A block as hosts write them: adds in place to what it is given, and is told by options where it is."""

    def __init__(self):
        super().__init__()
        self.wide, self.back, self.text = Linear(WIDTH, 8 * WIDTH), Linear(8 * WIDTH, WIDTH), Linear(WIDTH, WIDTH)
        self.runs = []

    def forward(self, x, text=None, options=None):
        self.runs.append(options["index"])
        text += self.text(text.flip(1)).tanh()  # flipped is a copy, which stays for backward
        x += options["index"] * self.back(self.wide(x + text.mean(1, keepdim=True)).tanh())
        return x, text


class Backbone(nn.Module):
    """Blocks that are handed one dictionary, which is written to from block to block."""

    def __init__(self, count=3):
        super().__init__()
        self.first = Linear(WIDTH, WIDTH)
        self.double_blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x, text):
        x, text, options = self.first(x), self.first(text), {}
        for index, block in enumerate(self.double_blocks):
            options["index"] = index + 1
            x, text = block(x, text=text, options=options)
        return x


@pytest.fixture
def backbone():
    return Backbone()


@pytest.fixture
def lora(backbone, toys):
    lora = LoRA(backbone, rank=2)
    toys.nudge(lora)
    backbone.requires_grad_(False)
    return lora


@pytest.fixture
def learn(backbone, lora):
    """A pass with the LoRA on, that is off again in backward: the loss and every gradient."""
    x, text = torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)

    def run():
        lora.zero_grad()
        lora.enabled = True
        loss = backbone(x, text).square().mean()
        lora.enabled = False
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in lora.parameters())]

    return run


def test_no_number_changes(backbone, lora, learn):
    plain = learn()
    with checkpointed(backbone, [lora]):
        again = learn()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(g.any() for g in plain)


def test_a_block_runs_again_for_backward_as_it_was_told_then(backbone, lora, learn):
    with checkpointed(backbone, [lora]):
        learn()
    assert [block.runs for block in backbone.double_blocks] == [[1, 1], [2, 2], [3, 3]]


def test_a_lora_that_is_not_named_fails_loudly(backbone, lora, learn):
    with checkpointed(backbone), pytest.raises(CheckpointError):
        learn()  # off by then, it is not there the second time


def test_switches_are_put_back_after_backward(backbone, toys):
    on, off = LoRA(backbone, rank=1), LoRA(backbone, rank=1)
    toys.nudge(on)
    on.enabled = True
    with checkpointed(backbone, [on, off]):
        loss = backbone(torch.randn(1, 2, WIDTH), torch.randn(1, 2, WIDTH)).sum()
        on.enabled, off.enabled = False, True
        loss.backward()
        assert (on.enabled, off.enabled) == (False, True)


def test_without_gradients_a_block_runs_once(backbone):
    with checkpointed(backbone), torch.no_grad():
        backbone(torch.randn(1, 2, WIDTH), torch.randn(1, 2, WIDTH))
    assert [block.runs for block in backbone.double_blocks] == [[1], [2], [3]]


def test_fewer_activations_are_kept(backbone):
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    def count():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = backbone(torch.randn(1, 50, WIDTH), torch.randn(1, 50, WIDTH)).sum()
        total = sum(kept)
        loss.backward()
        return total

    plain = count()
    with checkpointed(backbone):
        assert count() < plain / 3


def test_autocast_is_the_same_the_second_time(backbone, lora, learn):
    def fast():
        with amp.autocast("cpu", torch.bfloat16):
            return learn()

    plain = fast()
    with checkpointed(backbone, [lora]):
        again = fast()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_every_forward_is_put_back_even_after_an_error(backbone):
    def own(*_args, **_kwargs):
        return None

    backbone.double_blocks[1].forward = own
    with pytest.raises(KeyError), checkpointed(backbone):
        assert all("forward" in block.__dict__ for block in backbone.double_blocks)
        raise KeyError
    assert backbone.double_blocks[1].forward is own
    assert not any("forward" in backbone.double_blocks[i].__dict__ for i in (0, 2))


def skeleton(names):
    """A module with empty submodules of these dotted names."""
    root = nn.Module()
    for name in names:
        at = root
        for part in name.split("."):
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
    return root


@pytest.mark.parametrize(
    ("names", "found"),
    [
        # The hosts' UNet: a residual block, and what is inside of the transformer beside it.
        (
            ["input_blocks.1.0.norm", "input_blocks.1.1.proj_in", "input_blocks.1.1.transformer_blocks.0.norm1"],
            ["input_blocks.1.0", "input_blocks.1.1.transformer_blocks.0"],
        ),
        (["middle_block.0.norm", "output_blocks.2.0.norm"], ["middle_block.0", "output_blocks.2.0"]),
        # diffusers'.
        (
            ["down_blocks.0.resnets.1.norm1", "mid_block.attentions.0.transformer_blocks.0.ff"],
            ["down_blocks.0.resnets.1", "mid_block.attentions.0.transformer_blocks.0"],
        ),
        (
            ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"],
            ["transformer_blocks.0", "single_transformer_blocks.0"],
        ),
        (["joint_blocks.0.x_block.attn", "joint_blocks.0.context_block.attn"], ["joint_blocks.0"]),
        (["double_blocks.0.img_attn", "single_blocks.0.linear1"], ["double_blocks.0", "single_blocks.0"]),
    ],
)
def test_blocks_are_the_innermost(names, found):
    assert list(blocks(skeleton(names))) == found


def test_an_unknown_architecture_is_refused(toys):
    with pytest.raises(
        ValueError, match="no known blocks in ConvBackbone: set gradient_checkpointing and compile to false"
    ):
        blocks(toys.conv().backbone)


def test_a_diffusers_unet_learns_the_same(toys):
    unet, sigma = toys.unet(), torch.tensor([14.6, 2.0])
    lora = LoRA(unet.backbone, rank=2)
    toys.nudge(lora)
    x, cond = torch.randn(2, 4, 16, 8), toys.cond()

    def learn():
        lora.zero_grad()
        lora.enabled = True
        loss = unet(x, sigma, cond).square().mean()
        lora.enabled = False
        loss.backward()
        return [p.grad.clone() for p in lora.parameters()]

    plain = learn()
    with checkpointed(unet.backbone, [lora]):
        again = learn()
    gaps = [(a - b).abs().max() / b.abs().max() for a, b in zip(again, plain, strict=True)]
    assert max(gaps) < 1e-5  # gradients of what many blocks share are summed up in another order
