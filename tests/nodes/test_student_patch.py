"""A student file on a MODEL: which weights change and by how much, and what does not fit, in words."""

import logging

import pytest
import torch
from torch.nn import Conv2d
from turbodistill.core.card import CardError, fingerprint, read_student
from turbodistill.core.families import of_card

PREFIX = "diffusion_model."


@pytest.fixture
def teacher(toys):
    return toys.conv("v")


def weights_of(model):
    """The MODEL's weights within a run, by the backbone's names."""
    with model.loaded() as network:
        return {k: v.clone() for k, v in network.diffusion_model.state_dict().items()}


def same(a, b, atol=1e-5):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=atol) for k in a)


def said_of(strength):
    if strength == 1:
        return ""
    return f"the weight of file is {strength:g}: it was trained at 1, another blurs or burns the picture."


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_a_lora_patches_every_layer(nodes, teacher, model_of, student_of, saved, strength):
    student = student_of(teacher, alpha=8.0)
    tensors, card = read_student(saved(student))
    model = model_of(teacher)
    base = weights_of(model)
    patched, warning = nodes.patcher.with_student(model, tensors, card, strength, "file")
    layers = {k for k in base if k.endswith("weight")}
    assert patched.patches.keys() == {PREFIX + k for k in layers}
    assert warning == said_of(strength)
    merged = base | student.lora.merged(teacher.backbone)
    assert same(weights_of(patched), {k: torch.lerp(base[k], merged[k], strength) for k in base})
    assert same(weights_of(model), base, 0) and model.patches == model.attachments == {}


def test_a_lora_of_some_layers_patches_those(nodes, teacher, model_of, student_of, saved):
    tensors, card = read_student(saved(student_of(teacher, targets="conv_in|text")))
    patched, _ = nodes.patcher.with_student(model_of(teacher), tensors, card, 1.0, "file")
    assert patched.patches.keys() == {f"{PREFIX}conv_in.weight", f"{PREFIX}text.weight"}


def test_a_lora_in_comfyui_s_own_names_fits_too(nodes, teacher, model_of, student_of, saved):
    student = student_of(teacher)
    _, card = read_student(saved(student))
    patched, _ = nodes.patcher.with_student(
        model_of(teacher), student.lora.export(teacher.backbone, "comfy", torch.float32), card, 1.0, "file"
    )
    assert same(weights_of(patched), weights_of(model_of(teacher)) | student.lora.merged(teacher.backbone))


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_a_full_student_replaces_every_weight(nodes, teacher, model_of, student_of, saved, strength):
    student = student_of(teacher, rank=0)
    tensors, card = read_student(saved(student))
    model = model_of(teacher)
    base, full = weights_of(model), student.backbone.state_dict()
    patched, warning = nodes.patcher.with_student(model, tensors, card, strength, "file")
    assert patched.patches.keys() == {PREFIX + k for k in base}
    assert warning == said_of(strength)
    assert same(weights_of(patched), {k: torch.lerp(base[k], full[k], strength) for k in base})
    assert same(weights_of(model), base, 0) and model.patches == {}


@pytest.mark.parametrize(("prediction", "output"), [("eps", "inherit"), ("v", "x0"), ("flow", "inherit")])
def test_it_is_sampled_as_its_card_says(nodes, toys, model_of, student_of, saved, prediction, output):
    teacher = toys.conv(prediction)
    student = student_of(teacher, prediction=output, start_timestep=899)
    tensors, card = read_student(saved(student))
    patched, _ = nodes.patcher.with_student(model_of(teacher), tensors, card, 1.0, "file")
    assert nodes.patcher.sampling_of(patched) == of_card(card)
    assert nodes.patcher.sampling_of(patched).timesteps(1) == [899]
    x, out, sigma = toys.picture(), toys.picture(), teacher.schedule.sigma(torch.tensor([899.0, 300.0]))
    x0 = patched.get_model_object("model_sampling").calculate_denoised(sigma, out, x)
    assert torch.allclose(x0, teacher.schedule.to_x0(student.prediction, x, out, sigma), atol=1e-5)


# --- what does not fit ---


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
@pytest.mark.parametrize(("made_for", "connected"), [("v", "eps"), ("eps", "flow"), ("flow", "v")])
def test_a_base_of_another_prediction_is_refused(nodes, toys, model_of, student_of, saved, rank, made_for, connected):
    tensors, card = read_student(saved(student_of(toys.conv(made_for), rank)))
    advice = "it is the right file, read wrongly" if "flow" not in (made_for, connected) else "load toy"
    with pytest.raises(CardError, match=f"file was made for .* predicts {made_for}, .* predicts {connected}: {advice}"):
        nodes.patcher.with_student(model_of(toys.conv(connected)), tensors, card, 1.0, "file")


