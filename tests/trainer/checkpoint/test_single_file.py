"""A single file gives the very modules that it was written from, in every form that such files have."""

import re

import pytest
import torch
from safetensors.torch import save_file
from turbodistill.core.schedule import DiscreteSchedule
from turbodistill.trainer.checkpoint.errors import ModelError
from turbodistill.trainer.checkpoint.identify import SD2_BIAS, Content
from turbodistill.trainer.checkpoint.load import architecture_of_module, load_pipeline
from turbodistill.trainer.checkpoint.single_file import load_parts, unsaid_prediction

KINDS = {
    "small_sd1": ("stable-diffusion-v1", "StableDiffusionPipeline", 64),
    "small_sd2": ("stable-diffusion-v2", "StableDiffusionPipeline", 64),
    "small_sdxl": ("stable-diffusion-xl-v1-base", "StableDiffusionXLPipeline", 128),
}
# What the libraries add to a configuration, or write in another way.
NOT_COMPARED = re.compile(r"_.*|sample_size|scaling_factor|bos_token_id|eos_token_id|dtype|torch_dtype|architectures")


def settings(module):
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    config = dict(config)
    if isinstance(config.get("transformer_layers_per_block"), int):
        config["transformer_layers_per_block"] = [config["transformer_layers_per_block"]] * 2
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not NOT_COMPARED.fullmatch(k)}


@pytest.fixture(params=KINDS)
def made(request):
    return request.param, request.getfixturevalue(request.param)


def test_a_file_gives_the_modules_that_it_was_written_from(made, files, vocabulary, tmp_path):
    name, checkpoint = made
    loaded = load_pipeline(checkpoint.write(tmp_path / "mine.safetensors"), tokenizer=vocabulary)
    unet = loaded.pipe.unet
    assert (architecture_of_module(unet), type(loaded.pipe).__name__, unet.config.sample_size) == KINDS[name]
    assert (loaded.name, loaded.pipe.scheduler.config.prediction_type, loaded.remarks) == ("mine", "epsilon", ())
    for part, module in checkpoint.modules.items():
        found = getattr(loaded.pipe, part)
        assert files.equal(found, module) and type(found) is type(module) and not found.training
        free = {"projection_dim"} if part == "text_encoder" else {"upcast_attention"}
        a, b = settings(found), settings(module)
        assert {k: v for k, v in a.items() if k not in free} == {k: b[k] for k in a if k not in free}


def test_a_file_gives_what_diffusers_own_loader_gives(made, files, vocabulary, tmp_path):
    path = made[1].write(tmp_path / "mine.safetensors")
    loaded = load_pipeline(path, tokenizer=vocabulary)
    loaded.pipe.save_pretrained(tmp_path / "config")
    theirs = type(loaded.pipe).from_single_file(
        str(path), config=str(tmp_path / "config"), local_files_only=True, torch_dtype=torch.float16
    )
    for part in made[1].modules:
        assert files.equal(getattr(loaded.pipe, part), getattr(theirs, part)), part


