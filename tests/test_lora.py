"""A LoRA on a model: on, off, merged, beside packed weights, in files."""

import pytest
import torch
from torch.utils._pytree import tree_map
from turbodistill.core.lora import FORMATS, TARGETS, LoRA, check_match
from turbodistill.core.naming import to_single_file
from turbodistill.core.student import Student

PREDICTIONS = ["eps", "v", "flow"]


def inputs(toys, denoiser, batch=2):
    return toys.picture(batch), denoiser.schedule.sigma(torch.linspace(500, 999, batch)), toys.cond(batch)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_fresh_lora_changes_nothing(toys, prediction):
    teacher = toys.conv(prediction)
    x, sigma, cond = inputs(toys, teacher)
    before = teacher(x, sigma, cond)
    student = Student(teacher, rank=4)
    assert torch.allclose(student(x, sigma, cond), before, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_with_the_lora_off_the_teacher_is_the_same_to_the_bit(toys, prediction):
    teacher = toys.conv(prediction)
    x, sigma, cond = inputs(toys, teacher)
    before = teacher(x, sigma, cond)
    student = Student(teacher, rank=4)
    toys.nudge(student.lora)
    assert not torch.allclose(student(x, sigma, cond), before, atol=1e-2)
    assert torch.equal(teacher(x, sigma, cond), before)


def test_the_lora_is_off_again_after_an_error(toys):
    student = Student(toys.conv(), rank=4)
    with pytest.raises(RuntimeError), student.switched_on():
        assert student.lora.enabled
        raise RuntimeError
    assert not student.lora.enabled


def test_release_leaves_the_backbone_clean(toys):
    teacher = toys.conv()
    names = [n for n, _ in teacher.backbone.named_parameters()]
    x, sigma, cond = inputs(toys, teacher)
    before = teacher(x, sigma, cond)
    student = Student(teacher, rank=4)
    toys.nudge(student.lora)
    assert any(m._forward_hooks for m in teacher.backbone.modules())
    student.release()
    assert not any(m._forward_hooks for m in teacher.backbone.modules())
    assert [n for n, _ in teacher.backbone.named_parameters()] == names
    assert torch.equal(student(x, sigma, cond), before)
    student.release()  # twice does no harm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_equal_the_lora_on(toys, dtype):
    # The toy has Linear, strided and plain convolutions: each kind of branch.
    teacher = toys.conv()
    teacher.backbone.to(dtype)
    x, sigma, cond = inputs(toys, teacher)
    x, cond = x.to(dtype), cond.to(dtype)
    student = Student(teacher, rank=3, alpha=6.0)
    toys.nudge(student.lora)
    time = (sigma / sigma.max()).to(dtype)
    with student.switched_on():
        on = teacher.backbone(x, time, cond.context)
    merged = student.lora.merged(teacher.backbone)
    assert all(v.dtype == dtype for v in merged.values())
    student.release()
    teacher.backbone.load_state_dict(merged, strict=False)
    off = teacher.backbone(x, time, cond.context)
    assert torch.allclose(on, off, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_weights_of_eight_bits_keep_the_lora_beside_them(toys):
    """What a small LoRA changes would be lost in their rounding."""
    teacher = toys.conv()
    student = Student(teacher, rank=2)
    toys.nudge(student.lora)
    teacher.backbone.text.to(torch.float8_e4m3fn)
    before = {k: v.clone() for k, v in teacher.backbone.state_dict().items()}
    with student.merged():
        assert all(torch.equal(v.float(), before[k].float()) for k, v in teacher.backbone.state_dict().items())
    student.release()


def test_within_merged_the_weights_carry_the_lora_and_come_back(toys):
    teacher = toys.conv()
    x, sigma, cond = inputs(toys, teacher)
    before = teacher(x, sigma, cond)
    student = Student(teacher, rank=3)
    toys.nudge(student.lora)
    on, pointers = student(x, sigma, cond), [p.data_ptr() for p in teacher.backbone.parameters()]
    with pytest.raises(KeyError, match="stop"), student.merged():
        assert torch.allclose(student(x, sigma, cond), on, atol=1e-5)
        assert torch.allclose(teacher(x, sigma, cond), on, atol=1e-5)  # no branch on top
        raise KeyError("stop")
    assert [p.data_ptr() for p in teacher.backbone.parameters()] == pointers
    assert torch.equal(teacher(x, sigma, cond), before) and torch.equal(student(x, sigma, cond), on)


def test_a_full_copy_has_nothing_to_merge(toys):
    teacher = toys.conv()
    x, sigma, cond = inputs(toys, teacher)
    student = Student(teacher, rank=0)
    with student.merged():
        assert torch.equal(student(x, sigma, cond), teacher(x, sigma, cond))


def test_the_lora_is_on_linear_and_convolution(toys):
    lora = LoRA(toys.conv().backbone, rank=2)
    assert lora.names == ["conv_in", "text", "time", "down", "conv_out"]
    shapes = {n: (tuple(b.down.shape), tuple(b.up.shape)) for n, b in zip(lora.names, lora.branches, strict=True)}
    assert shapes["text"] == ((2, 6), (8, 2))
    assert shapes["conv_in"] == ((2, 4, 3, 3), (8, 2, 1, 1))
    assert shapes["time"] == ((1, 1), (8, 1))  # no rank above the layer's own


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (2.0, 0.5), (8.0, 2.0)])
def test_alpha_over_rank_scales_the_branch(toys, alpha, scale):
    student = Student(toys.conv(), rank=4, alpha=alpha)
    toys.nudge(student.lora)
    branch = student.lora.branches[0]
    product = (branch.up.flatten(1) @ branch.down.flatten(1)).reshape(8, 4, 3, 3)
    assert torch.allclose(branch.delta(), scale * product)


