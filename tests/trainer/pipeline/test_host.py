"""A pipeline as a host: text and pictures in and out, trained on as it is, and left as it was to the bit."""

import copy

import pytest
import torch
from torch import nn
from turbodistill import load_model
from turbodistill.core.card import read_card
from turbodistill.core.lora import LoRA
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.host import Host
from turbodistill.trainer.loop.pixel_backbone import load_vision
from turbodistill.trainer.pipeline.autoencoder import Autoencoder
from turbodistill.trainer.pipeline.host import ModelError


def test_a_training_leaves_the_pipeline_as_it_was(tiny_kit, name, tmp_path):
    """Flags that a user has set stay too: training mode, diffusers' checkpointing, what takes gradients."""
    pipe = tiny_kit.tiny.make(name)
    kind = "unet" if hasattr(pipe, "unet") else "transformer"
    network = getattr(pipe, kind)
    network.enable_gradient_checkpointing()
    pipe.vae.train()
    for k, parameter in enumerate([*network.parameters(), *pipe.vae.parameters()]):
        parameter.requires_grad_(k % 3 > 0)
    model = tiny_kit.host(name, pipe)
    noise = tiny_kit.noise(model)
    bare = tiny_kit.pictures(pipe, name, noise, 2)
    before = tiny_kit.everything(pipe)
    path = tiny_kit.distil(model, tmp_path, gradient_checkpointing=True)
    after = tiny_kit.everything(pipe)
    assert {k: v for k, v in after.items() if v != before[k]} == {} and after.keys() == before.keys()
    assert torch.equal(tiny_kit.pictures(pipe, name, noise, 2), bare)
    card = read_card(path)
    assert (card.base_hash, card.architecture) == (model.base_hash, model.architecture)
    assert card.prediction == model.denoiser.prediction and card.resolution == tiny_kit.size(name)


def test_gradients_flow_as_without_diffusers_own_checkpointing(tiny_kit, name):
    """It would compute the student's blocks again as the teacher's."""
    model = tiny_kit.host(name)
    network = model.denoiser.backbone
    network.requires_grad_(False)
    torch.manual_seed(0)
    lora = LoRA(network, 2)
    for branch in lora.each():
        nn.init.normal_(branch.up, std=0.1)
    cond, noise = model.encode_text(["a red fox", ""]), tiny_kit.noise(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        lora.enabled = True
        loss = model.denoiser(noise, model.denoiser.schedule.sigma(torch.tensor([999.0, 500.0])), cond).square().mean()
        lora.enabled = False
        loss.backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in lora.parameters()])
        lora.zero_grad()
    lora.remove()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    assert sum(g.abs().sum() > 0 for g in found[0]) > 0.85 * len(found[0])


def test_the_host_contract(tiny_kit, name):
    model: Host = tiny_kit.host(name)
    width, height = model.resolution
    assert (width, height) == tiny_kit.size(name) and len(model.base_hash) == 16
    images = torch.rand(2, 3, height, width)
    latents = model.encode_images(images)
    assert latents.shape == (2, *model.latent_shape) and latents.isfinite().all()
    pictures = model.decode(latents)
    assert pictures.shape == images.shape and pictures.min() >= 0 and pictures.max() <= 1
    latents.requires_grad_(True)
    model.decoder(latents).sum().backward()
    assert latents.grad.abs().sum() > 0 and all(p.grad is None for p in model.vae.parameters())
    summary = model.encode_text(["a red fox", "an owl"]).summary
    assert summary.ndim == 2 and not torch.equal(summary[0], summary[1])


