"""The teacher's features, and the heads upon them."""

import pytest
import torch
from torch import nn
from torch.nn import Linear
from turbodistill.core.discriminator import Discriminator, noise_embedding
from turbodistill.core.features import TeacherFeatures, as_picture, default_taps
from turbodistill.core.student import Student

TAPS = ["conv_in", "down"]


# --- Features ---


def test_taps_give_the_teacher_s_maps(toys):
    teacher, x, sigma, cond = toys.conv(), toys.picture(), torch.ones(2), toys.cond()
    maps = TeacherFeatures(teacher, TAPS)(x, sigma, cond)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 8), (2, 8, 4, 4)]
    scaled = x / 2**0.5  # alpha at sigma 1
    assert torch.allclose(maps[0], teacher.backbone.conv_in(scaled), atol=1e-6)


def test_the_order_of_taps_is_kept(toys):
    teacher, x, sigma, cond = toys.conv(), toys.picture(), torch.ones(2), toys.cond()
    there = TeacherFeatures(teacher, TAPS)(x, sigma, cond)
    back = TeacherFeatures(teacher, TAPS[::-1])(x, sigma, cond)
    assert all(torch.equal(a, b) for a, b in zip(there, back[::-1], strict=True))


def test_the_pass_ends_at_the_last_tap(toys):
    teacher, ran = toys.conv(), []
    teacher.backbone.conv_out.register_forward_hook(lambda *_: ran.append("conv_out"))
    TeacherFeatures(teacher, TAPS)(toys.picture(), torch.ones(2), toys.cond())
    assert ran == []


def test_taps_leave_no_hook_even_after_an_error(toys):
    teacher = toys.conv()
    features = TeacherFeatures(teacher, TAPS)
    features(toys.picture(), torch.ones(2), toys.cond())
    with pytest.raises(RuntimeError):
        features(torch.zeros(2, 3, 8, 8), torch.ones(2), toys.cond())  # three channels do not go in
    assert not any(m._forward_hooks for m in teacher.backbone.modules())


@pytest.mark.parametrize("rank", [0, 4])
def test_gradients_pass_the_frozen_teacher_to_the_student_and_stop_there(toys, rank):
    # The mistake that makes every ADD trainer blur: no gradient through the feature network.
    student = Student(toys.conv(), rank=rank)
    if rank:
        toys.nudge(student.lora)
    features = TeacherFeatures(student.teacher, TAPS)
    discriminator = Discriminator([8, 8], text=6, width=8)
    sigma, cond = torch.full((2,), 3.0), toys.cond()
    with student.training():
        x0 = student(toys.picture() * 14.6, torch.full((2,), 14.6), cond)
        x0.retain_grad()
        maps = features(student.schedule.add_noise(x0, toys.picture(), sigma), sigma, cond)
        logits = discriminator(discriminator.standardise(maps), sigma, cond.summary)
        torch.cat(logits, 1).mean().backward()
    assert x0.grad.abs().sum() > 0
    assert all(p.grad is None for p in student.teacher.backbone.parameters())
    reached = [p for p in student.trained.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) == len(list(student.trained.parameters()))


def test_features_are_the_teacher_s_whatever_the_lora(toys):
    student, x, sigma, cond = Student(toys.conv(), rank=4), toys.picture(), torch.ones(2), toys.cond()
    features = TeacherFeatures(student.teacher, TAPS)
    before = features(x, sigma, cond)
    toys.nudge(student.lora)
    assert all(torch.equal(a, b) for a, b in zip(features(x, sigma, cond), before, strict=True))


def test_taps_that_do_not_exist_or_never_fire_are_told(toys):
    teacher = toys.conv()
    with pytest.raises(ValueError, match=r"taps \['middle'\] are no modules of ConvBackbone: leave .*\(conv_in, .*\)$"):
        TeacherFeatures(teacher, ["conv_in", "middle"])
    with pytest.raises(ValueError, match=r"; the nearest is 'conv_in'$"):
        TeacherFeatures(teacher, ["conv.in"])
    teacher.backbone.unused = Linear(1, 1)
    with pytest.raises(ValueError, match=r"taps \['unused'\] never fire"):
        TeacherFeatures(teacher, ["conv_in", "unused"])(toys.picture(), torch.ones(2), toys.cond())