class Other(torch.nn.Module):
    """A backbone that shares no name with the toys'."""

    def __init__(self):
        super().__init__()
        self.first = Conv2d(4, 8, 3, padding=1)


@pytest.fixture
def misfit(toys, teacher, student_of, saved):
    """Rank and what is wrong -> tensors and card that do not fit `teacher`."""

    def build(rank, wrong):
        source = toys.Toy(toys.ConvBackbone(width=12), teacher.schedule, "v") if wrong == "width" else teacher
        if wrong == "architecture":
            source = toys.Toy(Other(), teacher.schedule, "v")
        tensors, card = read_student(saved(student_of(source, rank)))
        if wrong == "an unknown layer":
            name = "lora_unet_mystery" if rank else "model.diffusion_model.mystery"
            one = next(k for k in tensors if k.endswith("lora_up.weight")) if rank else next(iter(tensors))
            parts = ("lora_up.weight", "lora_down.weight", "alpha") if rank else ("weight",)
            layer = one.removesuffix(".lora_up.weight") if rank else one.removesuffix(".weight")
            tensors |= {f"{name}.{p}": tensors.get(f"{layer}.{p}", tensors[one]) for p in parts}
        return tensors, card

    return build


@pytest.mark.parametrize(
    ("rank", "wrong", "words"),
    [
        (4, "architecture", "0 of its 1 layers are in this model"),
        (4, "an unknown layer", "5 of its 6 layers .*lora_unet_mystery"),
        (4, "width", r"is for a layer of shape \(12, .*here it is \(8, "),
        (0, "architecture", "0 of 10 names match"),
        (0, "an unknown layer", "10 of 10 names match; 1 in the file are unknown .*mystery"),
        (0, "width", r"has shape \(12,.*here it is \(8,"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(nodes, teacher, model_of, misfit, rank, wrong, words):
    tensors, card = misfit(rank, wrong)
    model = model_of(teacher)
    with pytest.raises(CardError, match=f"^file does not fit the connected model: .*{words}") as error:
        nodes.patcher.with_student(model, tensors, card, 1.0, "file")
    assert str(error.value).endswith("Its base is toy.")
    assert model.patches == {}


def test_a_full_student_with_a_missing_weight_is_refused(nodes, teacher, model_of, student_of, saved):
    tensors, card = read_student(saved(student_of(teacher, rank=0)))
    del tensors["model.diffusion_model.time.bias"]
    with pytest.raises(CardError, match=r"1 are missing .*time\.bias"):
        nodes.patcher.with_student(model_of(teacher), tensors, card, 1.0, "file")


def test_a_lora_of_a_diffusers_transformer_fits_parts_of_weights(nodes, teacher, model_of, monkeypatch):
    """ComfyUI holds query, key and value as one weight, and some others the other way round."""
    import comfy.lora

    width, text = teacher.backbone.text.weight.shape
    table = {
        "transformer.to_q": (f"{PREFIX}text.weight", (0, 0, width // 2)),
        "transformer.proj": (f"{PREFIX}time.weight", None, torch.flip),
    }
    monkeypatch.setattr(comfy.lora, "model_lora_keys_unet", lambda _model, _table: table)
    shapes = {
        "transformer.to_q.lora_A.weight": (4, text),
        "transformer.to_q.lora_B.weight": (width // 2, 4),
        "transformer.proj.lora_A.weight": (1, 1),
        "transformer.proj.lora_B.weight": (width, 1),
    }
    nodes.patcher._check_lora(model_of(teacher), shapes)
    with pytest.raises(
        ValueError, match=rf"to_q is for a layer of shape \({width}, {text}\), here it is \({width // 2}, "
    ):
        nodes.patcher._check_lora(model_of(teacher), shapes | {"transformer.to_q.lora_B.weight": (width, 4)})
    with pytest.raises(ValueError, match="3 of 4 names match"):
        nodes.patcher._check_lora(model_of(teacher), {k: v for k, v in shapes.items() if "proj.lora_B" not in k})


@pytest.mark.parametrize("wrong", ["no layer at all", "half a layer", "a tensor of no layer"])
def test_a_lora_is_complete_or_refused(nodes, teacher, model_of, student_of, saved, wrong):
    tensors, card = read_student(saved(student_of(teacher)))
    if wrong == "no layer at all":
        tensors = {}
    elif wrong == "half a layer":
        del tensors["lora_unet_conv_in.lora_down.weight"]
    else:
        tensors["mystery"] = torch.zeros(1)
    with pytest.raises(CardError, match="does not fit"):
        nodes.patcher.with_student(model_of(teacher), tensors, card, 1.0, "file")


# --- another base ---


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_another_base_of_the_same_architecture_is_warned_of(nodes, toys, model_of, student_of, saved, caplog, rank):
    made_for, connected = toys.conv("v"), toys.conv("v", seed=1)
    tensors, card = read_student(saved(student_of(made_for, rank)))
    with caplog.at_level(logging.WARNING, nodes.patcher.__name__):
        patched, warning = nodes.patcher.with_student(model_of(connected), tensors, card, 1.0, "file")
    assert "file was made for toy" in warning and "pictures may suffer" in warning
    assert card.base_hash in warning and fingerprint(connected.backbone) in warning
    assert [r.getMessage() for r in caplog.records] == [warning]
    assert patched.patches  # and it is used all the same


def test_a_base_in_half_precision_is_the_same_base(nodes, teacher, model_of, student_of, saved):
    tensors, card = read_student(saved(student_of(teacher)))
    teacher.backbone.half()
    assert nodes.patcher.with_student(model_of(teacher), tensors, card, 1.0, "file")[1] == ""


def test_the_base_is_known_by_its_weights_before_any_patch(nodes, teacher, model_of, student_of, saved):
    tensors, card = read_student(saved(student_of(teacher)))
    styled = model_of(teacher).clone()
    styled.add_patches({PREFIX + k: (torch.randn_like(v),) for k, v in teacher.backbone.state_dict().items()})
    before = {k: v.clone() for k, v in teacher.backbone.state_dict().items()}
    assert nodes.patcher.with_student(styled, tensors, card, 1.0, "file")[1] == ""
    with styled.loaded() as network:  # as between two runs: the patches are in the weights
        assert not same(network.diffusion_model.state_dict(), before, 0.1)
        assert same(nodes.patcher.base_weights(styled), before, 0)
        patched, warning = nodes.patcher.with_student(styled, tensors, card, 1.0, "file")
    assert warning == ""
    assert [len(v) for v in patched.patches.values()] == [2 if k.endswith("weight") else 1 for k in patched.patches]


def test_the_base_s_weights_have_single_file_names(nodes, teacher, model_of):
    found = nodes.patcher.base_weights(model_of(teacher))
    assert found.keys() == teacher.backbone.state_dict().keys()  # and the schedule's buffers are none of them
    assert fingerprint(found) == fingerprint(teacher.backbone)


@pytest.mark.parametrize(("kind", "called"), [("SDXL", "SDXL"), ("Lumina2", "Lumina2")])
def test_a_model_is_called_by_its_kind_where_its_weights_do_not_tell(nodes, comfyui, toys, model_of, kind, called):
    """ComfyUI's descriptions of models answer None to whatever they are asked."""
    model = model_of(toys.conv("eps"))
    plain = type(kind, (), {"__getattr__": lambda self, name: None})
    model.model.model_config = plain()
    assert nodes.patcher.architecture(model) == called
    assert nodes.patcher.title(model) == "BaseModel"


# --- quantised weights ---


class NvFp4(torch.nn.Linear):
    """ComfyUI 0.33's layer of four bits: its parameter has the true shape, its state dict the packed parts."""

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        rows, columns = self.weight.shape
        parts = {
            "weight": torch.zeros(rows, columns // 2, dtype=torch.uint8),
            "weight_scale": torch.ones(rows, -(-columns // 16)).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(1.0),
            "comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8),
            "bias": self.bias,
        }
        destination.update({prefix + name: part for name, part in parts.items() if part is not None})
        return destination


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_a_student_fits_quantised_weights_by_their_true_shapes(nodes, teacher, model_of, student_of, saved, rank):
    tensors, card = read_student(saved(student_of(teacher, rank)))
    teacher.backbone.text.__class__ = NvFp4
    model = model_of(teacher)
    assert model.model_state_dict(PREFIX)[f"{PREFIX}text.weight"].shape[1] == teacher.backbone.text.in_features // 2
    patched, _ = nodes.patcher.with_student(model, tensors, card, 1.0, "file")
    assert f"{PREFIX}text.weight" in patched.patches
    assert not any("scale" in name or "quant" in name for name in patched.patches)
    teacher.backbone.text.weight = torch.nn.Parameter(torch.zeros(8, 12))  # and a wrong shape is still told
    with pytest.raises(CardError, match=r"\(8, 6\).*here it is \(8, 12\)"):
        nodes.patcher.with_student(model_of(teacher), tensors, card, 1.0, "file")


def test_a_student_that_does_not_fit_is_not_read(nodes, toys, teacher, model_of, student_of, saved, monkeypatch):
    path = saved(student_of(teacher))
    monkeypatch.setattr(nodes.load, "student_path", lambda choice: path)
    monkeypatch.setattr(nodes.load, "read_student", lambda path: pytest.fail("all of it was read"))
    for other in (toys.conv("eps"), toys.Toy(toys.ConvBackbone(width=12), teacher.schedule, "v")):
        with pytest.raises(CardError, match=r"was made for|does not fit"):
            nodes.load.LoadStudent.run(model=model_of(other), student="student.safetensors", strength=1.0)