def test_targets_choose_the_layers(toys):
    unet = toys.small_unet()
    count = {key: len(LoRA(unet, 2, targets=key).names) for key in TARGETS}
    assert 0 < count["attention"] < count["transformer"] < count["all"]
    attention = LoRA(unet, 2, targets="attention").names
    assert all(n.endswith(("to_q", "to_k", "to_v", "to_out.0")) for n in attention)
    assert LoRA(unet, 2, targets=r"conv_in$").names == ["conv_in"]


def in_single_file_names(unet):
    """A container of the UNet's layers under the names that hosts have them by."""
    root = torch.nn.Module()
    for name, other in to_single_file([n for n, _ in unet.named_parameters()]).items():
        if not name.endswith("weight"):
            continue
        *path, last = other.rpartition(".")[0].split(".")
        here = root
        for part in path:
            if part not in here._modules:
                here.add_module(part, torch.nn.Module())
            here = here._modules[part]
        here.add_module(last, unet.get_submodule(name.rpartition(".")[0]))
    return root


def test_targets_are_lists_that_leave_blocks_out(toys):
    unet = in_single_file_names(toys.small_unet())
    every = set(LoRA(unet, 2).names)
    attention, middle = (set(LoRA(unet, 2, targets=key).names) for key in ("attention", "middle_block"))
    assert middle and all(n.startswith("middle_block.") for n in middle)
    assert set(LoRA(unet, 2, targets="attention, middle_block").names) == attention | middle
    assert set(LoRA(unet, 2, targets="attention, not middle_block,").names) == attention - middle != attention
    assert set(LoRA(unet, 2, targets="not middle_block, not attention").names) == every - middle - attention
    assert LoRA(unet, 2, targets="").names == LoRA(unet, 2, targets="all").names


def test_a_block_s_number_ends_where_it_ends(toys):
    layers = {f"input_blocks.{k}": torch.nn.Linear(2, 2) for k in (1, 2, 10, 11)}
    network = torch.nn.Module()
    network.input_blocks = torch.nn.ModuleDict({name.rpartition(".")[2]: m for name, m in layers.items()})
    assert LoRA(network, 1, targets="input_blocks.1").names == ["input_blocks.1"]
    assert LoRA(network, 1, targets=r"blocks\.\d{2,3}").names == ["input_blocks.10", "input_blocks.11"]
    assert LoRA(network, 1, targets="input_blocks.1, not input_blocks.2").names == ["input_blocks.1"]


def test_a_unet_s_blocks_go_by_the_names_of_either_layout(toys):
    unet = toys.small_unet()
    hosted = in_single_file_names(unet)
    for theirs, ours in (("output_blocks.1", "up_blocks.0.resnets.1"), ("middle_block.1", "mid_block.attentions")):
        one, other = LoRA(unet, 2, targets=theirs), LoRA(hosted, 2, targets=theirs)
        assert one.names and all(n.startswith(ours) for n in one.names)
        assert sorted(one.file_names(unet)) == sorted(other.file_names(hosted))
        assert other.names == LoRA(hosted, 2, targets=ours).names


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ("attention, nothing", "'nothing' match no layer"),
        ("not nothing", "'nothing' match no layer"),
        ("attention, not all", "leave no layer"),
        ("output_blok.1", "'output_blok.1' match no layer: .*; the nearest is 'output_blocks.1'"),
        ("atention", "the nearest is 'attention'"),
        ("a, (b", "are no regular expression"),
    ],
)
def test_targets_that_pick_nothing_are_named(toys, targets, told):
    with pytest.raises(ValueError, match=told):
        LoRA(in_single_file_names(toys.small_unet()), 2, targets=targets)


def test_impossible_loras_are_refused(toys):
    backbone = toys.conv().backbone
    with pytest.raises(ValueError, match="rank is 0"):
        LoRA(backbone, rank=0)
    with pytest.raises(ValueError, match="'nothing' match no layer"):
        LoRA(backbone, targets="nothing")
    assert not any(m._forward_hooks for m in backbone.modules())


@pytest.mark.parametrize("style", FORMATS)
def test_a_lora_file_goes_there_and_back(toys, style):
    teacher = toys.unet()
    x, sigma, cond = inputs(toys, teacher)
    student = Student(teacher, rank=4, alpha=2.0)
    toys.nudge(student.lora)
    expected = student(x, sigma, cond)
    tensors = student.lora.export(teacher.backbone, style, torch.float32)
    student.release()
    other = Student(teacher, rank=4)
    other.lora.load(teacher.backbone, tensors)
    assert not torch.allclose(expected, teacher(x, sigma, cond), atol=1e-2)
    assert torch.allclose(other(x, sigma, cond), expected, atol=1e-4)