def test_default_taps_of_a_diffusers_unet(toys):
    unet = toys.unet()
    taps = default_taps(unet.backbone)
    assert [t.rpartition(".")[0].rpartition(".")[0] for t in taps] == ["down_blocks.0", "down_blocks.1", "mid_block"]
    maps = TeacherFeatures(unet)(toys.picture(), torch.ones(2), toys.cond())
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 8), (2, 16, 4, 4), (2, 16, 4, 4)]


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


def test_default_taps_of_the_hosts_unet():
    # As of Stable Diffusion 1: four sizes of two blocks each, the first three attend, between them a downsampling.
    inside = {0: ["0"], **{i: ["0", "1"] for i in (1, 2, 4, 5, 7, 8)}, **{i: ["0.op"] for i in (3, 6, 9)}}
    inputs = [f"input_blocks.{i}.{part}" for i in range(12) for part in inside.get(i, ["0"])]
    names = [*inputs, *(f"middle_block.{i}" for i in range(3)), *(f"output_blocks.{i}.0" for i in range(12))]
    taps = default_taps(skeleton(names))
    # The last residual block of each size, as in diffusers' layout; the middle is the last; no decoder.
    assert taps == ["input_blocks.2.0", "input_blocks.5.0", "input_blocks.8.0", "input_blocks.11.0", "middle_block.2"]


@pytest.mark.parametrize("blocks", ["joint_blocks", "double_blocks", "transformer_blocks", "blocks", "layers"])
def test_default_taps_of_transformers(blocks):
    assert default_taps(skeleton(f"{blocks}.{i}.attn.qkv" for i in range(3))) == [f"{blocks}.{i}" for i in range(3)]
    taps = default_taps(skeleton(f"{blocks}.{i}.attn.qkv" for i in range(24)))
    assert len(taps) == len(set(taps)) == 5 and taps[-1] == f"{blocks}.23"


def test_an_unknown_architecture_asks_for_taps(toys):
    with pytest.raises(ValueError, match="no known blocks in ConvBackbone: name the modules to tap"):
        default_taps(toys.conv().backbone)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 16), (12, 8), (6, 2)])
@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_become_pictures_of_the_latent_s_aspect(height, width, patch):
    rows, columns = height // patch, width // patch
    maps = torch.randn(2, 5, rows, columns)
    tokens = maps.flatten(2).transpose(1, 2)  # (B, N, C), row by row
    assert torch.equal(as_picture(tokens, torch.zeros(2, 4, height, width)), maps)
    assert as_picture(maps, torch.zeros(2, 4, height, width)) is maps


def test_tokens_that_tile_no_picture_are_refused():
    with pytest.raises(ValueError, match="7 tokens do not tile a picture of 8 x 8"):
        as_picture(torch.zeros(1, 7, 3), torch.zeros(1, 4, 8, 8))


def test_token_features_of_a_transformer_are_tapped_as_pictures(toys):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(4, 4)

        def forward(self, tokens, context):
            return self.layer(tokens), context  # as the hosts' joint blocks: a tuple

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x, time, context):
            tokens = x.flatten(2).transpose(1, 2)
            for block in self.blocks:
                tokens, context = block(tokens, context)
            return tokens.transpose(1, 2).reshape(x.shape)

    teacher = toys.Toy(Transformer(), toys.conv("flow").schedule, "flow")
    x = torch.randn(2, 4, 2, 6)
    maps = TeacherFeatures(teacher)(x, torch.full((2,), 0.5), toys.cond())
    assert [tuple(m.shape) for m in maps] == [(2, 4, 2, 6)] * 2
    expected = teacher.backbone.blocks[0].layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(maps[0], expected, atol=1e-6)


# --- Heads ---


def test_one_logit_a_position_from_each_head():
    logits = Discriminator([3, 5], text=6, width=8)(
        [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 2)], torch.ones(2), torch.randn(2, 6)
    )
    assert [tuple(x.shape) for x in logits] == [(2, 64), (2, 8)]


