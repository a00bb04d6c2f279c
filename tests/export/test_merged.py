"""The merged single file: what diffusers' own single-file loaders read of it, what it keeps, and how it is written."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from turbodistill.core.card import read_card
from turbodistill.core.fit import read_base
from turbodistill.core.student import load_student
from turbodistill.generate.export import layout
from turbodistill.generate.export.export import Export
from turbodistill.generate.export.tensors import ExportError, Weights
from turbodistill.trainer.checkpoint.layout import text_encoder_to_diffusers
from turbodistill.trainer.data.tensor_file import Entry, write_safetensors


@pytest.fixture(scope="module")
def student(base, tmp_path_factory):
    return base.student(tmp_path_factory.mktemp("students") / f"{base.kind}.safetensors", torch.float32)


@pytest.fixture(scope="module")
def merged(kit, base, student, tmp_path_factory):
    """Out of the base's folder, in float32."""
    out = tmp_path_factory.mktemp("merged") / f"{base.kind}.safetensors"
    kit.export(student, "merged", out, base=base.folder, dtype="float32")
    return out


@pytest.fixture(scope="module")
def single(kit, base, tmp_path_factory):
    """The base itself as a single file: merged with a student that changes nothing."""
    place = tmp_path_factory.mktemp("single")
    tensors = load_file(base.student(place / "zero.safetensors", torch.float32))
    zero = {k: v * 0 if "lora_up" in k else v for k, v in tensors.items()}
    save_file(zero, place / "zero.safetensors", base.card().to_metadata())
    kit.export(place / "zero.safetensors", "merged", place / "base.safetensors", base=base.folder, dtype="float32")
    return place / "base.safetensors"


def from_single_file(base, path):
    """diffusers' own loader, offline."""
    more = {} if base.kind == "sdxl" else {"feature_extractor": None}
    pipe = type(base.pipe).from_single_file(str(path), config=str(base.folder), local_files_only=True, **more)
    return pipe


def test_diffusers_reads_it_and_makes_the_student_s_picture(kit, base, student, merged):
    pipe = from_single_file(base, merged)
    expected = base.picture(student)
    assert kit.gap(base.through(pipe), expected) < 1e-4 < 0.1 < kit.gap(base.through(base.pipe), expected)


def test_what_diffusers_reads_of_the_base_is_the_base_to_the_bit(base, single):
    """from_single_file(export(x)) == x, for each part."""
    pipe = from_single_file(base, single)
    parts = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if base.kind == "sdxl" else [])]
    for part in parts:
        found, expected = getattr(pipe, part).state_dict(), getattr(base.pipe, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected), part


