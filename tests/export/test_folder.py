"""The diffusers folder: every part of the base, the student's denoiser, and a scheduler that samples it in one step."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from turbodistill.core.card import KEY, StudentCard
from turbodistill.core.schedule import trailing_timesteps
from turbodistill.generate.export.tensors import ExportError
from turbodistill.trainer.checkpoint import shapes as config_from
from turbodistill.trainer.checkpoint.errors import ModelError


def load(base, folder):
    return type(base.pipe).from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def student(base, tmp_path_factory):
    return base.student(tmp_path_factory.mktemp("students") / f"{base.kind}.safetensors", torch.float32)


@pytest.fixture(scope="module")
def single(kit, base, student, tmp_path_factory):
    """The base as a single file: the merged one, of which the network is the base's again."""
    out = tmp_path_factory.mktemp("single") / "base.safetensors"
    kit.export(student, "merged", out, base=base.folder, dtype="float32")
    from turbodistill.core.naming import to_single_file

    table, own = to_single_file(base.denoiser.backbone.state_dict()), base.denoiser.backbone.state_dict()
    save_file(load_file(out) | {f"model.diffusion_model.{table[k]}": v for k, v in own.items()}, out)
    return out


@pytest.fixture(scope="module", params=["file", "folder"])
def folder(request, kit, base, student, single, tmp_path_factory):
    """The student as a folder, out of the base's single file and its folder."""
    out = tmp_path_factory.mktemp("folders") / "student"
    if request.param == "file":
        kit.export(student, "diffusers", out, base=single, dtype="float32", tokenizer=base.tokenizer)
    else:
        kit.export(student, "diffusers", out, base=base.folder, dtype="float32")
    return out


def test_diffusers_loads_it_and_makes_the_student_s_picture(kit, base, student, folder):
    pipe = load(base, folder)
    assert kit.gap(base.through(pipe), base.picture(student)) < 1e-4


def test_its_own_scheduler_samples_the_student_in_one_step(kit, base, student, folder):
    pipe = load(base, folder)
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    pipe.set_progress_bar_config(disable=True)
    more = {"pooled_prompt_embeds": base.cond.pooled} if base.kind == "sdxl" else {}
    found = pipe(
        prompt_embeds=base.cond.context, num_inference_steps=1, guidance_scale=0, latents=base.noise.clone(),
        height=64, width=64, output_type="latent", **more,
    ).images  # fmt: skip
    assert kit.gap(found, base.picture(student)) < 1e-4


def test_every_other_part_is_the_base_s_to_the_bit(base, folder):
    pipe = load(base, folder)
    for part in ("vae", "text_encoder", *(["text_encoder_2"] if base.kind == "sdxl" else [])):
        found, expected = getattr(pipe, part).state_dict(), getattr(base.pipe, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected), part


