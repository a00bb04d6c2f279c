"""LoRA files in each program's names: loaded by diffusers with no key left over, and by our own loader."""

import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from turbodistill.core.card import read_card
from turbodistill.core.low_rank import Change
from turbodistill.generate.export import transformers
from turbodistill.generate.export.lora_files import in_range
from turbodistill.generate.export.tensors import ExportError

STYLES = ["kohya", "comfy", "peft"]


@pytest.fixture(scope="module")
def student(base, tmp_path_factory):
    return base.student(tmp_path_factory.mktemp("students") / f"{base.kind}.safetensors")


@pytest.mark.parametrize("style", STYLES)
def test_a_lora_in_each_style_is_the_student(kit, base, student, tmp_path, style):
    expected, out = base.picture(student), tmp_path / "lora.safetensors"
    kit.export(student, style, out)
    assert kit.gap(base.picture(out), expected) < 2e-3 < 0.1 < kit.gap(base.through(base.pipe), expected)
    kit.export(student, style, out, dtype="float32", force=True)
    assert kit.gap(base.picture(out), expected) < 1e-4


@pytest.mark.parametrize("style", STYLES)
def test_a_base_changes_nothing_where_the_names_tell_enough(kit, base, student, tmp_path, style):
    kit.export(student, style, tmp_path / "without.safetensors")
    kit.export(student, style, tmp_path / "with.safetensors", base=base.folder)
    assert (tmp_path / "without.safetensors").read_bytes() == (tmp_path / "with.safetensors").read_bytes()


@pytest.mark.parametrize("style", ["kohya", "peft"])
@pytest.mark.parametrize("targets", ["all", "attention"])
def test_diffusers_loads_it_with_no_key_left_over(kit, base, peft, tmp_path, caplog, style, targets):
    student = base.student(tmp_path / "student.safetensors", targets=targets)
    kit.export(student, style, tmp_path / "lora.safetensors", dtype="float32")
    with caplog.at_level(logging.WARNING):
        base.pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
    try:
        assert not [r.message for r in caplog.records if "unexpected keys" in r.message or "missing keys" in r.message]
        loaded = {n for n, _ in base.pipe.unet.named_parameters() if ".lora_" in n}
        assert len(loaded) == 2 * sum(k.endswith("lora_down.weight") for k in load_file(student))
        found = base.through(base.pipe)
    finally:
        base.pipe.unload_lora_weights()
    assert kit.gap(found, base.picture(student)) < 1e-4