def test_it_is_told_for_what_it_is(base, single):
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    told = infer_diffusers_model_type(load_file(single))
    assert told == {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base"}[base.kind]
    found = read_base(single)
    assert found.architecture == base.card().architecture and found.hashes == (base.card().base_hash,)


def test_a_single_file_as_base_gives_the_same_as_its_folder(kit, student, single, merged, tmp_path):
    kit.export(student, "merged", tmp_path / "out.safetensors", base=single, dtype="float32")
    found, expected = load_file(tmp_path / "out.safetensors"), load_file(merged)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def test_it_is_a_full_student_for_our_own_loader(kit, base, student, merged):
    assert read_card(merged).kind == "full" and read_card(merged).base_hash == base.card().base_hash
    assert kit.gap(base.picture(merged), base.picture(student)) < 1e-4
    with safe_open(merged, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == base.card().architecture


def test_a_full_student_takes_the_network_s_place(kit, base, single, tmp_path):
    full = base.student(tmp_path / "full.safetensors", torch.float32, full=True)
    kit.export(full, "merged", tmp_path / "out.safetensors", base=single, dtype="float32")
    found, own, before = (load_file(p) for p in (tmp_path / "out.safetensors", full, single))
    assert found.keys() == before.keys()
    assert all(torch.equal(found[k], own.get(k, before[k])) for k in before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_weight_is_in_the_precision_asked_for(kit, make, tmp_path, dtype):
    base = make("sd1")
    student = base.student(tmp_path / "student.safetensors")
    kit.export(student, "merged", tmp_path / "out.safetensors", base=base.folder, dtype=dtype)
    found = load_file(tmp_path / "out.safetensors")
    assert {v.dtype for v in found.values()} == {getattr(torch, dtype)}
    bound = {"float16": 5e-3, "bfloat16": 5e-2}[dtype]
    assert kit.gap(base.picture(tmp_path / "out.safetensors"), base.picture(student)) < bound


@pytest.fixture
def whole(kit, make, tmp_path):
    """A base as they come: with averages (EMA), the schedule's buffers, positions, marks, and metadata of its own."""
    base = make("sd1")
    student = base.student(tmp_path / "student.safetensors")
    kit.export(student, "merged", tmp_path / "plain.safetensors", base=base.folder)
    tensors = load_file(tmp_path / "plain.safetensors")
    first = next(k for k in tensors if k.startswith("model.diffusion_model."))
    tensors |= {
        "model_ema.diffusion_modelinput_blocks00weight": tensors[first].clone(),
        "model_ema.decay": torch.ones(1),
    }
    tensors |= {"alphas_cumprod": torch.rand(1000), "v_pred": torch.zeros(1)}
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    about = {"modelspec.title": "Their model", "modelspec.hash_sha256": "0x0", "recipe": "secret", "format": "pt"}
    save_file(tensors, tmp_path / "whole.safetensors", about)
    return tmp_path / "whole.safetensors"


def test_everything_else_of_the_base_is_kept_and_its_averages_are_not(kit, make, whole, tmp_path):
    base = make("sd1")
    student = base.student(tmp_path / "v.safetensors", base_prediction="v", prediction="v")
    kit.export(student, "merged", tmp_path / "out.safetensors", base=whole, dtype="bfloat16")
    found, before = load_file(tmp_path / "out.safetensors"), load_file(whole)
    assert before.keys() - found.keys() == {k for k in before if k.startswith("model_ema.")}
    for name in ("alphas_cumprod", "v_pred", "cond_stage_model.transformer.text_model.embeddings.position_ids"):
        assert torch.equal(found[name], before[name]) and found[name].dtype == before[name].dtype
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        about = file.metadata()
    assert about["recipe"] == "secret" and about["modelspec.title"] == "tiny-sd1 one-step student"
    assert "modelspec.hash_sha256" not in about


def test_a_base_that_says_it_predicts_v_refuses_a_student_of_eps(make, whole, tmp_path):
    with pytest.raises(ValueError, match="made for a model that predicts eps, the loaded one predicts v"):
        Export(tmp_path / "student.safetensors", "merged", tmp_path / "out.safetensors", whole)


def test_a_folder_of_an_sdxl_that_predicts_v_gets_the_hosts_marks(kit, make, tmp_path):
    base = make("sdxl", "v")
    student = base.student(tmp_path / "student.safetensors")
    kit.export(student, "merged", tmp_path / "out.safetensors", base=base.folder)
    found = load_file(tmp_path / "out.safetensors")
    assert "v_pred" in found and "ztsnr" not in found
    assert read_base(tmp_path / "out.safetensors").architecture == "stable-diffusion-xl-v1-base"


def test_the_embedded_model_with_its_student_is_a_model_of_its_own(kit, tmp_path):
    """Its header says its architecture, which the merged file keeps: it loads as the embedded one does."""
    from turbodistill.core.sampling import seeded_noise
    from turbodistill.demo.files import MODEL, STUDENT
    from turbodistill.trainer.pipeline.load import load_model

    if not MODEL.exists():
        pytest.skip("the embedded model is not in this checkout: demo/model.safetensors")
    kit.export(STUDENT, "merged", tmp_path / "out.safetensors", base=MODEL, dtype="float32")
    host, plain = load_model(tmp_path / "out.safetensors", "cpu", with_student=True), load_model(None, "cpu")
    student, _, _ = load_student(STUDENT, plain.denoiser)
    noise, cond = seeded_noise(range(2), host.latent_shape), plain.encode_text(["a red fox", "a blue owl"])
    sigma = student.sigmas(1)[:1].expand(2)
    x = student.schedule.add_noise(torch.zeros_like(noise), noise, sigma)
    expected = student(x, sigma, cond)
    assert (
        kit.gap(host.denoiser(x, sigma, cond), expected)
        < 1e-4
        < 0.1
        < kit.gap(plain.denoiser(x, sigma, cond), expected)
    )


# --- Old names, halves that are left out ---


def test_an_autoencoder_in_diffusers_old_names_is_read():
    shapes = {
        "decoder.mid_block.attentions.0.proj_attn.weight": (4, 4),
        "decoder.mid_block.attentions.0.key.bias": (4,),
    }
    found = {p.name: p.shape for p in layout.vae_to_single(shapes)}
    assert found == {"decoder.mid.attn_1.proj_out.weight": (4, 4, 1, 1), "decoder.mid.attn_1.k.bias": (4,)}


def test_a_folder_of_stable_diffusion_2_gets_the_last_layer_that_hosts_miss():
    """Its residual block changes nothing: both of its ways end in zeros."""
    at = "text_model.encoder.layers.{}."
    each = {"layer_norm1.weight": (4,), "self_attn.out_proj.weight": (4, 4), "mlp.fc2.weight": (4, 8)}
    each |= {f"self_attn.{p}_proj.weight": (4, 4) for p in "qkv"}
    shapes = {at.format(i) + n: s for i in range(23) for n, s in each.items()}
    shapes["text_model.final_layer_norm.weight"] = (4,)
    made = {p.name: p for p in layout.open_clip_to_single(shapes, complete=True)}
    last = {n: p.make([]) for n, p in made.items() if ".23." in n}
    assert len(last) == 4 and last["transformer.resblocks.23.attn.in_proj_weight"].shape == (12, 4)
    assert last["transformer.resblocks.23.ln_1.weight"].eq(1).all()
    assert not last["transformer.resblocks.23.mlp.c_proj.weight"].any()
    assert not last["transformer.resblocks.23.attn.out_proj.weight"].any()
    assert torch.equal(made["text_projection"].make([]), torch.eye(4))
    back, unknown = text_encoder_to_diffusers("open_clip_h", {n: p.shape for n, p in made.items()}, projected=False)
    assert {p.name: p.shape for p in back} == shapes and not unknown
    assert not any(".23." in p.name for p in layout.open_clip_to_single(shapes, complete=False))


# --- The file ---


def test_the_library_reads_what_is_written_tensor_by_tensor(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).half(), "whole": torch.arange(6).view(2, 3), "none": torch.empty(0),
        "ünï": torch.randn(2), "one": torch.tensor(2.5), "bits": torch.tensor([True, False]),
        "brain": torch.randn(7).bfloat16(),
    }  # fmt: skip
    entries = [Entry(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()]
    written = list(write_safetensors(tmp_path / "out.safetensors", entries, {"a": "b"}))
    assert sum(written) == sum(t.nbytes for t in tensors.values())
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    raw = (tmp_path / "out.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt", "a": "b"} and length % 8 == 0
    sizes = {"F16": 2, "I64": 8, "F32": 4, "BOOL": 1, "BF16": 2}
    assert all(about["data_offsets"][0] % sizes[about["dtype"]] == 0 for about in header.values())


def test_weights_are_the_same_when_their_file_is_opened_anew(tmp_path, monkeypatch):
    tensors = {f"t{i}": torch.randn(100) for i in range(20)}
    save_file(tensors, tmp_path / "some.safetensors")
    monkeypatch.setattr("turbodistill.generate.export.tensors.MAPPED", 1000)
    weights = Weights(tmp_path / "some.safetensors")
    assert all(torch.equal(weights[n], v) for _ in range(3) for n, v in tensors.items())


def test_too_large_for_float16_is_an_error_that_leaves_nothing(kit, make, tmp_path):
    base = make("sd1")
    tensors = load_file(base.student(tmp_path / "student.safetensors", torch.float32))
    tensors["lora_unet_conv_out.lora_up.weight"] *= 1e7
    save_file(tensors, tmp_path / "student.safetensors", base.card().to_metadata())
    out = tmp_path / "out.safetensors"
    with pytest.raises(ExportError, match=r"model\.diffusion_model\.out\.2\.weight reaches .*, too large for float16"):
        kit.export(tmp_path / "student.safetensors", "merged", out, base=base.folder)
    assert not out.exists() and not list(tmp_path.glob("*.part"))
    kit.export(tmp_path / "student.safetensors", "merged", out, base=base.folder, dtype="bfloat16")
    assert all(v.isfinite().all() for v in load_file(out).values())


def test_a_base_of_mixed_precisions_is_written_in_one(kit, make, single, tmp_path):
    base = make("sd1")
    student = base.student(tmp_path / "student.safetensors")
    kit.export(student, "merged", tmp_path / "plain.safetensors", base=base.folder, dtype="float32")
    tensors = load_file(tmp_path / "plain.safetensors")
    kinds = (torch.float16, torch.float32, torch.float8_e4m3fn, torch.float64)
    mixed = {k: v.to(kinds[i % 4]) for i, (k, v) in enumerate(tensors.items())}
    save_file(mixed, tmp_path / "mixed.safetensors")
    kit.export(student, "merged", tmp_path / "out.safetensors", base=tmp_path / "mixed.safetensors")
    assert {v.dtype for v in load_file(tmp_path / "out.safetensors").values()} == {torch.float16}