def test_a_loaded_pipeline_makes_a_picture(made, vocabulary, tmp_path):
    loaded = load_pipeline(made[1].write(tmp_path / "mine.safetensors"), tokenizer=vocabulary, dtype=torch.float32)
    loaded.pipe.set_progress_bar_config(disable=True)
    assert {loaded.pipe.unet.dtype, loaded.pipe.vae.dtype, loaded.pipe.text_encoder.dtype} == {torch.float32}
    pictures = loaded.pipe("abc", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert pictures.shape == (1, 64, 64, 3) and pictures.std() > 0


@pytest.mark.parametrize("prefix", ["", "model.", "diffusion_model.", "model.model.", "unet."])
def test_a_unet_alone_is_found_under_every_prefix(prefix, small_sdxl, files, tmp_path):
    unet = files.Made(files.unet_weights(small_sdxl.modules["unet"], prefix), {})
    parts = load_parts(unet.write(tmp_path / "unet.safetensors", v_pred=torch.zeros(0)))
    assert parts.content.architecture == "stable-diffusion-xl-v1-base" and list(parts.modules) == ["unet"]
    assert files.equal(parts.modules["unet"], small_sdxl.modules["unet"]) and parts.prediction == "v"


def test_a_unet_in_diffusers_own_names_is_read_too(small_sdxl, files, tmp_path):
    save_file(small_sdxl.modules["unet"].state_dict(), tmp_path / "unet.safetensors")
    assert files.equal(load_parts(tmp_path / "unet.safetensors").modules["unet"], small_sdxl.modules["unet"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"(attn_1)\.(q|k|v)\.", r"\1.to_\2."),
        (r"(attn_1)\.proj_out\.", r"\1.to_out.0."),
        (r"(attn_1)\.norm\.", r"\1.group_norm."),
        (r"^first_stage_model\.", "vae."),
        (r"transformer\.text_model\.", "transformer."),  # as the oldest files have it
    ],
)
def test_other_names_of_the_same_layers_are_known(old, new, small_sd1, files, vocabulary, tmp_path):
    renamed = small_sd1.renamed(old, new)
    assert renamed.weights.keys() != small_sd1.weights.keys()
    loaded = load_pipeline(renamed.write(tmp_path / "mine.safetensors"), tokenizer=vocabulary)
    assert all(files.equal(getattr(loaded.pipe, k), v) for k, v in small_sd1.modules.items())


def test_an_autoencoders_attention_may_be_stored_as_linear_layers(small_sd1, files, tmp_path):
    flat = files.vae_weights(small_sd1.modules["vae"], convolutions=False)
    path = files.Made(small_sd1.weights | flat).write(tmp_path / "mine.safetensors")
    assert files.equal(load_parts(path).modules["vae"], small_sd1.modules["vae"])


def test_what_belongs_to_nothing_is_named_and_left_out(small_sd1, tmp_path):
    path = small_sd1.write(tmp_path / "mine.safetensors", **{"safety.net.weight": torch.zeros(2)})
    assert load_parts(path).remarks == ["1 weights in mine.safetensors are not used, such as safety.net.weight."]


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ((), ("epsilon", False)),
        (("v_pred",), ("v_prediction", False)),
        (("v_pred", "ztsnr"), ("v_prediction", True)),
        (("ztsnr",), ("epsilon", False)),  # as in ComfyUI
    ],
)
def test_the_marks_of_v_prediction_and_of_a_zero_terminal_schedule_count(
    marks, expected, small_sdxl, vocabulary, tmp_path
):
    path = small_sdxl.write(tmp_path / "mine.safetensors", **dict.fromkeys(marks, torch.zeros(0)))
    config = load_pipeline(path, tokenizer=vocabulary).pipe.scheduler.config
    assert (config.prediction_type, bool(config.rescale_betas_zero_snr)) == expected
    assert config.timestep_spacing == ("trailing" if expected[1] else "leading")