def test_latents_are_those_that_the_autoencoder_was_asked_for(tiny_kit, name):
    """Encoding undoes decoding's own statistics: equal to the formulas in the pipelines' sources."""
    pipe = tiny_kit.tiny.make(name)
    width, height = tiny_kit.size(name)
    images, config = torch.rand(1, 3, height, width), pipe.vae.config
    x = 2 * images - 1
    with torch.no_grad():
        if name == "qwen-image":
            z = pipe.vae.encode(x.unsqueeze(2)).latent_dist.mode()[:, :, 0]
            mean, std = (torch.tensor(config[f"latents_{k}"])[:, None, None] for k in ("mean", "std"))
            expected = (z - mean) / std
        elif name == "sana":
            expected = pipe.vae.encode(x).latent * config.scaling_factor
        else:
            expected = (pipe.vae.encode(x).latent_dist.mean - (config.shift_factor or 0)) * config.scaling_factor
    assert torch.allclose(tiny_kit.host(name, pipe).encode_images(images), expected, atol=1e-5)


def test_an_autoencoder_too_narrow_for_float16_is_computed_in_a_copy(tiny_kit):
    vae = tiny_kit.tiny.make("sdxl").vae.half()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    codec = Autoencoder(vae)
    latents = torch.randn(1, 4, 8, 8)
    expected = Autoencoder(copy.deepcopy(vae).float()).decode(latents, (16, 16))
    assert torch.equal(codec.decode(latents, (16, 16)), expected)
    assert all(torch.equal(v, before[k]) and v.dtype == torch.float16 for k, v in vae.state_dict().items())
    assert codec.vae is vae


NARROW = {"sd": "bfloat16", "sdxl": "float32", "sd3": "bfloat16", "flux-dev": "float32", "z-image": "float32"}


@pytest.mark.parametrize(("name", "precision"), NARROW.items())
def test_weights_in_bfloat16_are_trained_on_as_they_are(tiny_kit, name, precision, tmp_path):
    pipe = tiny_kit.tiny.make(name)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.bfloat16)
    model = tiny_kit.host(name, pipe)
    model.encode_text(["a"])  # transformers puts hooks of its own on an encoder that it runs for the first time
    before = tiny_kit.everything(pipe)
    path = tiny_kit.distil(model, tmp_path, precision=precision)
    assert tiny_kit.everything(pipe) == before and model.denoiser.dtype == torch.bfloat16
    from turbodistill.core.student import load_student

    student, *_ = load_student(path, model.denoiser)
    assert {p.dtype for p in student.trained.parameters()} == {torch.float32}
    pictures = student.generate(tiny_kit.noise(model), model.encode_text(["a", "b"]))
    student.release()
    assert pictures.isfinite().all() and pictures.dtype == torch.float32


def test_a_full_copy_of_narrow_weights_is_trained_in_float32(tiny_kit, tmp_path):
    pipe = tiny_kit.tiny.make("sd")
    nn.Module.to(pipe.unet, torch.bfloat16)
    pipe.text_encoder.float()
    model = tiny_kit.host("sd", pipe)
    model.encode_text(["a"])
    before = tiny_kit.everything(pipe)
    path = tiny_kit.distil(model, tmp_path, rank=0)
    assert read_card(path).kind == "full" and tiny_kit.everything(pipe) == before


def test_decoded_pictures_can_judge(tiny_kit, tmp_path, monkeypatch):
    """With a vision transformer over the pipeline's own decoder, whose weights take no gradient."""
    import turbodistill.trainer.loop.start as start

    monkeypatch.setattr(start, "load_vision", lambda _name: load_vision("embedded"))
    pipe = tiny_kit.tiny.make("sd3")
    model = tiny_kit.host("sd3", pipe)
    model.encode_text(["a"])
    before = tiny_kit.everything(pipe)
    tiny_kit.distil(model, tmp_path, pixel_backbone="embedded", updates=1)
    assert tiny_kit.everything(pipe) == before


