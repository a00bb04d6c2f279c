"""Exported files of full-size models in a real AUTOMATIC1111 and Forge make the student's picture."""

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from turbodistill.generate.export.export import Export

pytestmark = [pytest.mark.host, pytest.mark.full_size, pytest.mark.timeout(1800)]
HERE = Path(__file__).parent
ROUNDED = 2.0  # of 255: the hosts sum the same in another order
CHANGED = 5.0  # what a student changes of the picture at least, in the mean
# Forge looks for the mark of a Stable Diffusion 2 that predicts v under a name no file has, and asks a .yaml instead.
OF_V = {"model": {"params": {"parameterization": "v"}}}
# Forge's flags where float32 of everything has no room.
IN_HALF = ("--always-cpu", "--unet-in-fp16", "--vae-in-fp32", "--clip-in-fp32", "--attention-pytorch")
UNET = {"attention_resolutions": [4, 2, 1], "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4]}


def describe(made, models):
    """What AUTOMATIC1111 builds the networks by, where the hub's tokenizer is not on the machine."""
    shape = made.FORGE  # of Stable Diffusion 1.5, but for the UNet's levels
    told = made.description(shape, made.tokenizer(models / "clip", shape))
    told["model"]["params"]["unet_config"]["params"] |= UNET
    for name in ("base", "merged"):
        (models / f"{name}.yaml").write_text(json.dumps(told))


def beside(path):
    spec = importlib.util.spec_from_file_location(f"turbodistill_of_export_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl", "sdxl-v"])
def model(request, kind):
    if kind.name == "a1111" and request.param != "sd15":
        pytest.skip("AUTOMATIC1111 builds its text encoder from files of the hub")
    return request.param


@pytest.fixture(scope="module")
def pictures(kind, installation, model, tmp_path_factory):
    """What the host makes of the base alone, with the student's own file, its kohya export, and the merged file."""
    client = beside(HERE / "client.py")
    full, kit = (beside(HERE.parents[1] / "export" / f"{name}.py") for name in ("full_size", "conftest"))
    full.skip_without_memory(model)
    data = tmp_path_factory.mktemp(f"export-{kind.name}")
    models, loras = data / "models" / "Stable-diffusion", data / "models" / "Lora"
    for folder in (models, loras, data / "extensions"):
        folder.mkdir(parents=True)
    (data / "extensions" / "turbodistill").symlink_to(HERE.parents[2], target_is_directory=True)
    base = full.write(models / "base.safetensors", model)
    full.apart(full.distil, models, model, kit.write_tokenizer(data / "letters"))
    student = (models / "student.safetensors").rename(loras / "own.safetensors")
    shutil.rmtree(models / "run")
    for to, out in (("kohya", loras / "kohya.safetensors"), ("merged", models / "merged.safetensors")):
        for _ in Export(student, to, out, base).run():
            pass
    if kind.name == "a1111":
        describe(beside(HERE / "checkpoint.py"), models)
    if model == "sd21":
        for name in ("base", "merged"):
            (models / f"{name}.yaml").write_text(json.dumps(OF_V))
    host = client.KINDS[kind.name]
    if model.startswith("sdxl"):
        host = dataclasses.replace(host, flags=(*client.OLD_FLAGS, *IN_HALF))
    with client.serve(host, *installation, data) as server:
        server.set(live_previews_enable=False)  # of XL's latents a model would be fetched for them
        titles = {m["model_name"]: m["title"] for m in server.call("sdapi/v1/sd-models")}
        server.set(sd_model_checkpoint=titles["base"])
        made = {"base": server.txt2img().picture}
        for name in ("own", "kohya"):
            made[name] = server.txt2img(prompt=f"a fox <lora:{name}:1>").picture
        server.set(sd_model_checkpoint=titles["merged"])
        made["merged"] = server.txt2img().picture
    yield made
    shutil.rmtree(data / "models")  # pytest keeps its last folders; the log is enough


def test_the_kohya_file_makes_the_picture_of_the_student_s_own(pictures, gap, distance):
    assert gap(pictures["kohya"], pictures["own"]) <= ROUNDED
    assert distance(pictures["own"], pictures["base"]) > CHANGED


def test_the_merged_file_makes_the_student_s_picture(pictures, distance):
    """To the rounding of its weights to float16."""
    assert distance(pictures["merged"], pictures["own"]) < CHANGED / 5
