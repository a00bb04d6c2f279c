"""Checkpoints through diffusers' classes: loaded right, equal to diffusers' own sampling, or refused with a reason."""

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from turbodistill.core.denoiser import Guidance, Guided
from turbodistill.core.sampling import sample_euler, trailing_sigmas
from turbodistill.core.student import Student, load_student, student_bytes
from turbodistill.demo.files import HEADER, MODEL
from turbodistill.trainer.loop.distill import distill
from turbodistill.trainer.pipeline.host import ModelError
from turbodistill.trainer.pipeline.load import load_model
from turbodistill.trainer.run import student_file


@pytest.fixture(scope="module")
def tiny(pipeline_folder):
    return load_model(pipeline_folder, "cpu")


@pytest.fixture(scope="module")
def embedded():
    if not MODEL.exists():
        pytest.skip("the embedded model is not in this checkout: demo/model.safetensors")
    return load_model(None, "cpu")


def test_a_folder_is_loaded_frozen_with_its_sizes(tiny):
    assert (tiny.latent_shape, tiny.resolution, tiny.name) == ((4, 8, 8), (16, 16), "tiny-sd")
    assert tiny.denoiser.prediction == "eps" and tiny.architecture == "unknown"
    assert not any(p.requires_grad for m in (tiny.denoiser.backbone, tiny.vae) for p in m.parameters())
    assert not tiny.denoiser.backbone.training


def test_what_is_neither_a_pipeline_nor_a_name_is_told(tiny):
    for source, kind in ((tiny.pipe.unet, "UNet2DConditionModel"), (42, "int")):
        with pytest.raises(ModelError, match=f"the model is a {kind}: give a pipeline of diffusers"):
            load_model(source)


@pytest.mark.parametrize(
    ("width", "predicts", "expected"),
    [
        (1024, "epsilon", ("eps", "stable-diffusion-v2")),  # Stable Diffusion 2 base
        (768, "v_prediction", ("v", "stable-diffusion-v1")),
    ],
)
def test_the_architecture_is_not_guessed_from_the_prediction_type(
    pipeline_folder, toys, tmp_path, width, predicts, expected
):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    small = pipe.text_encoder.config.to_dict() | {"hidden_size": width, "num_attention_heads": 2}
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=predicts)
    parts = {"text_encoder": CLIPTextModel(CLIPTextConfig(**small)), "unet": toys.small_unet(width)}
    StableDiffusionPipeline.from_pretrained(
        pipeline_folder, safety_checker=None, scheduler=scheduler, **parts
    ).save_pretrained(tmp_path / "model")
    host = load_model(tmp_path / "model", "cpu")
    assert (host.denoiser.prediction, host.architecture) == expected


def test_text_and_pictures_go_in_and_out(tiny):
    cond = tiny.encode_text(["a fox", "", "a fox"])
    assert cond.context.shape == (3, 16, 16) and torch.equal(cond.context[0], cond.context[2])
    assert not torch.equal(cond.context[0], cond.context[1])
    images = torch.rand(2, 3, 16, 16)
    latents = tiny.encode_images(images)
    assert latents.shape == (2, 4, 8, 8)
    pictures = tiny.decode(latents)
    assert pictures.shape == images.shape and pictures.min() >= 0 and pictures.max() <= 1
    assert torch.allclose(tiny.decode(latents[:1]), pictures[:1], atol=1e-5)


def test_the_decoders_maps_keep_the_order_that_a_cpu_is_fast_in(tiny):
    """Its attention leaves the channels last; the blocks after it get them first again."""
    seen = []
    hook = tiny.vae.decoder.up_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tiny.decode(torch.randn(2, 4, 8, 8))
    hook.remove()
    assert seen[0].shape[0] == 2 and seen[0].is_contiguous()