def test_lora_keys_are_those_the_hosts_know(toys):
    unet = toys.small_unet()
    lora = LoRA(unet, rank=2)
    kohya, comfy = lora.export(unet, "kohya"), lora.export(unet, "comfy")
    q = "transformer_blocks_0_attn1_to_q"
    for key in (f"input_blocks_1_1_{q}", f"middle_block_1_{q}", f"output_blocks_3_1_{q}", "input_blocks_0_0", "out_2"):
        for part in ("lora_down.weight", "lora_up.weight", "alpha"):
            assert f"lora_unet_{key}.{part}" in kohya
    assert "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight" in comfy
    assert len(kohya) == len(comfy) == 3 * len(lora.names)
    assert all(v.dtype == torch.float16 for v in kohya.values())


def test_lora_keys_of_outer_layers_alone_are_single_file_names_too(toys):
    # With targets that touch no block the layout must still be told, by the whole backbone.
    unet = toys.small_unet()
    assert LoRA(unet, 2, targets=r"^conv_in$").file_names(unet) == ["lora_unet_input_blocks_0_0"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: {}, "0 of 15 names match"),
        (lambda t: {"lora_te_" + k: v for k, v in t.items()}, "0 of 15 names match"),
        (lambda t: {k: v for k, v in t.items() if "conv_out" not in k}, "12 of 15 names match"),
        (lambda t: t | {"lora_unet_other.alpha": torch.ones(())}, "lora_unet_other"),
        (lambda t: {k: v for k, v in t.items() if k != "lora_unet_text.lora_up.weight"}, "14 of 15 names match"),
        (lambda t: t | {"lora_unet_other.lora_up.weight": torch.ones(1, 1)}, "lora_unet_other"),
        (lambda t: t | {"lora_unet_text.lora_down.weight": torch.ones(2, 7)}, "lora_unet_text in the file"),
    ],
    ids=["empty", "none", "some", "stray", "half", "stray half", "shape"],
)
def test_a_lora_that_does_not_fit_is_refused(toys, spoil, message):
    backbone = toys.conv().backbone
    lora = LoRA(backbone, rank=2)
    with pytest.raises(ValueError, match=message):
        lora.load(backbone, spoil(lora.export(backbone)))


def test_branches_lie_where_the_model_computes_wherever_its_weights_do(toys):
    """A host with little memory keeps weights on the CPU; the device is one that computes nothing."""

    class Elsewhere(type(toys.conv())):
        device = torch.device("meta")

    teacher = toys.conv()
    teacher.__class__ = Elsewhere
    student = Student(teacher, rank=2)
    assert {p.device.type for p in student.lora.parameters()} == {"meta"} and student.device.type == "meta"
    assert {p.device.type for p in teacher.backbone.parameters()} == {"cpu"}


class Packed(torch.Tensor):
    """A weight as hosts hold quantised ones: eight bits and a scale behind the shape and type of a float tensor."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.abs().amax() / 127
        self.packed = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        args, kwargs = tree_map(lambda v: v.packed * v.scale if isinstance(v, cls) else v, (args, kwargs or {}))
        return func(*args, **kwargs)


@pytest.fixture
def packed(toys):
    """A teacher one of whose weights is quantised."""
    teacher = toys.conv()
    layer = teacher.backbone.text
    layer.weight = torch.nn.Parameter(Packed(layer.weight.detach()), requires_grad=False)
    return teacher


def test_a_lora_stays_beside_quantised_weights(toys, packed):
    """Merged into them it would do nothing, without a word: what is set is not what they compute with."""
    x, cond, sigma = toys.picture(), toys.cond(), packed.schedule.sigma(torch.tensor([999.0, 300.0]))
    student = Student(packed, rank=2)
    with student.training():
        student(x, sigma, cond).square().mean().backward()
    assert all(b.up.grad is not None and b.up.grad.any() for b in student.lora.each())
    toys.nudge(student.lora)
    with torch.no_grad():
        expected = student(x, sigma, cond)
        assert not torch.allclose(expected, packed(x, sigma, cond), atol=1e-2)
        with student.merged():
            assert torch.equal(student(x, sigma, cond), expected)


def test_quantised_weights_are_not_copied(packed):
    with pytest.raises(ValueError, match=r"1 of the model's weights are quantised \(text\.weight\): give a rank of 1"):
        Student(packed, rank=0)


def test_weights_with_a_scale_beside_them_are_not_copied(toys):
    """As ComfyUI 0.3.64 holds scaled float8: the numbers alone are not what the layer computes with."""
    teacher = toys.conv()
    teacher.backbone.text.scale_weight = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"weights are quantised \(text\.scale_weight\)"):
        Student(teacher, rank=0)


def test_check_match_passes_equal_names_alone():
    check_match("thing", ["a", "b"], ["b", "a"])
    with pytest.raises(ValueError, match="thing: 1 of 2 names match"):
        check_match("thing", ["a"], ["b", "a"])
