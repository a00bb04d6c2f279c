"""A student's file in diffusers' own LoRA loader, and a pipeline that carries a LoRA as the teacher."""

import pytest
import torch
from safetensors.torch import load_file
from turbodistill import scheduler_of, use_student
from turbodistill.core.card import read_card
from turbodistill.core.student import load_student

peft = pytest.importorskip("peft", reason="needs peft: pip install 'turbodistill[test]'")


def test_load_lora_weights_makes_the_same_picture(tiny_kit, students, name, caplog):
    """To 1e-4, but for a zero-terminal schedule and LCM's first noise (`scheduler_of`): 1 in 200."""
    made = students(name)
    noise = tiny_kit.noise(made.model)
    more = {"guidance_scale": 3.5} if name == "flux-dev" else {}
    with use_student(made.pipe, made.path):
        expected = tiny_kit.pictures(made.pipe, name, noise, 1, "latent", **more)
    kept, made.pipe.scheduler = made.pipe.scheduler, scheduler_of(read_card(made.path), made.pipe)
    bare = tiny_kit.pictures(made.pipe, name, noise, 1, "latent", **more)
    made.pipe.load_lora_weights(made.path)
    found = tiny_kit.pictures(made.pipe, name, noise, 1, "latent", **more)
    made.pipe.unload_lora_weights()
    made.pipe.scheduler = kept
    near = (5e-3 if name in ("sd", "sd-v", "sdxl") else 1e-4) * float(expected.abs().max())
    assert torch.allclose(found, expected, atol=near) and not torch.allclose(bare, expected, atol=4 * near)
    assert not [r for r in caplog.records if "unexpected keys" in r.message]


def test_every_layer_of_a_file_is_loaded(tiny_kit, students, name):
    made = students(name)
    layers = sum(key.endswith(("lora_down.weight", "lora_A.weight")) for key in load_file(made.path))
    made.pipe.load_lora_weights(made.path, adapter_name="student")
    network = made.model.denoiser.backbone
    assert sum("lora_A" in key and key.endswith("weight") for key, _ in network.named_parameters()) == layers
    made.pipe.unload_lora_weights()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux-schnell"])
def test_a_lora_that_is_loaded_belongs_to_the_teacher(tiny_kit, students, name, fused, tmp_path):
    """It stays through a training, beside the student, and after it."""
    pipe = tiny_kit.tiny.make(name)
    bare = tiny_kit.host(name, pipe)
    style = students(name)
    noise = tiny_kit.noise(bare)
    plain = tiny_kit.pictures(pipe, name, noise, 2)
    pipe.load_lora_weights(style.path, adapter_name="style")
    if fused:
        pipe.fuse_lora()
    model = tiny_kit.host(name, pipe)
    assert model.base_hash != bare.base_hash and model.architecture == bare.architecture
    styled = tiny_kit.pictures(pipe, name, noise, 2)
    before = tiny_kit.everything(pipe)
    path = tiny_kit.distil(model, tmp_path)
    assert tiny_kit.everything(pipe) == before and torch.equal(tiny_kit.pictures(pipe, name, noise, 2), styled)
    names = set(load_file(path))
    assert names == set(load_file(style.path))  # of its layers, not of the LoRA's beside them

    student, _, warning = load_student(path, model.denoiser)
    expected = student.generate(noise, model.encode_text(["a red fox", "an owl"]))
    with student.merged():
        merged = student.generate(noise, model.encode_text(["a red fox", "an owl"]))
    student.release()
    assert warning == "" and torch.allclose(expected, merged, atol=1e-3)
    with use_student(pipe, path) as used:
        found = tiny_kit.pictures(pipe, name, noise, 1, "latent")
        assert used.warning == ""
    assert torch.allclose(found, tiny_kit.latents_for(name, expected), atol=1e-4)
    assert torch.equal(tiny_kit.pictures(pipe, name, noise, 2), styled) and not torch.equal(styled, plain)
    if fused:
        pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.allclose(tiny_kit.pictures(pipe, name, noise, 2), plain, atol=1e-5)
    with use_student(pipe, path) as used:
        assert "the loaded model is another" in used.warning


def test_a_student_stays_on_a_pipeline_that_moves_its_parts(tiny_kit, students):
    """As `enable_model_cpu_offload` does, here from the CPU to the CPU."""
    from accelerate.hooks import CpuOffload, add_hook_to_module

    made = students("sd3")
    noise = tiny_kit.noise(made.model)
    with use_student(made.pipe, made.path):
        expected = tiny_kit.pictures(made.pipe, "sd3", noise)
    for part in (made.pipe.text_encoder, made.pipe.transformer, made.pipe.vae):
        add_hook_to_module(part, CpuOffload("cpu"))
    with use_student(made.pipe, made.path):
        assert torch.equal(tiny_kit.pictures(made.pipe, "sd3", noise), expected)
    made.pipe.remove_all_hooks()
