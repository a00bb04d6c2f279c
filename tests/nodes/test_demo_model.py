"""The embedded model as ComfyUI would build it: the configuration against the file's header and tensors."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from torch import nn
from turbodistill.core.card import fingerprint, read_card
from turbodistill.core.schedule import scaled_linear
from turbodistill.demo.text_encoder import TextEncoder

PARTS = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}


class Shapes(dict):
    """Names and shapes of a network's tensors, layer by layer."""

    def layer(self, name, *shape, bias=True):
        self[f"{name}.weight"] = shape
        if bias:
            self[f"{name}.bias"] = shape[:1]

    def module(self) -> nn.Module:
        root = nn.Module()
        for name, shape in self.items():
            *path, last = name.split(".")
            parent = root
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            parent.register_parameter(last, nn.Parameter(torch.empty(shape)))
        return root


def unet_shapes(
    in_channels,
    out_channels,
    model_channels,
    channel_mult,
    num_res_blocks,
    num_head_channels,
    use_linear_in_transformer,
    transformer_depth,
    transformer_depth_output,
    transformer_depth_middle,
    context_dim,
    **_,
):
    """The UNet of latent diffusion (arXiv 2112.10752) in the single-file layout."""
    shapes, time = Shapes(), 4 * model_channels
    down, up = list(transformer_depth), list(transformer_depth_output)

    def residual(name, before, after):
        shapes.layer(f"{name}.in_layers.0", before)
        shapes.layer(f"{name}.in_layers.2", after, before, 3, 3)
        shapes.layer(f"{name}.emb_layers.1", after, time)
        shapes.layer(f"{name}.out_layers.0", after)
        shapes.layer(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            shapes.layer(f"{name}.skip_connection", after, before, 1, 1)

    def transformer(name, width, depth):
        assert width % num_head_channels == 0
        kernel = () if use_linear_in_transformer else (1, 1)
        shapes.layer(f"{name}.norm", width)
        shapes.layer(f"{name}.proj_in", width, width, *kernel)
        shapes.layer(f"{name}.proj_out", width, width, *kernel)
        for block in (f"{name}.transformer_blocks.{i}" for i in range(depth)):
            for attention, source in (("attn1", width), ("attn2", context_dim)):
                shapes.layer(f"{block}.{attention}.to_q", width, width, bias=False)
                shapes.layer(f"{block}.{attention}.to_k", width, source, bias=False)
                shapes.layer(f"{block}.{attention}.to_v", width, source, bias=False)
                shapes.layer(f"{block}.{attention}.to_out.0", width, width)
            shapes.layer(f"{block}.ff.net.0.proj", 8 * width, width)  # gated: twice the inner width
            shapes.layer(f"{block}.ff.net.2", width, 4 * width)
            for i in (1, 2, 3):
                shapes.layer(f"{block}.norm{i}", width)

    shapes.layer("time_embed.0", time, model_channels)
    shapes.layer("time_embed.2", time, time)
    shapes.layer("input_blocks.0.0", model_channels, in_channels, 3, 3)
    width, skips, last = model_channels, [model_channels], len(channel_mult) - 1
    for level, factor in enumerate(channel_mult):
        for _block in range(num_res_blocks[level]):
            name = f"input_blocks.{len(skips)}"
            residual(f"{name}.0", width, factor * model_channels)
            width = factor * model_channels
            if depth := down.pop(0):
                transformer(f"{name}.1", width, depth)
            skips.append(width)
        if level < last:
            shapes.layer(f"input_blocks.{len(skips)}.0.op", width, width, 3, 3)
            skips.append(width)
    residual("middle_block.0", width, width)
    transformer("middle_block.1", width, transformer_depth_middle)
    residual("middle_block.2", width, width)
    index = 0
    for level, factor in reversed(list(enumerate(channel_mult))):
        for block in range(num_res_blocks[level] + 1):
            name, depth = f"output_blocks.{index}", up.pop()
            residual(f"{name}.0", width + skips.pop(), factor * model_channels)
            width = factor * model_channels
            if depth:
                transformer(f"{name}.1", width, depth)
            if level and block == num_res_blocks[level]:
                shapes.layer(f"{name}.{2 if depth else 1}.conv", width, width, 3, 3)
            index += 1
    assert not down and not up and not skips
    shapes.layer("out.0", width)
    shapes.layer("out.2", out_channels, width, 3, 3)
    return shapes


def vae_shapes(embed_dim, ddconfig):
    """The autoencoder of latent diffusion in the single-file layout."""
    shapes, latent = Shapes(), ddconfig["z_channels"]
    widths = [ddconfig["ch"] * factor for factor in ddconfig["ch_mult"]]
    moments = latent * (1 + ddconfig["double_z"])
    assert ddconfig["attn_resolutions"] == []  # in the middle alone

    def residual(name, before, after):
        shapes.layer(f"{name}.norm1", before)
        shapes.layer(f"{name}.conv1", after, before, 3, 3)
        shapes.layer(f"{name}.norm2", after)
        shapes.layer(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            shapes.layer(f"{name}.nin_shortcut", after, before, 1, 1)

    def half(side, first, blocks, levels, sample, ends):
        shapes.layer(f"{side}.conv_in", first, ends[0], 3, 3)
        before = first
        for i, level in enumerate(levels):
            name = f"{side}.{sample.removesuffix('sample')}.{level}"
            for block in range(blocks):
                residual(f"{name}.block.{block}", before, widths[level])
                before = widths[level]
            if i < len(levels) - 1:
                shapes.layer(f"{name}.{sample}.conv", before, before, 3, 3)
        for i in (1, 2):
            residual(f"{side}.mid.block_{i}", widths[-1], widths[-1])
        shapes.layer(f"{side}.mid.attn_1.norm", widths[-1])
        for part in ("q", "k", "v", "proj_out"):
            shapes.layer(f"{side}.mid.attn_1.{part}", widths[-1], widths[-1], 1, 1)
        shapes.layer(f"{side}.norm_out", before)
        shapes.layer(f"{side}.conv_out", ends[1], before, 3, 3)

    blocks, levels = ddconfig["num_res_blocks"], range(len(widths))
    half("encoder", widths[0], blocks, levels, "downsample", (ddconfig["in_channels"], moments))
    half("decoder", widths[-1], blocks + 1, levels[::-1], "upsample", (latent, ddconfig["out_ch"]))
    shapes.layer("quant_conv", 2 * embed_dim, moments, 1, 1)
    shapes.layer("post_quant_conv", latent, embed_dim, 1, 1)
    return shapes


@pytest.fixture(scope="module")
def about(nodes):
    """What the file says of itself."""
    with safe_open(nodes.embedded.MODEL, "pt") as file:
        return json.loads(file.metadata()[nodes.embedded.HEADER])


@pytest.fixture(scope="module")
def weights(nodes):
    """The file's tensors: part -> name -> tensor."""
    with safe_open(nodes.embedded.MODEL, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - no dict
    parts = {
        part: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for part, prefix in PARTS.items()
    }
    assert sum(map(len, parts.values())) == len(tensors)
    return parts


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# --- the configuration ---


def test_the_unet_s_configuration_gives_the_file_s_tensors(nodes, about, weights):
    assert unet_shapes(**nodes.embedded.unet_config(about["unet"])) == shapes_of(weights["unet"])


def test_the_autoencoder_s_configuration_gives_the_file_s_tensors(nodes, about, weights):
    assert vae_shapes(**nodes.embedded.vae_config(about["vae"])["params"]) == shapes_of(weights["vae"])


def test_what_tensors_do_not_show_is_the_header_s(nodes, about):
    header, config = about["unet"], nodes.embedded.unet_config(about["unet"])
    widths = [factor * config["model_channels"] for factor in config["channel_mult"]]
    assert widths == header["block_out_channels"] == [64, 128, 160]
    heads = [width // config["num_head_channels"] for width in widths]
    assert heads == header["attention_head_dim"]  # diffusers' name for the number of heads
    assert config["image_size"] == header["sample_size"]
    assert (config["num_heads"], config["use_spatial_transformer"]) == (-1, True)
    assert config["adm_in_channels"] is None and not config["use_temporal_attention"]
    vae = nodes.embedded.vae_config(about["vae"])["params"]["ddconfig"]
    assert vae["resolution"] == about["vae"]["sample_size"] and vae["dropout"] == 0


@pytest.mark.parametrize(
    ("kinds", "blocks", "down", "up"),
    [
        (("CrossAttnDownBlock2D", "DownBlock2D"), 2, [1, 1, 0, 0], [1, 1, 1, 0, 0, 0]),
        (("DownBlock2D", "CrossAttnDownBlock2D"), 1, [0, 1], [0, 0, 1, 1]),
    ],
)
def test_transformers_sit_where_the_header_says(nodes, about, kinds, blocks, down, up):
    header = about["unet"] | {"down_block_types": kinds, "layers_per_block": blocks, "block_out_channels": [64, 128]}
    config = nodes.embedded.unet_config(header)
    assert (config["transformer_depth"], config["transformer_depth_output"]) == (down, up)
    assert config["num_res_blocks"] == [blocks] * 2
    unet_shapes(**config)  # every entry is used


@pytest.mark.parametrize(("factor", "width", "product"), [(2.5, 64, 160), (1.0, 64, 64), (100 / 96, 96, 100)])
def test_a_ratio_times_the_width_is_whole(nodes, factor, width, product):
    ratio = nodes.embedded.Ratio(factor)
    for found in (ratio * width, width * ratio):
        assert found == product and type(found) is int
    assert ratio == factor and isinstance(ratio, float)


def test_comfyui_s_own_schedule_and_reading_are_the_model_s(nodes, comfyui, about):
    schedule = about["schedule"]
    assert schedule == {"kind": "scaled_linear", "start": 0.00085, "end": 0.012, "steps": 1000}  # Stable Diffusion's
    table = scaled_linear(schedule["steps"], schedule["start"], schedule["end"])
    assert torch.allclose(comfyui.ModelSamplingDiscrete().sigmas, ((1 - table) / table).sqrt().float())
    config = nodes.embedded.DemoConfig(nodes.embedded.unet_config(about["unet"]))
    assert about["prediction"] == "v" and config.model_type({}) is comfyui.ModelType.V_PREDICTION


def test_a_class_wide_default_does_not_overwrite_the_configuration(nodes, comfyui, about):
    # ComfyUI's base class would set 64 channels a head over whatever it is given.
    config = nodes.embedded.unet_config(about["unet"])
    assert nodes.embedded.DemoConfig(config).unet_config == config
    assert comfyui.BASE(config).unet_config["num_head_channels"] != config["num_head_channels"]


# --- the loaded model ---


@pytest.fixture(scope="module")
def networks(comfyui):
    """ComfyUI's UNet and autoencoder are tensors of the configuration's shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfyui.loading, "UNetModel", lambda **config: unet_shapes(**config).module())
        patch.setattr(comfyui.loading, "AutoencoderKL", lambda **config: vae_shapes(**config).module())
        yield


@pytest.fixture(scope="module")
def loaded(nodes, networks):
    return nodes.load.LoadDemoModel.run(batch_size=3).args


def test_every_output_has_its_value(nodes, comfyui, loaded):
    assert len(loaded) == len(nodes.load.LoadDemoModel.define_schema().outputs)
    assert [type(v) for v in loaded] == [comfyui.ModelPatcher, comfyui.CLIP, comfyui.VAE, dict]


def test_the_model_holds_the_file_s_weights(nodes, about, weights, loaded):
    model = loaded[0]
    found = nodes.patcher.base_weights(model)
    assert found.keys() == weights["unet"].keys()
    assert all(torch.equal(found[k].half(), weights["unet"][k]) for k in found)
    assert nodes.patcher.prediction_of(model) == about["prediction"]
    assert model.get_model_object("latent_format").scale_factor == about["vae"]["scaling_factor"]


def test_the_built_in_student_is_made_for_it(nodes, loaded):
    card = read_card(nodes.embedded.STUDENT)
    assert card.base_hash == fingerprint(nodes.patcher.base_weights(loaded[0]))
    patched, words = nodes.load.LoadStudent.run(model=loaded[0], student=nodes.load.BUILT_IN, strength=1.0).args
    assert words == card.in_words()  # no warning
    layers = [k for k, v in nodes.patcher.base_weights(loaded[0]).items() if k.endswith("weight") and v.ndim > 1]
    assert len(patched.patches) == len(layers)
    change = next(iter(patched.patches.values()))[0][1]
    assert math.isclose(change.alpha, card.alpha)


def test_the_empty_latent_is_of_the_model_s_size(nodes, about, loaded):
    latent, side = loaded[3]["samples"], about["unet"]["sample_size"]
    assert latent.shape == (3, about["unet"]["in_channels"], side, side) and (latent == 0).all()
    # And an empty latent of the same pixels, made for the factor 8 of other models, takes it.
    other = {"samples": torch.zeros(1, 4, 8, 8), "downscale_ratio_spacial": 8}
    assert nodes.patcher.fitting(loaded[0], other).shape[2:] == (side, side) == (16, 16)
    assert loaded[3]["downscale_ratio_spacial"] == 4 and nodes.patcher.fitting(loaded[0], loaded[3]) is latent


def test_the_autoencoder_knows_its_own_ratio(about, loaded):
    vae, (width, _) = loaded[2], about["resolution"]
    assert vae.downscale_ratio == vae.upscale_ratio == width // about["unet"]["sample_size"]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("red apple, in flat noto style", "red apple, in flat noto style"),
        ("a (red:1.3) apple (pie)", "a red apple pie"),  # weights have no meaning here
        (r"smile \(face\)", "smile (face)"),
        ("", ""),
    ],
)
def test_a_prompt_is_encoded_as_the_trainer_does(about, weights, loaded, prompt, text):
    clip = loaded[1]
    encoder = TextEncoder(json.dumps(about["text_encoder"]["tokenizer"]))
    encoder.load_state_dict({k: v.float() for k, v in weights["text_encoder"].items()})
    states = clip.encode_from_tokens(clip.tokenize(prompt))
    assert states.shape[-1] == about["unet"]["cross_attention_dim"]
    assert torch.allclose(states, encoder.encode([text]), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda shapes: shapes.layer("stray", 1, bias=False), r"\['stray.weight'\] missing, \[\] unknown"),
        (lambda shapes: shapes.pop("out.2.bias"), r"\[\] missing, \['out.2.bias'\] unknown"),
    ],
)
def test_a_unet_that_the_weights_do_not_fit_is_told(nodes, comfyui, networks, monkeypatch, change, words):
    def other(**config):
        shapes = unet_shapes(**config)
        change(shapes)
        return shapes.module()

    monkeypatch.setattr(comfyui.loading, "UNetModel", other)
    with pytest.raises(RuntimeError, match=f"does not fit ComfyUI's UNet: {words}"):
        nodes.embedded.load()