def test_a_zero_terminal_model_gives_numbers_in_every_scheduler(small_sdxl, vocabulary, tmp_path):
    from diffusers import DDIMScheduler

    path = small_sdxl.write(tmp_path / "mine.safetensors", v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    pipe = load_pipeline(path, tokenizer=vocabulary, dtype=torch.float32).pipe
    pipe.set_progress_bar_config(disable=True)
    for kind in (type(pipe.scheduler), DDIMScheduler):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        sigmas = DiscreteSchedule(pipe.scheduler.alphas_cumprod).sigmas
        assert sigmas.isfinite().all() and 4000 < sigmas[-1] < 4600
        assert pipe.scheduler.config.timestep_spacing == "trailing"
        picture = pipe("abc", num_inference_steps=1, height=64, width=64, guidance_scale=0, output_type="pt").images
        assert picture.isfinite().all() and pipe.scheduler.timesteps.tolist() == [999]
    assert DDIMScheduler.from_config(pipe.scheduler.config).alphas_cumprod[-1] == 0


@pytest.mark.parametrize(("said", "expected"), [("v", "v"), ("epsilon", "eps"), ("V_Prediction", "v"), ("?", "eps")])
def test_a_header_may_say_the_prediction_type(said, expected, small_sd1, tmp_path):
    path = small_sd1.write(tmp_path / "mine.safetensors", {"modelspec.prediction_type": said})
    assert load_parts(path).prediction == expected


def test_the_prediction_type_can_be_given(small_sd1, vocabulary, tmp_path):
    path = small_sd1.write(tmp_path / "mine.safetensors")
    loaded = load_pipeline(path, tokenizer=vocabulary, prediction="v")
    assert loaded.pipe.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(ModelError, match="prediction is 'flow': give eps or v"):
        load_pipeline(path, prediction="flow")


@pytest.mark.parametrize(
    ("architecture", "spread", "expected"),
    [
        ("stable-diffusion-v2", 0.2, "v"),
        ("stable-diffusion-v2", 0.02, "eps"),
        ("stable-diffusion-v1", 0.2, "eps"),
    ],
)
def test_of_stable_diffusion_2_the_weights_tell_the_prediction_type(architecture, spread, expected):
    bias = {SD2_BIAS: spread * torch.tensor([-1.0, 1.0] * 160).half()}
    assert unsaid_prediction(Content(architecture, "", None), bias) == expected
    assert unsaid_prediction(Content(architecture, "", None), {}) == "eps"


def test_a_file_of_several_types_is_loaded_in_that_of_most_weights(small_sd1, tmp_path):
    name = "model.diffusion_model.out.0.weight"
    path = small_sd1.write(tmp_path / "mine.safetensors", **{name: small_sd1.weights[name].float()})
    parts = load_parts(path)
    assert parts.modules["unet"].dtype == torch.float16
    assert parts.remarks == ["the UNet is stored in float16 and float32: it is loaded in float16."]
    assert load_parts(path, torch.float32).remarks == []


def test_eight_bits_without_a_scale_are_cast(small_sd1, tmp_path):
    names = [n for n in small_sd1.weights if n.startswith("model.diffusion_model.") and n.endswith("weight")]
    eight = {n: small_sd1.weights[n].to(torch.float8_e4m3fn) for n in names}
    parts = load_parts(small_sd1.write(tmp_path / "mine.safetensors", **eight))
    assert {p.dtype for p in parts.modules["unet"].parameters()} == {torch.float16}
    assert parts.remarks == ["the UNet is stored in float16 and float8_e4m3fn: it is loaded in float16."]
    weight = parts.modules["unet"].conv_in.weight
    assert torch.equal(weight, eight["model.diffusion_model.input_blocks.0.0.weight"].half())


def damage(weights, name, value=None):
    changed = {k: v for k, v in weights.items() if k != name}
    return changed | ({} if value is None else {name: value})


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("model.diffusion_model.out.2.bias", None, r"1 of the UNet's weights are missing, such as conv_out.bias"),
        ("model.diffusion_model.out.0.bias", torch.zeros(3), r"1 of the UNet's weights are of another shape"),
        ("model.diffusion_model.more.weight", torch.zeros(3), r"1 of the UNet's weights are of no layer .*more.weight"),
        ("model.diffusion_model.out.2.weight", None, r"the UNet is not whole, .* lacks 'out.2.weight'"),
        ("first_stage_model.decoder.norm_out.bias", None, "the autoencoder's weights are missing"),
        ("first_stage_model.more.bias", torch.zeros(3), "the autoencoder's weights are of no layer"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            torch.full((768,), torch.nan),
            "the text encoder clip_l's weight .*final_layer_norm.bias holds what is no number",
        ),
        ("model.diffusion_model.out.2.bias", torch.full((4,), torch.inf), "UNet's weight conv_out.bias .* no number"),
    ],
)
def test_what_is_not_whole_is_told_by_its_name(name, value, told, small_sd1, files, tmp_path):
    path = files.Made(damage(small_sd1.weights, name, value)).write(tmp_path / "mine.safetensors")
    with pytest.raises(ModelError, match=told):
        load_parts(path)


