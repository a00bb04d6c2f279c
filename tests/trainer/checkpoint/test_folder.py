"""A diffusers folder is read as it is stored, or refused in words that name what is wrong with it."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from turbodistill.trainer.checkpoint.errors import ModelError
from turbodistill.trainer.checkpoint.folder import choose_variant
from turbodistill.trainer.checkpoint.load import architecture_of_module, load_pipeline
from turbodistill.trainer.pipeline.kinds import default_size, kind_of, prediction_of, schedule_of

_spec = importlib.util.spec_from_file_location("turbodistill_refused", Path(__file__).with_name("refused.py"))
refused = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refused)
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipes(small_sd1, small_sd2, small_sdxl, vocabulary, tmp_path_factory):
    """Small pipelines in float16."""
    place = tmp_path_factory.mktemp("files")
    made = {"sd1": small_sd1, "sd2": small_sd2, "sdxl": small_sdxl}
    return {
        name: load_pipeline(checkpoint.write(place / f"{name}.safetensors"), tokenizer=vocabulary).pipe
        for name, checkpoint in made.items()
    }


@pytest.fixture
def folder(pipes, tmp_path):
    """One of Stable Diffusion 1, to be damaged."""
    pipes["sd1"].save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(
    "how", [{}, {"variant": "fp16"}, {"max_shard_size": "1MB"}, {"variant": "fp16", "max_shard_size": "1MB"}], ids=str
)
def test_a_folder_is_read_as_it_is_stored(name, how, pipes, files, tmp_path):
    pipes[name].save_pretrained(tmp_path / "mine", **how)
    assert ("max_shard_size" in how) == bool(list(tmp_path.rglob("*.index*.json")))
    loaded = load_pipeline(str(tmp_path / "mine"))
    assert (loaded.name, loaded.pipe.scheduler.config.prediction_type, loaded.remarks) == ("mine", "epsilon", ())
    assert type(loaded.pipe) is type(pipes[name])
    for part, module in pipes[name].components.items():
        if isinstance(module, torch.nn.Module):
            assert files.equal(getattr(loaded.pipe, part), module), part
    architecture = architecture_of_module(loaded.pipe.unet)
    assert architecture.startswith("stable-diffusion-" + {"sd1": "v1", "sd2": "v2", "sdxl": "xl"}[name])
    side = {"sd1": 128, "sd2": 128, "sdxl": 256}[name]  # of latents half as large
    assert default_size(loaded.pipe, kind_of(loaded.pipe)) == (side, side)


def test_a_folder_is_cast_where_a_type_is_asked_for(folder):
    pipe = load_pipeline(folder, dtype=torch.float32).pipe
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float32}


def test_a_zero_terminal_v_model_is_told_by_its_scheduler(folder):
    scheduler = folder / "scheduler" / "scheduler_config.json"
    change(scheduler, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipe = load_pipeline(folder).pipe
    kind = kind_of(pipe)
    assert prediction_of(pipe, kind) == "v" and schedule_of(pipe, kind, (64, 64)).sigmas[-1] > 4000
    change(scheduler, prediction_type="epsilon", rescale_betas_zero_snr=False)
    assert load_pipeline(folder, prediction="v").pipe.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None, (None, ["model.safetensors"])),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", ("fp16", ["model.fp16.safetensors"])),
        (["model.fp16.safetensors", "model.non_ema.safetensors"], None, ("fp16", ["model.fp16.safetensors"])),
        (["model.bf16.safetensors", "model.bin"], None, ("bf16", ["model.bf16.safetensors"])),
        (["model.safetensors"], "fp16", ("fp16", [])),
        (
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
            None,
            (None, ["model.safetensors.index.json"]),
        ),
        (
            ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"],
            None,
            ("fp16", ["model.safetensors.index.fp16.json"]),
        ),
        (["config.json"], None, (None, [])),
    ],
)
def test_the_variant_that_is_there_is_found(names, variant, expected):
    assert choose_variant(names, variant) == expected


def remove(name):
    return lambda folder: (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name)


def rewrite(**changes):
    def apply(folder):
        tensors = load_file(folder / UNET)
        tensors |= {k.replace("__", "."): v for k, v in changes.items()}
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / UNET, {"format": "pt"})

    return apply


def to_pickle(folder):
    torch.save(load_file(folder / UNET), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / UNET).unlink()


def halve(folder):
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:5000])


def index(**values):
    return lambda folder: change(folder / "model_index.json", **values)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (remove("model_index.json"), r"mine is no diffusers folder, it has no model_index.json: check the name"),
        (remove(UNET), r"its weights of unet are missing: get it again"),
        (remove("unet"), r"its weights of unet are missing"),
        (remove("unet/config.json"), r"its unet cannot be loaded"),
        (remove("tokenizer"), r"lacks its folder tokenizer"),
        (remove("scheduler"), r"lacks its folder scheduler"),
        (to_pickle, r"its weights of unet are pickles alone \(.*bin\), .* save it with save_pretrained"),
        (halve, r"is no complete safetensors file .* get it again"),
        (rewrite(conv_out__bias=None), r"1 weights of unet are missing, such as conv_out.bias"),
        (rewrite(more__bias=torch.zeros(1)), r"1 weights of unet are of no layer that is known, such as more.bias"),
        (rewrite(conv_out__bias=torch.zeros(9)), r"its unet cannot be loaded"),
        (rewrite(conv_out__bias=torch.full((4,), torch.nan).half()), r"the unet's weight conv_out.bias .* no number"),
        (lambda folder: (folder / "model_index.json").write_text("{"), r"model_index.json cannot be read"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), r"holds no description of a model"),
        (index(unet=["my_code", "MyUNet"]), r"its unet needs code of its own \(my_code\), which is not run"),
        (index(unet=["diffusers", "NoSuchUNet"]), r"is a NoSuchUNet, which the installed diffusers does not know"),
        (index(unet=[None, None]), r"has no denoiser"),
        (index(vae=None), r"has no vae"),
        *((index(_class_name=name), told) for name, told in refused.FOLDERS),
    ],
)
def test_a_folder_that_cannot_be_used_is_told(damage, told, folder):
    damage(folder)
    with pytest.raises(ModelError, match=told) as error:
        load_pipeline(folder)
    assert "mine" in str(error.value) and "\n" not in str(error.value)[:200]


def test_a_shard_that_is_missing_is_named(pipes, tmp_path):
    pipes["sd1"].save_pretrained(tmp_path / "mine", max_shard_size="1MB")
    shard = sorted((tmp_path / "mine" / "unet").glob("*-of-*"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"1 of its .* weight files are missing, such as {shard.name}"):
        load_pipeline(tmp_path / "mine")


def test_a_variant_that_is_not_there_is_told(folder):
    with pytest.raises(ModelError, match=r"its weights of \w+ are missing in the variant bf16: get it again"):
        load_pipeline(folder, variant="bf16")


def test_a_part_of_a_folder_and_a_folder_of_files_say_what_to_give(folder, tmp_path):
    with pytest.raises(ModelError, match="it is a part of one; give the folder above it"):
        load_pipeline(folder / "unet")
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match=r"it holds b\.safetensors: give one of these files"):
        load_pipeline(tmp_path)


@pytest.fixture
def words(tmp_path):
    """A tokenizer of whole words, in the form that T5's and Qwen's come in."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "fox": 4}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def flow_pipe(kind, files, vocabulary, words):
    """A small pipeline of one of the transformers' classes."""
    import diffusers
    import transformers
    from transformers import CLIPTokenizer, T5Config, T5EncoderModel

    clip = CLIPTokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    t5 = files.seeded(
        lambda: T5EncoderModel(T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    )
    vae = files.vae(16, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if kind == "StableDiffusion3Pipeline":
        size = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
        transformer = files.seeded(
            lambda: diffusers.SD3Transformer2DModel(
                sample_size=32, joint_attention_dim=32, pooled_projection_dim=256, **size
            )
        )
        texts = (files.clip(128, True), clip, files.clip(128, True), clip, None, None)
        return diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae, *texts)
    if kind == "FluxPipeline":
        size = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
        transformer = files.seeded(
            lambda: diffusers.FluxTransformer2DModel(
                joint_attention_dim=16, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(4, 4, 8), **size
            )
        )
        return diffusers.FluxPipeline(scheduler, vae, files.clip(64), clip, t5, words, transformer)
    config = transformers.Qwen3Config(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    transformer = files.seeded(
        lambda: diffusers.ZImageTransformer2DModel(
            dim=256, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16
        )
    )
    qwen = files.seeded(lambda: transformers.Qwen3Model(config))
    return diffusers.ZImagePipeline(scheduler, vae, qwen, words, transformer)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("StableDiffusion3Pipeline", "stable-diffusion-v3-medium"),
        ("FluxPipeline", "flux-1-dev"),
        ("ZImagePipeline", "z-image"),
    ],
)
@pytest.mark.parametrize("how", [{}, {"variant": "fp16", "max_shard_size": "20KB"}], ids=str)
def test_a_flow_model_s_folder_is_read_as_it_is_stored(kind, architecture, how, files, vocabulary, words, tmp_path):
    pipe = flow_pipe(kind, files, vocabulary, words)
    pipe.save_pretrained(tmp_path / "mine", **how)
    loaded = load_pipeline(tmp_path / "mine")
    assert (type(loaded.pipe).__name__, architecture_of_module(loaded.pipe.transformer)) == (kind, architecture)
    assert loaded.remarks == ()
    for part, module in pipe.components.items():
        found = getattr(loaded.pipe, part)
        assert (found is None) == (module is None)
        if isinstance(module, torch.nn.Module):  # T5's class keeps some of its weights in float32, whatever is asked
            assert torch.float16 in {p.dtype for p in found.parameters()}
            assert files.equal(found.float(), module.float()), part
