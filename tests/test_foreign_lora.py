"""LoRA files of others on a backbone."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from turbodistill.core import architecture
from turbodistill.core.foreign_lora import ForeignLoRA, LoRAError
from turbodistill.core.naming import to_single_file


@pytest.fixture(scope="module")
def unet(toys):
    return toys.small_unet()


@pytest.fixture(scope="module")
def pairs(unet, others):
    return others.pairs(unet)


def single(unet):
    """A layer's name in the single-file layout."""
    table = to_single_file([n for n, _ in unet.named_parameters()])
    return lambda name: table[f"{name}.weight"].removesuffix(".weight")


def told(unet, changes):
    return {name: change.delta() for name, change in changes.layers.items()}


@pytest.mark.parametrize("style", ["kohya", "diffusers", "comfy"])
@pytest.mark.parametrize("layout", ["diffusers", "single"])
def test_the_change_is_up_times_down_times_alpha_over_rank(unet, pairs, others, tmp_path, style, layout):
    rename = single(unet) if layout == "single" else lambda name: name
    lora = ForeignLoRA(others.write(tmp_path / "a.safetensors", pairs, style, rename=rename))
    changes = lora.changes(unet)
    wanted = others.deltas(pairs)
    assert not changes.unknown and changes.layers.keys() == wanted.keys()
    for name, delta in told(unet, changes).items():
        assert torch.allclose(delta, wanted[name], atol=1e-6), name
    assert lora.ranks == [1, 2, 3, 4] and lora.format == {"comfy": "ComfyUI"}.get(style, style)


def test_without_alpha_the_factor_is_one(unet, pairs, others, tmp_path):
    changes = ForeignLoRA(others.write(tmp_path / "a.safetensors", pairs, "peft")).changes(unet)
    wanted = others.deltas(pairs, with_alpha=False)
    assert all(torch.allclose(delta, wanted[name], atol=1e-6) for name, delta in told(unet, changes).items())


def test_peft_s_settings_in_the_header_count(unet, pairs, others, tmp_path):
    path = others.write(tmp_path / "a.safetensors", pairs, "peft", lora_adapter_metadata=others.peft_settings(pairs))
    wanted = others.deltas(pairs)
    for name, delta in told(unet, ForeignLoRA(path).changes(unet)).items():
        assert torch.allclose(delta, wanted[name], atol=1e-6), name


def test_a_backbone_in_single_file_names_takes_diffusers_names(unet, pairs, others, tmp_path):
    rename = single(unet)
    table = to_single_file([n for n, _ in unet.named_parameters()])

    class Named(torch.nn.Module):
        """The UNet's layers by their single-file names, as hosts have them."""

    named = Named()
    for name, module in unet.named_modules():
        if f"{name}.weight" in table:
            *path, last = rename(name).split(".")
            place = named
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, torch.nn.Module())
                place = getattr(place, part)
            place.add_module(last, module)
    changes = ForeignLoRA(others.write(tmp_path / "a.safetensors", pairs, "diffusers")).changes(named)
    assert changes.layers.keys() == {rename(name) for name in pairs}


def test_diffusers_old_names_of_processors_are_read(unet, others, tmp_path):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    parts = others.pairs(unet, layers=[f"{name}.to_q", f"{name}.to_out.0"])
    found = {}
    for layer, (down, up, _) in parts.items():
        there = f"unet.{name}.processor.{layer.removeprefix(name + '.').removesuffix('.0')}_lora"
        found |= {f"{there}.down.weight": down, f"{there}.up.weight": up}
    save_file(found, tmp_path / "a.safetensors")
    changes = ForeignLoRA(tmp_path / "a.safetensors").changes(unet)
    assert changes.layers.keys() == parts.keys()


def test_a_one_by_one_convolution_may_be_written_as_a_linear_layer(unet, others, tmp_path):
    name = "down_blocks.0.attentions.0.proj_in"
    down, up, alpha = others.pairs(unet, layers=[name])[name]
    flat = {name: (down.flatten(1), up.flatten(1), alpha)}
    changes = ForeignLoRA(others.write(tmp_path / "a.safetensors", flat)).changes(unet)
    assert torch.allclose(changes.layers[name].delta(), others.deltas({name: (down, up, alpha)})[name], atol=1e-6)