def test_a_number_too_large_for_the_type_that_is_asked_for_is_told(small_sd1, tmp_path):
    path = small_sd1.write(tmp_path / "mine.safetensors", **{"model.diffusion_model.out.2.bias": torch.full((4,), 1e6)})
    with pytest.raises(ModelError, match=r"conv_out.bias holds what is no number"):
        load_parts(path, torch.float16)


def test_a_file_without_text_encoders_says_where_to_take_them_from(small_sdxl, files, vocabulary, tmp_path):
    unet = small_sdxl.without("conditioner.", "first_stage_model.").write(tmp_path / "unet.safetensors")
    with pytest.raises(ModelError, match=r"holds no vae, text_encoder and text_encoder_2: give as components .*hub"):
        load_pipeline(unet)
    whole = load_pipeline(small_sdxl.write(tmp_path / "whole.safetensors"), tokenizer=vocabulary)
    whole.pipe.save_pretrained(tmp_path / "folder")
    loaded = load_pipeline(unet, components=tmp_path / "folder")
    assert all(files.equal(getattr(loaded.pipe, k), v) for k, v in small_sdxl.modules.items())
    assert len(loaded.pipe.tokenizer) == len(loaded.pipe.tokenizer_2) == len(files.TOKENS)
    with pytest.raises(ModelError, match="is a file: give a diffusers folder"):
        load_pipeline(unet, components=tmp_path / "whole.safetensors")


def test_components_of_another_architecture_are_refused(small_sd1, small_sdxl, vocabulary, tmp_path):
    load_pipeline(small_sd1.write(tmp_path / "sd1.safetensors"), tokenizer=vocabulary).pipe.save_pretrained(
        tmp_path / "sd1"
    )
    unet = small_sdxl.without("conditioner.").write(tmp_path / "unet.safetensors")
    with pytest.raises(ModelError, match="has no text_encoder_2 and tokenizer_2: give another, such as stabilityai"):
        load_pipeline(unet, components=tmp_path / "sd1")


def test_an_autoencoder_may_come_from_a_file_or_folder_of_its_own(small_sd1, files, vocabulary, tmp_path):
    path = small_sd1.without("first_stage_model.").write(tmp_path / "mine.safetensors")
    with pytest.raises(ModelError, match=r"holds no vae: give as components .*, or a file as vae"):
        load_pipeline(path, tokenizer=vocabulary)
    vae = small_sd1.modules["vae"]
    for prefix in ("", "first_stage_model."):
        files.Made(files.vae_weights(vae, prefix)).write(tmp_path / "vae.safetensors")
        loaded = load_pipeline(path, tokenizer=vocabulary, vae=tmp_path / "vae.safetensors")
        assert files.equal(loaded.pipe.vae, vae)
    vae.save_pretrained(tmp_path / "vae")
    assert files.equal(load_pipeline(path, tokenizer=vocabulary, vae=tmp_path / "vae").pipe.vae, vae)
    with pytest.raises(ModelError, match="is no autoencoder that is known here"):
        load_pipeline(path, tokenizer=vocabulary, vae=path)