@pytest.mark.parametrize("steps", [1, 4])
def test_sampling_equals_diffusers_own_pipeline(tiny, pipeline_folder, steps):
    """DDIM on trailing timesteps with guidance is Euler's method in k-diffusion's space."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    # To the picture itself; by default diffusers ends at timestep 0, a tenth of a percent of noise above it.
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    pipe.set_progress_bar_config(disable=True)
    noise, prompts = torch.randn(2, 4, 8, 8), ["a red fox", "an owl"]
    theirs = pipe(
        prompts, num_inference_steps=steps, guidance_scale=3.0, latents=noise.clone(), output_type="latent"
    ).images

    schedule = tiny.denoiser.schedule
    sigmas = trailing_sigmas(schedule, steps)
    model = Guided(tiny.denoiser, tiny.encode_text(prompts), tiny.encode_text([""]), Guidance(3.0))
    # diffusers takes the noise for alpha x: in sigma's space that is noise / alpha.
    with torch.no_grad():
        ours = sample_euler(model, noise / schedule.alpha_sigma(sigmas[:1])[0], sigmas)
    assert torch.allclose(theirs, ours, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_step_equals_the_unet_call_and_the_schedulers_step(tiny, pipeline_folder, tmp_path, prediction):
    """As a LoRA of rank 4 in one step: what a user of diffusers would compute by hand."""
    from diffusers import DDIMScheduler

    folder = tmp_path / "model"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": prediction}))
    host = load_model(folder, "cpu")
    assert host.denoiser.prediction == {"epsilon": "eps", "v_prediction": "v"}[prediction]
    student = Student(host.denoiser, 4)
    with torch.no_grad():
        for branch in student.lora.branches:
            branch.up.normal_(std=0.05)
    noise, cond = torch.randn(2, 4, 8, 8), host.encode_text(["a fox", "an owl"])
    ours = student.generate(noise, cond)

    schedule = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", set_alpha_to_one=True)
    schedule.set_timesteps(1)
    assert schedule.timesteps.tolist() == [999]
    x = (1 - schedule.alphas_cumprod[999]) ** 0.5 * noise  # all of it noise: the picture's part is alpha x 0
    with torch.no_grad(), student.switched_on():
        output = host.denoiser.backbone(x, 999, cond.context).sample
    theirs = schedule.step(output, 999, x).pred_original_sample
    assert torch.allclose(ours, theirs, atol=1e-3, rtol=1e-4)
    student.release()


def test_a_batch_equals_its_single_pictures(tiny):
    student = Student(tiny.denoiser, 4)
    noise, cond = torch.randn(3, 4, 8, 8), tiny.encode_text(["a", "b", "c"])
    together = student.generate(noise, cond)
    for i in range(3):
        alone = student.generate(noise[i : i + 1], cond.rows(slice(i, i + 1)))
        assert torch.allclose(together[i : i + 1], alone, atol=1e-4)
    student.release()


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_a_student_of_a_diffusers_unet_is_written_in_names_that_every_host_loads(kit, tiny, tmp_path, rank):
    settings = kit.config(rank=rank, taps="")
    samples = kit.pairs(tiny, settings, tmp_path)
    state = kit.state(tiny, settings, samples)
    list(distill(state, samples, tiny.encode_text([""])))
    path = tmp_path / "student.safetensors"
    path.write_bytes(student_bytes(state.student, student_file.make_card(tiny, state, {}), torch.float32))
    names = set(kit.tensors(path))
    prefix = "lora_unet_down_blocks_0_resnets_0_" if rank else "model.diffusion_model.input_blocks.1.0."
    assert any(n.startswith(prefix) for n in names) and not any(
        ("input_blocks" if rank else "down_") in n for n in names
    )
    again, _, warning = load_student(path, tiny.denoiser)
    noise, cond = torch.randn(2, 4, 8, 8), tiny.encode_text(["a", "b"])
    assert warning == "" and torch.allclose(again.generate(noise, cond), state.student.generate(noise, cond), atol=1e-4)
    state.student.release()
    again.release()


def test_a_lora_for_attention_does_not_fit_a_unet_without(kit, tiny, tmp_path):
    from turbodistill.core.card import CardError

    *_, finished = kit.go(tiny, kit.config(taps="", targets="transformer"), tmp_path)
    bare = kit.unet_denoiser(attention=False)
    with pytest.raises((CardError, ValueError), match="match"):
        load_student(finished.path, bare)
    assert not any(m._forward_hooks for m in bare.backbone.modules())


def test_the_embedded_model_is_whole(embedded):
    assert embedded.latent_shape[0] == 4 and embedded.resolution == (64, 64)
    cond = embedded.encode_text(["a red fox, in flat noto style", ""])
    noise = torch.randn(2, *embedded.latent_shape)
    with torch.no_grad():
        x0 = embedded.denoiser(noise * 14.6, torch.full((2,), 14.6), cond)
    assert x0.shape == noise.shape and x0.isfinite().all()
    assert embedded.decode(noise).shape == (2, 3, 64, 64)
    assert embedded.encode_images(torch.rand(2, 3, 64, 64)).shape == noise.shape
    with safe_open(MODEL, "pt") as file:
        names = set(file.keys())
    assert any(n.startswith("model.diffusion_model.input_blocks.") for n in names)
    assert any(n.startswith("first_stage_model.decoder.") for n in names)


def header_only(path, model, tensors):
    save_file(tensors, path, {HEADER: json.dumps(model)})


def test_a_file_that_holds_other_names_or_shapes_than_its_header_is_refused(embedded, tmp_path):
    with safe_open(MODEL, "pt") as file:
        model = json.loads(file.metadata()[HEADER])
    path = tmp_path / "other.safetensors"
    header_only(path, model, {"some.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match="the denoiser does not fit the architecture in the header"):
        load_model(path, "cpu")
    tensors = load_file(MODEL)
    name = next(n for n in tensors if n.startswith("cond_stage_model."))
    header_only(path, model, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ModelError, match=r"the text encoder does not fit .* 1 are missing"):
        load_model(path, "cpu")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    header_only(path, model, tensors | {name: tensors[name][:4].clone()})
    with pytest.raises(ModelError, match="the denoiser does not fit"):
        load_model(path, "cpu")


def write_pickle(path):
    torch.save({"state_dict": {"a": torch.zeros(3)}}, path)


def write_truncated(path):
    save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: None, "does not exist: check the name"),
        (lambda path: path.write_bytes(b""), "is no complete safetensors file"),
        (write_truncated, "is no complete safetensors file .* get it again"),
        (write_pickle, "is a pickle file, which can run code and is not read: load it once in ComfyUI"),
        (
            lambda path: save_file({"a": torch.zeros(3)}, path),
            "is of a kind that is not known .its weights are called a",
        ),
        (lambda path: header_only(path, {}, {"a": torch.zeros(1)}), r"header cannot be read \(KeyError"),
        (lambda path: save_file({"a": torch.zeros(1)}, path, {HEADER: "{"}), "header cannot be read"),
        (lambda path: path.mkdir(), "is no diffusers folder, it has no model_index.json"),
    ],
)
def test_a_bad_checkpoint_is_told(tmp_path, write, told):
    path = tmp_path / "model.safetensors"
    write(path)
    with pytest.raises(ModelError, match=told):
        load_model(path, "cpu")


def truncate_unet(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def truncate_text_encoder(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def remove_vae(folder):
    shutil.rmtree(folder / "vae")


def rename_weights(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({f"other.{k}": v for k, v in load_file(path).items()}, path, {"format": "pt"})


def drop_a_weight(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path, {"format": "pt"})


def widen(folder):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_out_channels": [64, 64]}))


def predict_samples(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))


@pytest.mark.parametrize(
    "damage",
    [truncate_unet, truncate_text_encoder, remove_vae, rename_weights, drop_a_weight, widen, predict_samples],
)
def test_a_bad_folder_is_told(pipeline_folder, tmp_path, damage):
    folder = tmp_path / "broken-sd"
    shutil.copytree(pipeline_folder, folder)
    damage(folder)
    with pytest.raises(ModelError, match="broken-sd"):
        load_model(folder, "cpu")


def test_missing_diffusers_says_what_to_install(embedded, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match=r"loading a model here needs .*: pip install 'turbodistill\[demo\]'"):
        load_model(None, "cpu")