def changes(tensors):
    """What a LoRA file of any style changes of each layer's weight, as (out, in)."""
    found = {}
    for key, up in tensors.items():
        for second, first in (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")):
            if key.endswith(second):
                name = key.removesuffix(second)
                scale = float(tensors.get(f"{name}alpha", up.shape[1])) / up.shape[1]
                found[name] = scale * up.flatten(1) @ tensors[name + first].flatten(1)
    return found


@pytest.mark.parametrize("targets", ["all", "attention"])
@pytest.mark.parametrize("written", ["diffusers", "peft-unet"])
def test_a_student_in_diffusers_names_is_exported_as_one_in_single_file_names(kit, base, tmp_path, written, targets):
    """Without a base: a UNet's names tell enough."""
    for style in ("kohya", written):
        torch.manual_seed(5)
        base.student(tmp_path / f"{style}.safetensors", torch.float32, targets=targets, style=style)
    for to in STYLES:
        found = []
        for style in ("kohya", written):
            options = {"force": True, "dtype": "float32"}
            kit.export(tmp_path / f"{style}.safetensors", to, tmp_path / "out.safetensors", **options)
            found.append(changes(load_file(tmp_path / "out.safetensors")))
        assert found[0].keys() == found[1].keys()
        assert all(torch.allclose(found[0][k], found[1][k], atol=1e-6) for k in found[0])


def test_a_file_of_another_style_is_a_student_too(kit, base, student, tmp_path):
    """Each style's file is exported to the others, by its base."""
    for style in STYLES:
        kit.export(student, style, tmp_path / f"{style}.safetensors", dtype="float32")
    for style in STYLES:
        out = tmp_path / f"{style}-again.safetensors"
        kit.export(tmp_path / f"{style}.safetensors", "kohya", out, base=base.folder, dtype="float32")
        assert kit.gap(base.picture(out), base.picture(student)) < 1e-4


def test_the_card_and_fields_for_others_are_in_the_metadata(kit, base, student, tmp_path):
    for style in STYLES:
        out = tmp_path / f"{style}.safetensors"
        kit.export(student, style, out)
        card, own = read_card(out), read_card(student)
        assert (card.base_hash, card.timesteps, card.kind) == (own.base_hash, own.timesteps, "lora")
        with safe_open(out, "pt") as file:
            assert file.metadata()["modelspec.architecture"] == own.architecture + "/lora"


def test_names_are_those_each_program_knows(kit, make, tmp_path):
    block = "transformer_blocks_0_attn1_to_q.lora_down.weight"
    expected = {
        ("sd1", "kohya"): f"lora_unet_down_blocks_0_attentions_0_{block}",
        ("sd2", "kohya"): f"lora_unet_down_blocks_0_attentions_0_{block}",
        ("sdxl", "kohya"): f"lora_unet_input_blocks_4_1_{block}",
        ("sd1", "comfy"): "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight",
        ("sdxl", "peft"): "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
    }
    for (kind, style), name in expected.items():
        student = make(kind).student(tmp_path / "student.safetensors", targets="attention")
        kit.export(student, style, tmp_path / "lora.safetensors", force=True)
        assert name in load_file(tmp_path / "lora.safetensors")


def test_peft_s_scale_is_in_its_numbers_and_its_rank_is_one(kit, make, tmp_path):
    student = make("sd1").student(tmp_path / "student.safetensors")  # alpha 2, rank 4; of conv_out 4, of others less
    save_file({k: v for k, v in load_file(student).items()}, tmp_path / "bare.safetensors")
    kit.export(student, "peft", tmp_path / "peft.safetensors", dtype="float32")
    own, made = load_file(student), load_file(tmp_path / "peft.safetensors")
    assert {v.shape[0] for k, v in made.items() if "lora_A" in k} == {4} and not any("alpha" in k for k in made)
    up = own["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"].float()
    assert torch.equal(made["unet.down_blocks.0.attentions.0.proj_in.lora_B.weight"], up * 0.5)


# --- Numbers that float16 has no room for ---


def test_what_is_too_large_for_float16_moves_to_the_other_half():
    layer = Change(torch.randn(4, 8), 1e6 * torch.randn(16, 4), 1.0)
    down, up = in_range(layer, torch.float16, "layer")
    assert up.isfinite().all() and down.dtype == up.dtype == torch.float16
    found, expected = up.float() @ down.float(), layer.up @ layer.down
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


def test_what_fits_keeps_its_bits():
    layer = Change(torch.randn(4, 8).half(), 1e-6 * torch.randn(16, 4).half(), 1.0)
    assert torch.equal(in_range(layer, torch.float16, "layer")[1], layer.up)


def test_what_has_no_room_in_both_is_refused():
    layer = Change(1e6 * torch.ones(4, 8), 1e6 * torch.ones(16, 4), 1.0)
    with pytest.raises(ExportError, match=r"up's first half reaches .*, too large for float16: use --dtype bfloat16"):
        in_range(layer, torch.float16, "up")
    assert in_range(layer, torch.bfloat16, "up")[0].isfinite().all()


# --- Transformers ---


def sd3_names(depth):
    """Names and shapes of a small Stable Diffusion 3's weights."""
    width = 64 * depth
    layers = {
        "context_embedder": (width, 32), "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, 24), "y_embedder.mlp.2": (width, width), "x_embedder.proj": (width, 16, 2, 2),
        "final_layer.adaLN_modulation.1": (2 * width, width), "final_layer.linear": (64, width),
    }  # fmt: skip
    for i in range(depth):
        for side in ("x", "context"):
            ends, block = side == "context" and i == depth - 1, f"joint_blocks.{i}.{side}_block"
            layers |= {f"{block}.attn.qkv": (3 * width, width)}
            layers |= {f"{block}.adaLN_modulation.1": ((2 if ends else 6) * width, width)}
            if not ends:
                layers |= {f"{block}.attn.proj": (width, width), f"{block}.mlp.fc1": (4 * width, width)}
                layers |= {f"{block}.mlp.fc2": (width, 4 * width)}
    shapes = {f"{n}.weight": s for n, s in layers.items()} | {f"{n}.bias": s[:1] for n, s in layers.items()}
    return shapes | {"pos_embed": (1, 64, width)}


@pytest.fixture
def sd3(kit, make, tmp_path):
    """A single file of a small Stable Diffusion 3 and a LoRA on all its layers, as a host names them."""
    weights = {n: torch.randn(s) for n, s in sd3_names(2).items()}
    save_file({f"model.diffusion_model.{n}": v for n, v in weights.items()}, tmp_path / "sd3.safetensors")
    tensors = {}
    for name, shape in sd3_names(2).items():
        if name.endswith(".weight"):
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.randn(3, *shape[1:])
            tensors[f"{key}.lora_up.weight"] = torch.randn(shape[0], 3, *(1 for _ in shape[2:]))
            tensors[f"{key}.alpha"] = torch.tensor(1.5)
    about = {"architecture": "stable-diffusion-v3-medium", "prediction": "flow", "base_prediction": "flow", "rank": 3}
    card = make("sd1").card(**about, base_model="sd3", base_hash="0" * 16)
    save_file(tensors, tmp_path / "student.safetensors", card.to_metadata())
    return tmp_path


def test_a_transformer_s_lora_is_split_as_diffusers_splits_its_weights(kit, sd3):
    """The merged weights, converted by diffusers, are its converted weights with peft's changes."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    student, base = sd3 / "student.safetensors", sd3 / "sd3.safetensors"
    kit.export(student, "peft", sd3 / "peft.safetensors", base=base, dtype="float32")
    kit.export(student, "merged", sd3 / "merged.safetensors", base=base, dtype="float32")
    made, before, after = load_file(sd3 / "peft.safetensors"), convert(load_file(base)), None
    after = convert(load_file(sd3 / "merged.safetensors"))
    changed = 0
    for name, weight in before.items():
        module = f"transformer.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in made:
            assert torch.equal(after[name], weight)
            continue
        a, b = made[f"{module}.lora_A.weight"], made[f"{module}.lora_B.weight"]
        change = (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
        assert torch.allclose(after[name], weight + change, atol=1e-4)
        changed += 1
    assert changed == len(made) / 2 > 30


def test_diffusers_transformer_with_the_lora_is_the_merged_one(kit, sd3, peft, caplog):
    """A real Stable Diffusion 3 of two blocks, loaded once with the merged weights and once with base and LoRA."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    student, base = sd3 / "student.safetensors", sd3 / "sd3.safetensors"
    for to in ("peft", "merged"):
        kit.export(student, to, sd3 / f"{to}.safetensors", base=base, dtype="float32")
    networks = []
    for file in (base, sd3 / "merged.safetensors"):
        network = SD3Transformer2DModel(
            sample_size=8, num_layers=2, num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=128,
            pooled_projection_dim=24, out_channels=16, pos_embed_max_size=8,
        ).eval()  # fmt: skip
        network.load_state_dict(convert({k: 0.1 * v for k, v in load_file(file).items()}))
        networks.append(network)
    lora = {k: 0.1 * v if "lora_B" in k else v for k, v in load_file(sd3 / "peft.safetensors").items()}
    inputs = {
        "hidden_states": torch.randn(1, 16, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 24), "timestep": torch.tensor([500.0]),
    }  # fmt: skip
    with torch.no_grad():
        plain, expected = (n(**inputs).sample for n in networks)
        with caplog.at_level(logging.WARNING):
            StableDiffusion3Pipeline.load_lora_into_transformer(lora, networks[0])
        assert not [r.message for r in caplog.records if "keys" in r.message]
        found = networks[0](**inputs).sample
    assert kit.gap(found, expected) < 1e-3 < 0.1 < kit.gap(plain, expected)


def test_a_lora_in_diffusers_names_is_merged_into_a_single_file(kit, sd3):
    student, base = sd3 / "student.safetensors", sd3 / "sd3.safetensors"
    kit.export(student, "peft", sd3 / "peft.safetensors", base=base, dtype="float32")
    kit.export(student, "merged", sd3 / "merged.safetensors", base=base, dtype="float32")
    kit.export(sd3 / "peft.safetensors", "merged", sd3 / "again.safetensors", base=base, dtype="float32")
    expected, found = load_file(sd3 / "merged.safetensors"), load_file(sd3 / "again.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[k], expected[k], atol=1e-4) for k in expected)


def test_a_transformer_s_kohya_file_keeps_its_host_s_names(kit, sd3):
    kit.export(sd3 / "student.safetensors", "kohya", sd3 / "kohya.safetensors", dtype="float32")
    assert load_file(sd3 / "kohya.safetensors").keys() == load_file(sd3 / "student.safetensors").keys()


def test_a_transformer_without_its_base_is_asked_for_it(kit, sd3):
    with pytest.raises(ExportError, match=r"is no LoRA of a Stable Diffusion UNet .*: give its base by --base"):
        kit.export(sd3 / "student.safetensors", "peft", sd3 / "peft.safetensors")


def test_z_image_s_layers_are_split_as_in_diffusers():
    shapes = {"layers.0.attention.qkv.weight": (24, 8), "layers.0.attention.out.weight": (8, 8)}
    shapes |= {"layers.0.feed_forward.w1.weight": (16, 8), "x_embedder.weight": (8, 64)}
    rows = transformers.rows_of(shapes, "z-image")
    source, numbers = rows["layers.0.attention.to_k"]
    assert source == "layers.0.attention.qkv" and torch.equal(numbers, torch.arange(8, 16))
    assert rows["layers.0.attention.to_out.0"][0] == "layers.0.attention.out"
    assert rows["all_x_embedder.2-1"][0] == "x_embedder"


def test_what_diffusers_cannot_convert_is_told():
    for architecture in ("", "wan"):
        with pytest.raises(ExportError, match="the installed diffusers converts no"):
            transformers.rows_of({"head.weight": (4, 4)}, architecture)
    with pytest.raises(ExportError, match="diffusers cannot convert this stable-diffusion-v3-medium"):
        transformers.rows_of({"joint_blocks.0.x_block.attn.qkv.weight": (12, 4)}, "stable-diffusion-v3-medium")


def test_flux_s_layers_are_split_as_in_diffusers():
    """By the shapes of the full size: diffusers' converter knows no other."""
    width, mlp = 3072, 4 * 3072
    block = {"qkv": 3 * width, "proj": width}
    shapes = {f"double_blocks.0.{s}_attn.{n}.weight": (w, width) for s in ("img", "txt") for n, w in block.items()}
    for side in ("img", "txt"):
        shapes |= {f"double_blocks.0.{side}_mlp.{n}.weight": s for n, s in (("0", (mlp, width)), ("2", (width, mlp)))}
        shapes |= {f"double_blocks.0.{side}_mod.lin.weight": (6 * width, width)}
        shapes |= {f"double_blocks.0.{side}_attn.norm.{n}_norm.scale": (128,) for n in ("query", "key")}
    shapes |= {"single_blocks.0.linear1.weight": (3 * width + mlp, width), "img_in.weight": (width, 64)}
    shapes |= {"single_blocks.0.linear2.weight": (width, width + mlp), "txt_in.weight": (width, 4096)}
    shapes |= {"single_blocks.0.modulation.lin.weight": (3 * width, width), "final_layer.linear.weight": (64, width)}
    shapes |= {f"single_blocks.0.norm.{n}_norm.scale": (128,) for n in ("query", "key")}
    shapes |= {f"{n}_in.in_layer.weight": (width, 256) for n in ("time", "vector")}
    shapes |= {f"{n}_in.out_layer.weight": (width, width) for n in ("time", "vector")}
    shapes |= {"final_layer.adaLN_modulation.1.weight": (2 * width, width)}
    shapes |= {n.removesuffix("weight") + "bias": s[:1] for n, s in shapes.items() if n.endswith("weight")}
    rows = transformers.rows_of(shapes, "flux-1-schnell")
    source, numbers = rows["single_transformer_blocks.0.proj_mlp"]
    assert source == "single_blocks.0.linear1" and torch.equal(numbers, torch.arange(3 * width, 3 * width + mlp))
    source, numbers = rows["transformer_blocks.0.attn.add_v_proj"]
    assert source == "double_blocks.0.txt_attn.qkv" and torch.equal(numbers, torch.arange(2 * width, 3 * width))
    source, numbers = rows["norm_out.linear"]  # the shift and the scale change places
    assert torch.equal(numbers, torch.arange(2 * width).roll(width))
