"""Names of UNet parameters against diffusers' own conversion."""

import pytest
import torch
from turbodistill.core.naming import dotted, is_diffusers, layers_of, to_diffusers, to_single_file

PREFIX = "model.diffusion_model."


def test_diffusers_own_conversion_leads_back(toys):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = toys.small_unet()
    weights = unet.state_dict()
    names = to_single_file(weights)
    file = {PREFIX + names[k]: v for k, v in weights.items()}
    back = convert_ldm_unet_checkpoint(file, dict(unet.config))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], weights[k]) for k in weights)


def test_names_are_unique(toys):
    names = to_single_file(toys.small_unet().state_dict())
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_single_file_names_lead_back(levels):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(32,) * levels,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=16,
    )
    table = to_single_file(unet.state_dict())
    assert to_diffusers(table.values()) == {theirs: ours for ours, theirs in table.items()}
    assert to_diffusers(["double_blocks.0.img_attn.qkv.weight"]) == {}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("down_blocks.0.resnets.0.conv1.weight", "input_blocks.1.0.in_layers.2.weight"),
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
            "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        ),
        ("down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
        ("down_blocks.1.resnets.0.conv_shortcut.weight", "input_blocks.4.0.skip_connection.weight"),
        ("mid_block.resnets.1.time_emb_proj.weight", "middle_block.2.emb_layers.1.weight"),
        ("mid_block.attentions.0.proj_in.weight", "middle_block.1.proj_in.weight"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("up_blocks.1.attentions.2.proj_out.bias", "output_blocks.5.1.proj_out.bias"),
        ("conv_out.weight", "out.2.weight"),
    ],
)
def test_names_by_hand(toys, ours, theirs):
    assert to_single_file(toys.small_unet().state_dict())[ours] == theirs


def test_layouts_are_told_apart(toys):
    names = list(toys.small_unet().state_dict())
    assert is_diffusers(names)
    assert not is_diffusers(to_single_file(names).values())
    assert not is_diffusers(toys.conv().backbone.state_dict())


def test_a_name_without_counterpart_is_refused(toys):
    names = [*toys.small_unet().state_dict(), "controlnet_cond_embedding.weight"]
    with pytest.raises(ValueError, match=r"controlnet_cond_embedding\.weight"):
        to_single_file(names)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", ["CrossAttnDownBlock2D", "DownBlock2D"])
def test_names_of_modules_lead_back_too(layers, kind):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=layers,
            down_block_types=("DownBlock2D", kind),
            up_block_types=(kind.replace("Down", "Up"), "UpBlock2D"),
            cross_attention_dim=8,
        )
    names = to_single_file(unet.state_dict())
    assert layers_of(names.values()) == layers
    modules = {v.rpartition(".")[0]: k.rpartition(".")[0] for k, v in names.items()}
    assert to_diffusers(modules) == modules
    assert all(dotted(m.replace(".", "_")) == m for m in modules)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_names_of_attention_alone_tell_how_many_layers_a_block_has(layers):
    names = [f"input_blocks.{1 + b * (layers + 1) + k}.1.proj_in" for b in range(3) for k in range(layers)]
    assert layers_of(names) == layers
