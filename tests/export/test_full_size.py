"""Stable Diffusion 1.5, 2.1 and XL in full size: what diffusers' own loaders read of every export is the same."""

import importlib.util
import json
import logging
import shutil
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.full_size, pytest.mark.timeout(3000)]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def full():
    spec = importlib.util.spec_from_file_location("turbodistill_full_size", HERE / "full_size.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl", "sdxl-v"])
def model(request, full, kit, tmp_path_factory):
    """A checkpoint, a student that two updates made of it, and its exports; one at a time, for they are large."""
    full.skip_without_memory(request.param)
    place = tmp_path_factory.mktemp(request.param)
    base = full.write(place / "base.safetensors", request.param)
    tokenizer = kit.write_tokenizer(place / "tokenizer")
    full.apart(full.distil, place, request.param, tokenizer)
    student = place / "student.safetensors"
    kit.export(student, "diffusers", place / "folder", base=base, tokenizer=tokenizer)
    kit.export(student, "merged", place / "merged.safetensors", base=base)
    yield request.param, place
    shutil.rmtree(place)


def pipeline(full, kind):
    import diffusers

    xl = kind.startswith("sdxl")
    return diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline


def contents(pipe):
    """Of each part, its tensors' names, kinds and contents as checksums: two pipelines would take too much memory."""
    parts = {n: p for n, p in pipe.components.items() if isinstance(p, torch.nn.Module)}
    return {
        name: {k: (v.dtype, v.shape, zlib.crc32(v.contiguous().view(torch.uint8).numpy()))
               for k, v in part.state_dict().items()}
        for name, part in parts.items()
    }  # fmt: skip


def test_diffusers_reads_the_same_of_the_merged_file_and_of_the_folder(full, model, caplog):
    """Each part to the bit, every name found, none left over."""
    kind, place = model
    more = {} if kind.startswith("sdxl") else {"feature_extractor": None}
    with caplog.at_level(logging.WARNING):
        pipe = pipeline(full, kind).from_pretrained(place / "folder", torch_dtype=torch.float16)
        of_folder, settings = contents(pipe), pipe.scheduler.config
        del pipe
        pipe = pipeline(full, kind).from_single_file(
            str(place / "merged.safetensors"), config=str(place / "folder"), torch_dtype=torch.float16,
            local_files_only=True, **more,
        )  # fmt: skip
    assert not [r.message for r in caplog.records if "not used" in r.message or "newly initialized" in r.message]
    of_file = contents(pipe)
    assert of_folder.keys() == of_file.keys()
    for name in of_file:
        assert of_folder[name] == of_file[name], name
    assert settings.timestep_spacing == "trailing"
    wanted = {"eps": "epsilon", "v": "v_prediction"}[full.KINDS[kind].prediction]
    assert settings.prediction_type == wanted
    assert settings.rescale_betas_zero_snr == ("ztsnr" in full.KINDS[kind].marks)


def test_diffusers_makes_the_student_s_picture_in_one_step(full, model, kit):
    kind, place = model
    full.apart(full.one_step, place, kind, place / "tokenizer")
    given, expected = (load_file(place / f"{name}.safetensors") for name in ("inputs", "expected"))
    student, teacher = expected["student"], expected["teacher"]
    pipe = pipeline(full, kind).from_pretrained(place / "folder", torch_dtype=torch.float32)
    more = {"pooled_prompt_embeds": given["y"][:, :1280]} if kind.startswith("sdxl") else {}
    made = pipe(
        prompt_embeds=given["states"], latents=given["x"] / given["sigma"], num_inference_steps=1, guidance_scale=0,
        height=128, width=128, output_type="latent", **more,
    ).images  # fmt: skip
    assert kit.gap(made, student) < 0.02 < 0.1 < kit.gap(teacher, student)  # to float16's rounding of the weights


def test_the_merged_weights_are_the_base_s_and_the_student_s_change(full, model):
    kind, place = model
    base, merged, lora = (load_file(place / f"{n}.safetensors") for n in ("base", "merged", "student"))
    assert base.keys() == merged.keys()
    unet = full.modules(full.KINDS[kind])["unet"].state_dict()
    diffusers_names = {ours: theirs for theirs, ours in full.to_single_file(unet).items()}
    changed = 0
    for name in base:
        module = name.removeprefix("model.diffusion_model.")
        if not kind.startswith("sdxl"):  # a LoRA of Stable Diffusion 1 and 2 has diffusers' names
            module = diffusers_names.get(module, module)
        key = "lora_unet_" + module.removesuffix(".weight").replace(".", "_")
        if f"{key}.lora_up.weight" not in lora or not name.endswith(".weight"):
            assert torch.equal(base[name], merged[name]), name
            continue
        changed += 1
        if changed % 20 == 0:  # some of them: all would take minutes
            up, down = (lora[f"{key}.lora_{part}.weight"].float().flatten(1) for part in ("up", "down"))
            expected = base[name].float() + (up @ down).reshape(base[name].shape)
            assert torch.equal(merged[name], expected.half()), name
    assert 3 * changed == len(lora)


def test_its_marks_are_kept(full, model):
    kind, place = model
    with (place / "merged.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert set(full.KINDS[kind].marks) == {"v_pred", "ztsnr"} & set(header)


def test_diffusers_loads_its_lora_with_no_key_left_over(full, model, kit, peft, caplog):
    """On the bare UNet's shape: only the names are looked at."""
    kind, place = model
    pipe = pipeline(full, kind)
    for style in ("kohya", "peft"):
        kit.export(place / "student.safetensors", style, place / "lora.safetensors", force=True)
        unet = full.modules(full.KINDS[kind])["unet"]
        tensors, alphas = pipe.lora_state_dict(load_file(place / "lora.safetensors"), unet_config=unet.config)
        with caplog.at_level(logging.WARNING):
            pipe.load_lora_into_unet(tensors, network_alphas=alphas, unet=unet, low_cpu_mem_usage=True)
        assert not [r.message for r in caplog.records if "unexpected keys" in r.message or "missing keys" in r.message]
        loaded = [n for n, _ in unet.named_parameters() if ".lora_" in n]
        assert len(loaded) == 2 * len([k for k in load_file(place / "student.safetensors") if "lora_up" in k])
