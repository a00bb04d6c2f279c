"""Models of the hub, against a stand-in of its API: cached, offline, by revision, private; errors in clear words."""

import importlib.util
from pathlib import Path

import pytest
import torch
from turbodistill.trainer.checkpoint import hub
from turbodistill.trainer.checkpoint.errors import ModelError
from turbodistill.trainer.checkpoint.load import architecture_of_module, load_pipeline

huggingface_hub = pytest.importorskip("huggingface_hub")
_spec = importlib.util.spec_from_file_location("turbodistill_hub_server", Path(__file__).with_name("hub_server.py"))
stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand_in)
FETCH = hub.fetch


@pytest.fixture(scope="module")
def models(small_sd1, vocabulary, tmp_path_factory):
    """Folders of the stand-in's models."""
    place = tmp_path_factory.mktemp("hub")
    pipe = load_pipeline(small_sd1.write(place / "sd1.safetensors"), tokenizer=vocabulary).pipe
    pipe.save_pretrained(place / "both")
    pipe.save_pretrained(place / "both", variant="fp16")
    (place / "both" / "picture.png").write_bytes(b"x")
    (place / "both" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    (place / "both" / "safety_checker").mkdir()
    (place / "both" / "safety_checker" / "model.safetensors").write_bytes(b"x")
    pipe.save_pretrained(place / "half", variant="fp16", max_shard_size="1MB")
    (place / "file").mkdir()
    small_sd1.write(place / "file" / "mine.safetensors")
    names = {"me/both": "both", "me/half": "half", "me/file": "file", "me/private": "half"}
    return {name: place / folder for name, folder in names.items()}


@pytest.fixture
def server(models, tmp_path, monkeypatch):
    """The stand-in, in place of the hub, with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with stand_in.running(models) as (running, address):
        monkeypatch.setattr(hub, "fetch", lambda *names, **how: FETCH(*names, **how | {"endpoint": address}))
        yield running


def resolved(server):
    """The files that were asked for."""
    return {p.split("/resolve/")[1].partition("/")[2] for p in server.asked if "/resolve/" in p}


@pytest.mark.parametrize(("name", "variant", "ending"), [("me/both", None, ""), ("me/both", "fp16", ".fp16")])
def test_of_a_model_only_what_is_needed_is_downloaded(name, variant, ending, server, small_sd1, files):
    loaded = load_pipeline(name, variant=variant)
    assert (loaded.name, architecture_of_module(loaded.pipe.unet)) == (name, "stable-diffusion-v1")
    assert all(files.equal(getattr(loaded.pipe, k), v) for k, v in small_sd1.modules.items())
    weights = {f for f in resolved(server) if f.endswith((".safetensors", ".bin", ".png"))}
    kind = "diffusion_pytorch_model"
    assert weights == {
        f"unet/{kind}{ending}.safetensors",
        f"vae/{kind}{ending}.safetensors",
        f"text_encoder/model{ending}.safetensors",
    }


def test_a_variant_in_shards_is_found_by_itself(server, small_sd1, files):
    loaded = load_pipeline("me/half")
    assert all(files.equal(getattr(loaded.pipe, k), v) for k, v in small_sd1.modules.items())
    assert sum(f.startswith("unet/") and f.endswith(".safetensors") for f in resolved(server)) > 1


def test_what_is_in_the_cache_is_used_without_a_network(server, monkeypatch):
    from huggingface_hub import constants

    tokenizer = server.models["me/both"] / "tokenizer"
    load_pipeline("me/half")
    load_pipeline("me/file/mine.safetensors", tokenizer=tokenizer)
    server.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_pipeline("me/half").name == "me/half"
    assert load_pipeline("me/file/mine.safetensors", tokenizer=tokenizer).name == "mine"
    assert server.asked == []
    with pytest.raises(
        ModelError,
        match=r"me/both is neither a file or folder here nor in the hub's cache, .*OFFLINE",
    ):
        load_pipeline("me/both")


def test_where_the_network_is_down_the_cache_counts(server, monkeypatch):
    load_pipeline("me/half")
    monkeypatch.setattr(hub, "fetch", lambda *names, **how: FETCH(*names, **how | {"endpoint": "http://127.0.0.1:9"}))
    assert load_pipeline("me/half").name == "me/half"
    with pytest.raises(
        ModelError,
        match=r"me/both is neither a file or folder here nor in the hub's cache, and the hub cannot be reached",
    ):
        load_pipeline("me/both")


def test_a_revision_is_asked_for_by_its_name(server):
    assert architecture_of_module(load_pipeline("me/half", revision="v1").pipe.unet) == "stable-diffusion-v1"
    assert any("/revision/v1" in path for path in server.asked)
    with pytest.raises(ModelError, match=r"me/half at revision v9 is not on the hub: give a branch, tag or commit"):
        load_pipeline("me/half", revision="v9")


def test_a_private_model_needs_the_token(server, capsys, caplog):
    with pytest.raises(ModelError, match=r"me/private is neither a file or folder here nor .* `hf auth login`"):
        load_pipeline("me/private")
    assert load_pipeline("me/private", token=stand_in.TOKEN).name == "me/private"
    with pytest.raises(ModelError) as error:
        load_pipeline("me/private", token="hf_wrong")
    said = str(error.value) + "".join(capsys.readouterr()) + caplog.text
    assert "hf_wrong" not in said and stand_in.TOKEN not in said


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("me/gated", r"is gated: accept its terms on its page there, then log in with `hf auth login`"),
        ("me/unknown", r"me/unknown is neither a file or folder here nor a model on the hub that you can see"),
        ("me/forbidden", r"cannot be had from the hub \(403, not allowed: log in"),
        ("me/broken", r"is neither a file or folder here nor in the hub's cache, and the hub cannot be reached"),
        ("me/file", r"is no diffusers pipeline, it has no model_index.json: give .* such as me/file/mine.safetensors"),
        ("me/file/other.safetensors", r"me/file on the hub has no file other.safetensors: check the name"),
        ("me/-odd-", r"me/-odd- can be no model on the hub|is neither a file or folder here"),
    ],
)
def test_what_the_hub_refuses_is_told_in_words(name, told, server):
    with pytest.raises(ModelError, match=told):
        load_pipeline(name)


def test_a_single_file_s_components_are_taken_from_the_hub_and_no_more(server, small_sd1, files, tmp_path):
    path = small_sd1.without("first_stage_model.").write(tmp_path / "mine.safetensors")
    loaded = load_pipeline(path, components="me/both")
    assert files.equal(loaded.pipe.vae, small_sd1.modules["vae"]) and len(loaded.pipe.tokenizer) == len(files.TOKENS)
    folders = {f.partition("/")[0] for f in resolved(server)}
    assert folders == {"model_index.json", "vae", "tokenizer"}
    assert loaded.pipe.unet.dtype == torch.float16


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name/sub/file.safetensors", ("owner/name", "sub/file.safetensors")),
        ("owner", None),
        ("/owner/name", None),
        ("./owner/name", None),
        ("owner/name/", None),
        ("owner/../name", None),
        ("models/mine.safetensors", None),
        ("models/mine.ckpt", None),
        ("C:\\models\\a", None),
    ],
)
def test_a_name_on_the_hub_is_told_from_a_path(source, expected):
    assert hub.named(source) == expected