def test_an_error_in_a_pass_leaves_the_pipeline_as_it_was(tiny_kit, tmp_path):
    class Refused(Exception):
        pass

    pipe = tiny_kit.tiny.make("flux-schnell")
    model = tiny_kit.host("flux-schnell", pipe)
    model.encode_text(["a"])
    before, passes = tiny_kit.everything(pipe), iter(range(100))

    def refuse(*_):
        if next(passes) == 20:
            raise Refused

    hook = pipe.transformer.register_forward_pre_hook(refuse)
    with pytest.raises(Refused):
        tiny_kit.distil(model, tmp_path)
    hook.remove()
    assert next(passes) == 21
    assert tiny_kit.everything(pipe) == before


def test_a_model_works_at_other_sizes(tiny_kit, name):
    model = tiny_kit.host(name)
    width, height = (2 * side for side in model.resolution)
    other = model.sized(width, height // 2)
    assert other.resolution == (width, height // 2) and model.resolution == tiny_kit.size(name)
    assert other.latent_shape[1:] == (model.latent_shape[1], 2 * model.latent_shape[2])
    cond = other.encode_text(["a"])
    x0 = other.denoiser(torch.randn(1, *other.latent_shape), torch.ones(1), cond)
    assert x0.shape == (1, *other.latent_shape)
    if name in ("flux-dev", "qwen-image"):  # their noise levels depend on it
        assert other.denoiser.schedule.shift > model.denoiser.schedule.shift
    with pytest.raises(ModelError, match="give multiples of"):
        model.sized(width + 1, height)


def test_the_shift_of_a_size_is_the_pipeline_s(tiny_kit):
    """As its scheduler shifts the levels of a run."""
    for name in ("flux-dev", "qwen-image"):
        model = tiny_kit.host(name)
        model.pipe.scheduler = model.pipe.scheduler.from_config(model.pipe.scheduler.config, shift_terminal=None)
        tiny_kit.pictures(model.pipe, name, tiny_kit.noise(model), 4)
        theirs = model.pipe.scheduler.sigmas[:-1]
        ours = model.denoiser.schedule.sigma(torch.tensor([999.0, 749.0, 499.0, 249.0]))
        assert torch.allclose(theirs, ours, atol=1e-4)


def test_without_a_size_it_is_the_pipeline_s_own(tiny_kit):
    sizes = {name: load_model(tiny_kit.tiny.make(name)).resolution for name in ("sd", "sd3", "sana", "lumina2")}
    assert sizes == {"sd": (16, 16), "sd3": (16, 16), "sana": (512, 512), "lumina2": (64, 64)}
    assert load_model(tiny_kit.tiny.make("z-image")).resolution == (256, 256)  # 128 latents


def test_the_name_is_that_of_the_folder(tiny_kit, tmp_path):
    pipe = tiny_kit.tiny.make("sd")
    assert load_model(pipe).name == "StableDiffusionPipeline"
    pipe.save_pretrained(tmp_path / "my-model")
    again = type(pipe).from_pretrained(tmp_path / "my-model", safety_checker=None)
    assert load_model(again).name == "my-model" and load_model(again).base_hash == load_model(pipe).base_hash


def test_targets_of_a_lora_are_found_in_every_layout(tiny_kit, name):
    network = tiny_kit.host(name).denoiser.backbone
    count = {}
    for targets in ("attention", "transformer", "all"):
        lora = LoRA(network, 1, targets=targets)
        count[targets] = len(lora.names)
        lora.remove()
    assert 0 < count["attention"] < count["transformer"] <= count["all"]
    with pytest.raises(ValueError, match="match no layer"):
        LoRA(network, 1, targets="nothing here")


def test_a_full_copy_beside_a_lora_of_the_teacher_is_refused_before_pairs(tiny_kit, tmp_path):
    pytest.importorskip("peft", reason="needs peft: pip install 'turbodistill[test]'")
    from peft import LoraConfig

    pipe = tiny_kit.tiny.make("sd3")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ConfigError, match="carries a LoRA: fuse it"):
        tiny_kit.distil(tiny_kit.host("sd3", pipe), tmp_path, rank=0)
    assert not list(tmp_path.glob("**/*.safetensors"))