def test_a_prompt_is_read_as_by_the_base(base, folder):
    texts = [p.encode_prompt("a red fox", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
             for p in (load(base, folder), base.pipe)]  # fmt: skip
    assert torch.equal(texts[0][0], texts[1][0])


def test_its_configurations_are_those_that_diffusers_wrote(base, folder):
    """What a single file's shapes tell, against the pipeline it was made of."""
    for part in ("unet", "vae"):
        found, expected = dict(getattr(load(base, folder), part).config), dict(getattr(base.pipe, part).config)
        told = json.loads((folder / part / "config.json").read_text())
        free = {"sample_size", "force_upcast", "upcast_attention"}
        for name in {n for n in told if not n.startswith("_")} - free:
            one, other = (list(v) if isinstance(v, tuple) else v for v in (found[name], expected[name]))
            assert one == other, name
    for part in ("text_encoder", *(["text_encoder_2"] if base.kind == "sdxl" else [])):
        found, expected = (getattr(p, part).config for p in (load(base, folder), base.pipe))
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
        assert all(getattr(found, n) == getattr(expected, n) for n in names)


def test_the_card_is_in_it(base, folder):
    told = json.loads((folder / "turbodistill.json").read_text())
    assert told["base_hash"] == base.card().base_hash and told["timesteps"] == [999]
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert StudentCard.from_metadata(file.metadata()).architecture == base.card().architecture
        assert KEY in file.metadata() and file.metadata()["format"] == "pt"


def test_a_folder_that_is_there_is_replaced_only_if_an_export_wrote_it(kit, make, tmp_path):
    base = make("sd1")
    student = base.student(tmp_path / "student.safetensors")
    kit.export(student, "diffusers", tmp_path / "out", base=base.folder)
    with pytest.raises(ExportError, match="is there already: give another name, or --force"):
        kit.export(student, "diffusers", tmp_path / "out", base=base.folder)
    (tmp_path / "out" / "old.txt").write_text("old")
    kit.export(student, "diffusers", tmp_path / "out", base=base.folder, force=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ExportError, match="no folder that an export wrote, so it is not replaced"):
        kit.export(student, "diffusers", tmp_path / "mine", base=base.folder, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out", "student.safetensors"]


def test_a_tokenizer_that_is_none_is_told(kit, base, student, single, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "tokenizer.json").write_text('{"model": 3}')
    (tmp_path / "none").mkdir()
    told = {"none": "holds neither bpe_simple_vocab_16e6.txt", "odd": "is no vocabulary of CLIP"}
    for name, words in told.items():
        with pytest.raises(ModelError, match=words):
            kit.export(student, "diffusers", tmp_path / "out", base=single, tokenizer=tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer_it_is_looked_for(kit, base, student, single, tmp_path, monkeypatch):
    own = kit.write_tokenizer(tmp_path / "own")
    monkeypatch.setattr(
        "turbodistill.trainer.checkpoint.tokenizer.vocabulary_folders", lambda: iter([tmp_path / "not", own])
    )
    kit.export(student, "diffusers", tmp_path / "out", base=single)
    assert json.loads((tmp_path / "out" / "tokenizer" / "vocab.json").read_text()) == json.loads(
        (own / "vocab.json").read_text()
    )


@pytest.mark.parametrize("changes", [{"timesteps": (399,)}, {"prediction": "x0"}, {"timesteps": (999, 499)}], ids=str)
def test_the_scheduler_is_the_one_that_the_card_asks_for(kit, make, tmp_path, changes):
    """One step of the folder's own pipeline is the student's picture, whatever it begins at and predicts."""
    base = make("sd1")
    student = base.student(tmp_path / "student.safetensors", torch.float32, **changes)
    kit.export(student, "diffusers", tmp_path / "out", base=base.folder, dtype="float32")
    pipe = load(base, tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        prompt_embeds=base.cond.context, num_inference_steps=1, guidance_scale=0, latents=base.noise.clone(),
        height=64, width=64, output_type="latent",
    ).images  # fmt: skip
    assert kit.gap(found, base.picture(student)) < 0.01  # a scheduler for several steps takes noise of the scale 1


def test_either_kind_of_tokenizer_file_will_do(kit, base, student, single, tmp_path):
    own = kit.write_tokenizer(tmp_path / "own")
    kit.export(student, "diffusers", tmp_path / "a", base=single, tokenizer=own)
    kit.export(student, "diffusers", tmp_path / "b", base=single, tokenizer=base.tokenizer)
    assert (base.tokenizer / "tokenizer.json").exists()
    for name in ("vocab.json", "merges.txt"):
        texts = [(tmp_path / out / "tokenizer" / name).read_text().split() for out in "ab"]
        assert texts[0] == texts[1] and texts[0]


def test_a_single_file_without_an_autoencoder_is_refused(kit, base, student, single, tmp_path):
    bare = {k: v for k, v in load_file(single).items() if k.startswith("model.diffusion_model.")}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(ExportError, match=r"holds no autoencoder .*: give a base that does"):
        kit.export(student, "diffusers", tmp_path / "out", base=tmp_path / "bare.safetensors", tokenizer=base.tokenizer)


def test_an_inpainting_model_is_no_base_for_a_folder(kit, make, tmp_path):
    base = make("sd1")
    student = base.student(tmp_path / "student.safetensors", targets="attention")
    kit.export(student, "merged", tmp_path / "base.safetensors", base=base.folder)
    tensors, first = load_file(tmp_path / "base.safetensors"), "model.diffusion_model.input_blocks.0.0.weight"
    tensors[first] = torch.cat([tensors[first], torch.zeros(32, 5, 3, 3).half()], 1)
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(ExportError, match="takes 9 channels, as inpainting models do"):
        options = {"base": tmp_path / "base.safetensors", "tokenizer": base.tokenizer}
        kit.export(student, "diffusers", tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"layers_per_block": 1}, {}),
        ({"block_out_channels": (32, 64, 64)}, {}),
        ({"transformer_layers_per_block": (3, 1)}, {"transformer_layers_per_block": [3, 1]}),
        (  # as in pruned ones, such as SSD-1B
            {"transformer_layers_per_block": (3, 1), "reverse_transformer_layers_per_block": (1, (2, 1, 1))},
            {"reverse_transformer_layers_per_block": [1, [2, 1, 1]]},
        ),
    ],
)
def test_a_unet_s_shapes_tell_its_configuration(kit, changes, expected):
    """Built again from it, a UNet has the same names and shapes."""
    from diffusers import UNet2DConditionModel
    from turbodistill.core.naming import to_single_file

    settings = kit.UNETS["sd1"] | changes
    if len(settings["block_out_channels"]) == 3:
        settings["down_block_types"] = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
        settings["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**settings)
    table = to_single_file(unet.state_dict())
    told = config_from.unet({table[k]: tuple(v.shape) for k, v in unet.state_dict().items()})
    assert expected.items() <= told.items()
    with torch.device("meta"):
        again = UNet2DConditionModel.from_config(told)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in unet.state_dict().items()}


def test_a_student_of_guidance_alone_has_the_base_s_scheduler(kit, base, single, tmp_path):
    timesteps = tuple(trailing_timesteps(9))
    path = tmp_path / "student.safetensors"
    student = base.student(path, torch.float32, timesteps=timesteps, guidance_only=True)
    kit.export(student, "diffusers", tmp_path / "of_folder", base=base.folder)
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        assert json.loads((tmp_path / "of_folder" / name).read_text()) == json.loads((base.folder / name).read_text())
    kit.export(student, "diffusers", tmp_path / "of_file", base=single, tokenizer=base.tokenizer)
    pipe = load(base, tmp_path / "of_file")
    assert pipe.scheduler.config.prediction_type == base.pipe.scheduler.config.prediction_type
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler" and len(pipe.scheduler) == 1000
    pipe.scheduler.set_timesteps(30)
    assert len(pipe.scheduler.timesteps) == 30