@pytest.mark.parametrize(
    ("make", "architecture"),
    [
        (lambda layouts: layouts.sd3(), "stable-diffusion-v3-medium"),
        (lambda layouts: layouts.sd3(dual=1), "stable-diffusion-v3.5-medium"),
        (lambda layouts: layouts.sana(), "sana"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_gives_what_diffusers_own_loader_gives(make, architecture, prefix, layouts, files, tmp_path):
    torch.manual_seed(3)
    weights = {name: torch.randn(shape).bfloat16() for name, shape in make(layouts).items()}
    path = files.Made({prefix + k: v for k, v in weights.items()}).write(tmp_path / "mine.safetensors")
    parts = load_parts(path)
    transformer = parts.modules["transformer"]
    assert (parts.content.architecture, parts.prediction, transformer.dtype) == (architecture, "flow", torch.bfloat16)
    transformer.save_config(tmp_path / "config")
    theirs = type(transformer).from_single_file(
        dict(weights), config=str(tmp_path / "config"), local_files_only=True, torch_dtype=torch.bfloat16
    )
    assert files.equal(transformer, theirs)
    assert any(p.abs().max() > 2 for p in transformer.parameters())


def test_qwen_image_is_read_in_its_own_names(files, tmp_path):
    from diffusers import QwenImageTransformer2DModel

    made = files.seeded(
        lambda: QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=2, attention_head_dim=128, num_attention_heads=1,
            joint_attention_dim=3584,
        )
    )  # fmt: skip
    prefixed = {f"model.diffusion_model.{k}": v for k, v in made.state_dict().items()}
    path = files.Made(prefixed).write(tmp_path / "mine.safetensors")
    parts = load_parts(path)
    assert parts.content.architecture == "qwen-image" and files.equal(parts.modules["transformer"], made)
    assert parts.modules["transformer"].config.num_layers == 2
    with pytest.raises(ModelError, match=r"holds no vae and text_encoder: give as components .*Qwen/Qwen-Image"):
        load_pipeline(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [
        ("flux-1-dev", lambda layouts: layouts.flux()),
        ("flux-1-schnell", lambda layouts: layouts.flux(guidance=False)),
        ("chroma", lambda layouts: layouts.chroma()),
        ("lumina-2", lambda layouts: layouts.next_dit(2304, 768, 2304)),
        ("z-image", lambda layouts: layouts.next_dit(3840, 3840, 2560, head=128)),
    ],
)
def test_a_transformer_of_full_width_and_one_layer_is_read_whole(architecture, shapes, layouts, tmp_path):
    wanted = shapes(layouts)
    parts = load_parts(layouts.sparse(tmp_path / "mine.safetensors", wanted, "BF16"))
    transformer = parts.modules["transformer"]
    numbers = sum(torch.Size(s).numel() for n, s in wanted.items() if n != "norm_final.weight")
    assert parts.content.architecture == architecture and parts.prediction == "flow" and not parts.remarks
    assert sum(p.numel() for p in transformer.parameters()) == numbers


@pytest.mark.full_size
@pytest.mark.parametrize(
    ("name", "marks", "prediction"),
    [
        ("sd1", {}, "eps"),
        ("sd2", {f"model.diffusion_model.{SD2_BIAS}": [-1.0, 1.0] * 160}, "v"),
        ("sdxl", {}, "eps"),
        ("sdxl", {"v_pred": [], "ztsnr": []}, "v"),
    ],
)
def test_a_file_of_full_size_is_read_whole_in_no_more_memory_than_it_has(
    name, marks, prediction, files, layouts, tmp_path
):
    made = files.full(name)
    shapes = {n: tuple(v.shape) for n, v in made.weights.items()} | {n: (len(v),) for n, v in marks.items()}
    path = layouts.sparse(tmp_path / "mine.safetensors", shapes, values=marks)
    parts, peak = files.in_a_process(path)
    for part, module in made.modules.items():
        last = "encoder.layers.23." if name == "sd2" else "nothing"
        wanted = {n: list(v.shape) for n, v in module.state_dict().items() if not n.startswith(last)}
        assert parts["shapes"][part] == wanted
    assert parts["prediction"] == prediction and parts["types"] == ["torch.float16"]
    size = path.stat().st_size
    print(f"{name}: file {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB more, {peak / size:.3f} times the file")
    assert peak < 1.2 * size
    path.unlink()
