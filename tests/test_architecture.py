"""The architecture of a network is told by its weights, in every layout, whatever it predicts."""

import pytest
from turbodistill.core import architecture
from turbodistill.core.architecture import architecture_of, architecture_of_file
from turbodistill.core.naming import to_single_file

QKV = {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "img_in.weight": (3072, 64)}
FLUX = QKV | {"vector_in.in_layer.weight": (3072, 768)}
JOINT = {f"joint_blocks.{i}.{b}_block.attn.qkv.weight": (4608, 1536) for i in range(24) for b in ("x", "context")}
LARGE = {f"joint_blocks.{i}.{b}_block.attn.qkv.weight": (7296, 2432) for i in range(38) for b in ("x", "context")}
# Of diffusers' transformers.
DOUBLE = {"transformer_blocks.0.attn.to_q.weight": (3072, 3072)}
THEIRS = DOUBLE | {
    "single_transformer_blocks.0.attn.to_q.weight": (3072, 3072),
    "x_embedder.weight": (3072, 64),
    "time_text_embed.text_embedder.linear_1.weight": (3072, 768),
}
SD3 = {"pos_embed.proj.weight": (1536, 16, 2, 2), "transformer_blocks.0.attn.add_q_proj.weight": (1536, 1536)}


@pytest.fixture(scope="module")
def unet(toys):
    """The width of the text -> names and shapes of a diffusers UNet's weights."""
    return lambda width: {name: tuple(p.shape) for name, p in toys.small_unet(width).named_parameters()}


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (768, "stable-diffusion-v1"),
        (1024, "stable-diffusion-v2"),
        (2048, "stable-diffusion-xl-v1-base"),
        (1280, "stable-diffusion-xl-v1-refiner"),
        (16, ""),
    ],
)
def test_a_unet_is_told_by_the_width_of_its_text(unet, width, expected):
    theirs = unet(width)
    names = to_single_file(theirs)
    hosts = {names[name]: shape for name, shape in theirs.items()}
    assert architecture_of(theirs) == architecture_of(hosts) == expected
    whole = {f"model.diffusion_model.{name}": shape for name, shape in hosts.items()}
    others = {"cond_stage_model.transformer.embeddings.weight": (49408, 768)}
    assert architecture_of_file(whole | others) == architecture_of_file(hosts) == expected


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (JOINT, "stable-diffusion-v3-medium"),
        (LARGE, "stable-diffusion-v3.5-large"),
        (JOINT | {"joint_blocks.0.x_block.attn2.qkv.weight": (4608, 1536)}, "stable-diffusion-v3.5-medium"),
        (FLUX | {"guidance_in.in_layer.weight": (3072, 256)}, "flux-1-dev"),
        (FLUX, "flux-1-schnell"),
        (QKV | {"double_stream_modulation_img.lin.weight": (18432, 3072)}, "flux-2"),
        (QKV | {"distilled_guidance_layer.norms.0.scale": (5120,)}, "chroma"),
        (QKV | {"txt_in.individual_token_refiner.blocks.0.norm1.weight": (3072,)}, ""),  # a video model
        ({"cap_embedder.1.weight": (3840, 2560)}, "z-image"),
        ({"cap_embedder.1.weight": (2304, 2304)}, "lumina-2"),
        ({"cap_embedder.1.weight": (2560, 2304)}, ""),
        (
            {
                "blocks.0.cross_attn.kv_linear.weight": (4480, 2240),
                "blocks.0.mlp.inverted_conv.conv.weight": (11200, 2240, 1, 1),
            },
            "sana",
        ),
        ({"blocks.0.cross_attn.kv_linear.weight": (2304, 1152)}, ""),  # PixArt
        (THEIRS | {"time_text_embed.guidance_embedder.linear_1.weight": (3072, 256)}, "flux-1-dev"),
        (THEIRS, "flux-1-schnell"),
        (THEIRS | {"distilled_guidance_layer.in_proj.weight": (5120, 64)}, "chroma"),
        ({k: v for k, v in THEIRS.items() if k != "x_embedder.weight"}, ""),  # a video model
        (DOUBLE | {"double_stream_modulation_img.linear.weight": (18432, 3072)}, "flux-2"),
        (DOUBLE | SD3, "stable-diffusion-v3-medium"),
        (DOUBLE | SD3 | {"transformer_blocks.0.attn2.to_q.weight": (1536, 1536)}, "stable-diffusion-v3.5-medium"),
        (DOUBLE | SD3 | {"transformer_blocks.37.attn.to_q.weight": (2432, 2432)}, "stable-diffusion-v3.5-large"),
        (DOUBLE | {"caption_norm.weight": (2240,), "patch_embed.proj.weight": (2240, 32, 1, 1)}, "sana"),
        ({"time_caption_embed.caption_embedder.1.weight": (2304, 2304)}, "lumina-2"),
        ({"cap_embedder.1.base_layer.weight": (3840, 2560), "cap_embedder.1.lora_A.a.weight": (8, 2560)}, "z-image"),
        ({"txt_norm.weight": (3584,)}, "qwen-image"),
        ({"head.modulation": (1, 2, 5120)}, "wan"),
        ({"input_blocks.1.1.time_stack.0.attn2.to_k.weight": (320, 1024)}, ""),  # a video model
        ({}, ""),
    ],
)
def test_a_transformer_is_told_by_its_layers(shapes, expected):
    assert architecture_of(shapes) == expected
    assert not expected or expected in architecture.KNOWN