def test_merged_weights_are_the_changed_ones_and_go_back_to_the_bit(unet, pairs, others, tmp_path, toys):
    changes = ForeignLoRA(others.write(tmp_path / "a.safetensors", pairs)).changes(unet)
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in unet.named_parameters()}
    half = {name: 0.5 * delta for name, delta in others.deltas(pairs).items()}
    twin = others.changed(copy.deepcopy(unet), half)
    with changes.merged(unet, 0.5):
        for (name, here), there in zip(unet.named_parameters(), twin.parameters(), strict=True):
            assert torch.allclose(here, there, atol=1e-6), name
    assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in unet.named_parameters())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_best_approximation_of_a_rank_is_that_of_the_singular_values(unet, pairs, others, tmp_path, rank):
    changes = ForeignLoRA(others.write(tmp_path / "a.safetensors", pairs)).changes(unet)
    for name, delta in others.deltas(pairs).items():
        up, down, found = changes.layers[name].truncated(rank)
        values = torch.linalg.svdvals(delta.flatten(1).double())
        lost = (delta.flatten(1) - up @ down).norm().item()
        assert torch.allclose(found, values[: len(found)], atol=1e-5)
        assert lost == pytest.approx(values[rank:].norm().item(), abs=1e-5)
        assert torch.allclose(up.norm(dim=0), down.norm(dim=1), atol=1e-4)


def test_layers_that_are_not_the_model_s_are_counted_and_named(unet, pairs, others, tmp_path):
    half = torch.zeros(2, 3)
    more = {
        "lora_unet_other_layer.lora_down.weight": half,
        "lora_unet_other_layer.lora_up.weight": half.T,
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": half,
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": half.T,
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),
    }
    lora = ForeignLoRA(others.write(tmp_path / "a.safetensors", pairs, more=more))
    changes = lora.changes(unet)
    assert changes.unknown == ["lora_unet_other_layer"] and lora.texts == 1
    first, second = lora.remarks(changes.unknown)
    assert first == "1 of a.safetensors's layers are none of this model's and left out: lora_unet_other_layer."
    assert "1 layers of text encoders" in second


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("lora_unet_conv_in.dora_scale", "DoRA"),
        ("base_model.model.conv_in.lora_magnitude_vector", "DoRA"),
        ("lora_unet_conv_in.hada_w1_a", "LoHa"),
        ("lora_unet_conv_in.lokr_w1", "LoKr"),
        ("lora_unet_conv_in.oft_blocks", "OFT"),
        ("lora_unet_conv_in.lora_mid.weight", "Tucker"),
        ("diffusion_model.conv_in.diff", "whole weights"),
        ("lora_unet_conv_in.a1.weight", "GLoRA"),
        ("base_model.model.conv_in.lora_B.bias", "bias"),
    ],
)
def test_other_kinds_are_refused_by_their_names(pairs, others, tmp_path, key, told):
    path = others.write(tmp_path / "a.safetensors", pairs, more={key: torch.ones(2, 2)})
    with pytest.raises(LoRAError, match=rf"a.safetensors holds .*{told}.*{key}: plain LoRAs are read"):
        ForeignLoRA(path)


def test_what_does_not_fit_or_is_broken_is_told(unet, pairs, others, tmp_path, toys):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"a.safetensors does not exist: check the name"):
        ForeignLoRA(path)
    save_file({"down_blocks.0.weight": torch.ones(2)}, path)
    with pytest.raises(LoRAError, match="is no LoRA, none of its 1 weights is half of a pair"):
        ForeignLoRA(path)
    good = load_file(others.write(path, pairs))
    up = next(k for k in good if k.endswith("lora_up.weight"))
    save_file({k: v for k, v in good.items() if k != up}, path)
    with pytest.raises(LoRAError, match="lacks one half of its pair"):
        ForeignLoRA(path)
    save_file(good | {up: torch.full_like(good[up], torch.nan)}, path)
    with pytest.raises(LoRAError, match="are no numbers"):
        ForeignLoRA(path).changes(unet)
    save_file(good | {up: good[up][:-1].clone()}, path)
    with pytest.raises(LoRAError, match=r"is for a layer of shape \(7, 4, 3, 3\), here it is \(8, 4, 3, 3\)"):
        ForeignLoRA(path).changes(unet)
    with pytest.raises(LoRAError, match="none of its 8 layers is in it"):
        ForeignLoRA(others.write(path, pairs)).changes(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(LoRAError, match="peft's settings of it cannot be read"):
        ForeignLoRA(others.write(path, pairs, "peft", lora_adapter_metadata="[")).changes(unet)


def test_its_architecture_is_told_by_the_width_of_the_text(others, tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    halves = {f"{name}.lora_down.weight": torch.zeros(2, 2048), f"{name}.lora_up.weight": torch.zeros(8, 2)}
    save_file(halves, tmp_path / "a.safetensors")
    assert ForeignLoRA(tmp_path / "a.safetensors").architecture == architecture.SDXL
