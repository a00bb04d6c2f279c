"""`turbodistill info`: every file is told in words, and never with a traceback."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from turbodistill.app import cli
from turbodistill.core.card import StudentCard
from turbodistill.demo import files
from turbodistill.trainer.checkpoint.errors import ModelError
from turbodistill.trainer.checkpoint.header import read_header
from turbodistill.trainer.checkpoint.identify import identify
from turbodistill.trainer.run.state_file import write_state
from turbodistill.trainer.run.training import BEST, STATE

WHOLE = "model.diffusion_model."
VAE = {"first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3)}
CLIP = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": (8,)}
CARD = StudentCard("full", "my model", "0" * 16, "toy", "eps", "eps", (999,), 1.0, (64, 64))


def unet(text):
    return {
        f"{WHOLE}input_blocks.0.0.weight": (8, 4, 3, 3),
        f"{WHOLE}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, text),
    }


def write(path, shapes, metadata=None, dtype=torch.float16):
    save_file({n: torch.zeros(s, dtype=dtype) for n, s in shapes.items()}, path, metadata)
    return path


def lora(layer, text=768, rank=4):
    return {f"{layer}.lora_down.weight": (rank, text), f"{layer}.lora_up.weight": (8, rank)}


def told(capsys, path, code=0):
    assert cli.main(["info", str(path)]) == code
    found = capsys.readouterr()
    return found.out if code == 0 else found.err


@pytest.mark.parametrize(
    ("name", "shapes", "words"),
    [
        (
            "a",
            unet(768) | VAE | CLIP,
            "A checkpoint of stable-diffusion-v1, which predicts eps (noise).\n"
            "It holds the denoiser, the autoencoder, CLIP L: 0.0 million numbers in float16.\n"
            "Use: --model of `turbodistill distill`, and of `sample` with a student or a few-step LoRA (--student).\n",
        ),
        ("a", unet(768), "It lacks an autoencoder and text encoders: give them with --components"),
        ("a", unet(2048) | {"v_pred": (), "ztsnr": ()}, "predicts v, over levels that end without signal"),
        ("sd_xl_turbo_1.0_fp16", unet(2048) | VAE, "Sampling: SD-Turbo, SDXL-Turbo: made for 1 step"),
        ("myTurboMix", unet(2048), "'turbo' is in its name: it may be distilled already."),
        ("a", VAE, "is an autoencoder (VAE) alone: give the model, and this file as its vae"),
        ("a", {"control_model.zero_convs.0.0.weight": (4, 4)}, "is a ControlNet, not a model"),
        ("a", {"something.weight": (2,)}, "is of a kind that is not known (its weights are called something.weight)"),
    ],
)
def test_a_checkpoint_is_told_with_what_it_is_for(tmp_path, capsys, name, shapes, words):
    assert words in told(capsys, write(tmp_path / f"{name}.safetensors", shapes))


ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("name", "shapes", "words"),
    [
        (
            "sdxl_lightning_4step_lora",
            lora(ATTENTION, 2048),
            ["rank 4.", "For: stable-diffusion-xl-v1-base.", "4 steps"],
        ),
        (
            "lcm-lora-sdv1-5",
            lora(ATTENTION) | lora("lora_te_x"),
            ["1 of text encoders, which are left out", "LCM: made"],
        ),
        (
            "style",
            lora(ATTENTION) | lora("lora_unet_y", rank=8),
            ["2 layers of rank 4 to 8", "no known few-step family's:"],
        ),
        ("a", lora(ATTENTION) | {"lora_unet_y.hada_w1_a": (2, 2)}, ["holds LoHa"]),
    ],
)
def test_a_lora_of_others_is_told_with_its_family(tmp_path, capsys, name, shapes, words):
    found = told(capsys, write(tmp_path / f"{name}.safetensors", shapes))
    assert all(each in found for each in words), found


def test_a_folder_is_told_by_its_descriptions(tmp_path, capsys):
    folder = tmp_path / "sdxl-turbo"
    for name, about in {
        "model_index.json": {
            "_class_name": "StableDiffusionXLPipeline",
            **{n: ["diffusers", n] for n in ("unet", "vae", "scheduler")},
            "unet": ["diffusers", "UNet2DConditionModel"],
        },
        "unet/config.json": {"cross_attention_dim": 2048},
        "scheduler/scheduler_config.json": {"prediction_type": "epsilon"},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(about))
    found = told(capsys, folder)
    assert "A diffusers folder, StableDiffusionXLPipeline: stable-diffusion-xl-v1-base, which predicts eps" in found
    assert "It holds unet, vae, scheduler." in found and "Sampling: SD-Turbo, SDXL-Turbo" in found


def test_students_merged_ones_and_the_embedded_model_are_told(tmp_path, capsys):
    assert told(capsys, files.STUDENT).startswith("One-step student of ")
    found = told(capsys, write(tmp_path / "a.safetensors", unet(768) | VAE, CARD.to_metadata()))
    assert "a full model" in found and "The student is merged into this checkpoint" in found
    assert "with its architecture in the header" in told(capsys, files.MODEL)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.ckpt", b"\x80\x02", "is a pickle file"),
        ("a.safetensors", b"", "it is empty, get it again"),
        ("a.safetensors", b"\x10\0\0\0\0\0\0\0{", "is no complete safetensors file"),
        ("a.safetensors", b"<html>", "is a web page"),
        (
            "a.png",
            b"\x89PNG\r\n\x1a\n" + bytes(50),
            "is no model file: give a .safetensors file or a diffusers folder",
        ),
        ("a.csv", b"update,loss\n1,0.5\n", "is no model file"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, capsys, name, data, words):
    (tmp_path / name).write_bytes(data)
    found = told(capsys, tmp_path / name, 1)
    assert words in found and len(found.splitlines()) == 1


def test_the_files_of_a_training_are_told(tmp_path, capsys):
    write_state(tmp_path / STATE, {"student": {"a.lora_down.weight": torch.zeros(2, 2)}})
    assert told(capsys, tmp_path / STATE).startswith(
        "The state of a training, from which `turbodistill distill` goes on"
    )
    assert "The folder of a training that has no student yet." in told(capsys, tmp_path)
    shutil.copy(files.STUDENT, tmp_path / BEST)
    found = told(capsys, tmp_path)
    assert f"its student is {tmp_path / BEST}:\nOne-step student of " in found
    with pytest.raises(ModelError, match=r"is the state of a training, .*, not a model: give its base"):
        identify(read_header(tmp_path / STATE))


def test_of_the_hub_the_cache_alone_counts(capsys):
    found = told(capsys, "nobody/nothing", 1)
    assert "is neither a file or folder here nor in the hub's cache" in found and "nothing is downloaded" in found
    assert "gone.safetensors does not exist" in told(capsys, "gone.safetensors", 1)