@pytest.mark.parametrize("changed", ["text", "sigma", "image", "features"])
def test_each_condition_changes_every_head(changed):
    discriminator = Discriminator([3, 5], text=6, image=4, width=8)
    given = {
        "features": [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)],
        "sigma": torch.tensor([0.5, 2.0]),
        "text": torch.randn(2, 6),
        "image": torch.randn(2, 4),
    }
    other = {
        "features": [-f for f in given["features"]],
        "sigma": given["sigma"] * 3,
        "text": torch.randn(2, 6),
        "image": torch.randn(2, 4),
    }
    before = discriminator(*given.values())
    after = discriminator(*(given | {changed: other[changed]}).values())
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(before, after, strict=True))


def test_a_row_is_judged_by_its_own_condition():
    discriminator = Discriminator([3], text=6, width=8).eval()
    maps, sigma, text = torch.randn(2, 3, 4, 4), torch.tensor([0.5, 2.0]), torch.randn(2, 6)
    both = discriminator([maps], sigma, text)[0]
    for k in range(2):
        one = discriminator([maps[k : k + 1]], sigma[k : k + 1], text[k : k + 1])[0]
        assert torch.allclose(one[0], both[k], atol=1e-5)


def test_no_image_is_a_zero_image():
    discriminator = Discriminator([3], text=6, image=4, width=8).eval()
    given = [torch.randn(2, 3, 4, 4)], torch.ones(2), torch.randn(2, 6)
    assert torch.equal(discriminator(*given)[0], discriminator(*given, torch.zeros(2, 4))[0])


def test_heads_are_independent():
    discriminator = Discriminator([3, 3], text=6, width=8)
    inputs = [torch.randn(1, 3, 2, 2, requires_grad=True) for _ in range(2)]
    logits = discriminator(inputs, torch.ones(1), torch.randn(1, 6))
    first, second = torch.autograd.grad(logits[0].sum(), inputs, allow_unused=True)
    assert first.abs().sum() > 0 and second is None


def test_calibration_makes_features_standard_once():
    discriminator = Discriminator([3, 5], text=6, width=8)
    maps = [torch.randn(16, 3, 4, 4) * 50 + 7, torch.randn(16, 5, 2, 2) * 1e-2 - 3]
    assert torch.equal(discriminator.standardise(maps)[0], maps[0])  # before: as they are
    discriminator.calibrate(maps)
    for x in discriminator.standardise(maps):
        assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(x.shape[1]), atol=1e-3)
        assert torch.allclose(x.std((0, 2, 3)), torch.ones(x.shape[1]), atol=1e-3)
    before = discriminator.standardise(maps)[0]
    discriminator.calibrate([m * 9 for m in maps])  # a second batch moves nothing
    assert torch.equal(discriminator.standardise(maps)[0], before)


def test_calibration_by_one_value_leaves_the_spread_alone():
    discriminator = Discriminator([4], 3)
    discriminator.calibrate([torch.randn(1, 4, 1, 1)])
    assert torch.equal(discriminator.std_0, torch.ones(4))
    assert all(f.isfinite().all() for f in discriminator.standardise([torch.randn(2, 4, 1, 1)]))


def test_calibration_is_saved_with_the_heads():
    discriminator, other = (Discriminator([3], text=6, width=8) for _ in range(2))
    maps = [torch.randn(4, 3, 4, 4) * 5]
    discriminator.calibrate(maps)
    other.load_state_dict(discriminator.state_dict())
    assert bool(other.calibrated) and torch.equal(other.standardise(maps)[0], discriminator.standardise(maps)[0])


def test_a_dead_channel_stays_finite():
    discriminator = Discriminator([1], text=6, width=8)
    discriminator.calibrate([torch.full((2, 1, 2, 2), 3.0)])
    assert torch.isfinite(discriminator.standardise([torch.full((2, 1, 2, 2), 3.1)])[0]).all()


def test_noise_levels_are_told_apart_over_the_whole_range():
    levels = torch.tensor([0.0, 1e-3, 0.03, 0.7, 1.6, 4.1, 14.6, 4518.0])
    embedded = noise_embedding(levels)
    assert embedded.shape == (8, 32) and torch.isfinite(embedded).all()
    assert (torch.cdist(embedded, embedded) + 10 * torch.eye(8)).min() > 0.3
