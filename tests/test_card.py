"""The card in a student file's header, and files that are none."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from turbodistill.core.card import KEY, VERSION, CardError, StudentCard, fingerprint, read_card, read_student
from turbodistill.core.naming import to_single_file

CARD = StudentCard(
    kind="lora",
    base_model="Toy XL",
    base_hash="0123456789abcdef",
    architecture="stable-diffusion-v1",
    prediction="x0",
    base_prediction="eps",
    timesteps=(999, 749, 499, 249),
    guidance=4.5,
    resolution=(96, 64),
    rank=16,
    alpha=8.0,
    targets="attention",
    training={"updates": 2000, "seed": 1},
    metrics={"kid": 0.05},
)


def file_with(path, changes=None, without=(), header=None):
    """A student file whose card differs so."""
    values = json.loads(CARD.to_metadata()[KEY]) | (changes or {})
    metadata = {KEY: json.dumps({k: v for k, v in values.items() if k not in without})} if header is None else header
    save_file({"a": torch.arange(4.0)}, path, metadata)
    return path


def test_a_card_goes_there_and_back(tmp_path):
    path = tmp_path / "student.safetensors"
    save_file({"a": torch.arange(4.0)}, path, CARD.to_metadata())
    tensors, card = read_student(path)
    assert card == CARD and read_card(str(path)) == CARD
    assert tensors.keys() == {"a"} and torch.equal(tensors["a"], torch.arange(4.0))


def test_other_tools_can_read_the_header():
    metadata = CARD.to_metadata()
    assert all(isinstance(v, str) for v in metadata.values())
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.resolution"] == "96x64"
    full = StudentCard(**{**json.loads(metadata[KEY]), "kind": "full", "prediction": "eps"}).to_metadata()
    assert full["modelspec.architecture"] == "stable-diffusion-v1"
    assert full["modelspec.prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("stable-diffusion-v1", {}),  # what AUTOMATIC1111 takes a LoRA for that says nothing
        ("stable-diffusion-v2", {"ss_v2": "True"}),
        ("stable-diffusion-xl-v1-base", {"ss_base_model_version": "sdxl_base_v1-0"}),
    ],
)
def test_the_header_says_to_automatic1111_which_models_it_is_for(architecture, told):
    metadata = replace(CARD, architecture=architecture).to_metadata()
    assert {k: v for k, v in metadata.items() if k.startswith("ss_")} == told


def test_the_card_in_words_says_how_to_sample():
    words = CARD.in_words()
    for part in ("Toy XL", "LoRA of rank 16", "CFG 1", "guidance of 4.5", "timestep 999", "x0", "96 x 64", "kid 0.05"):
        assert part in words


def test_the_card_of_guidance_alone_says_that_it_is_sampled_as_its_base():
    card = replace(CARD, prediction="eps", guidance_only=True, method="guidance distillation", negative_prompt="blur")
    assert StudentCard.from_metadata(card.to_metadata()) == card
    words = card.in_words()
    assert words.startswith("Guidance-only student of Toy XL, a LoRA of rank 16 (attention), made by guidance distill")
    assert (
        "Sampling: as its base, with any sampler, 4 steps or as many as you like at CFG 1. The teacher's guidance of "
        "4.5 away from 'blur' is baked in, so negative prompts do nothing."
    ) in words
    assert "The noise enters" not in words and "One-step" not in words and "Few-step" not in words
    metadata = card.to_metadata()
    assert metadata["modelspec.usage_hint"].startswith("any sampler, 4 steps or as many as you like, cfg 1")
    assert metadata["modelspec.title"] == "Toy XL guidance-only student"
    assert not StudentCard.from_metadata(CARD.to_metadata()).guidance_only


def test_unknown_fields_of_the_same_version_are_ignored(tmp_path):
    assert read_card(file_with(tmp_path / "a.safetensors", {"mood": "good"})) == CARD


@pytest.mark.parametrize("version", [VERSION + 1, VERSION + 100])
def test_a_card_from_the_future_asks_for_an_update(tmp_path, version):
    path = file_with(tmp_path / "a.safetensors", {"version": version, "kind": "hologram"})
    with pytest.raises(CardError, match=f"card version {version}, this TurboDistill knows up to {VERSION}: update it"):
        read_card(path)


@pytest.mark.parametrize("header", [{}, {"modelspec.title": "another's"}])
def test_a_file_without_a_card_is_none_of_ours(tmp_path, header):
    with pytest.raises(CardError, match="holds no student card: it was not made by TurboDistill"):
        read_student(file_with(tmp_path / "a.safetensors", header=header))


@pytest.mark.parametrize("text", ["{broken", "", "[]", "null", '"words"'])
def test_a_card_that_is_no_card_is_told(tmp_path, text):
    with pytest.raises(CardError, match=r"a\.safetensors"):
        read_student(file_with(tmp_path / "a.safetensors", header={KEY: text}))


@pytest.mark.parametrize("field", ["kind", "base_hash", "timesteps", "resolution"])
def test_a_missing_field_is_named(tmp_path, field):
    with pytest.raises(CardError, match=f"lacks a field .*{field}"):
        read_student(file_with(tmp_path / "a.safetensors", without=[field]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "hologram"}, "kind is 'hologram', known are lora, full"),
        ({"prediction": "score"}, "prediction is 'score'"),
        ({"base_prediction": "score"}, "prediction is 'score'"),
        ({"timesteps": []}, "timesteps are"),
        ({"timesteps": [1000]}, "between 0 and 999"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, changes, message):
    with pytest.raises(CardError, match=message):
        read_student(file_with(tmp_path / "a.safetensors", changes))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(CardError, match=r"gone\.safetensors does not exist: check the name"):
        read_student(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -4])
def test_a_truncated_file_is_told(tmp_path, kept):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(save({"a": torch.arange(4.0)}, CARD.to_metadata())[:kept])
    with pytest.raises(CardError, match=r"cut.safetensors is no complete safetensors file .*get it again"):
        read_student(path)


def test_a_folder_is_told(tmp_path):
    with pytest.raises(CardError, match="is a folder: give a file"):
        read_student(tmp_path)


@pytest.mark.parametrize("name", ["old.ckpt", "posing.safetensors"])
def test_a_pickle_is_never_run(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CardError, match=r"pickle files .* are not loaded"):
        read_student(path)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CardError, match=r"pickle files .* are not loaded"):
        read_student(path)
    assert not (tmp_path / "exploded").exists()


# --- Fingerprint ---


def test_the_fingerprint_is_the_same_in_either_precision(toys):
    unet = toys.small_unet()
    full = fingerprint(unet)
    assert len(full) == 16 and int(full, 16) >= 0
    half = {k: v.half() for k, v in unet.state_dict().items()}
    assert fingerprint(half) == full
    assert fingerprint({k: v.float() for k, v in half.items()}) == full  # a half file loaded in float32


def test_the_fingerprint_is_the_same_in_either_layout(toys):
    weights = toys.small_unet().state_dict()
    names = to_single_file(weights)
    single_file = {names[k]: v for k, v in reversed(weights.items())}
    assert fingerprint(single_file) == fingerprint(weights)


def test_the_fingerprint_is_the_same_under_a_lora(toys):
    from turbodistill.core.student import Student

    teacher = toys.conv()
    before = fingerprint(teacher.backbone)
    student = Student(teacher, rank=2)
    toys.nudge(student.lora)
    assert fingerprint(teacher.backbone) == before


def test_another_model_has_another_fingerprint(toys):
    found = {fingerprint(toys.conv(seed=k).backbone) for k in range(3)}
    trained = toys.conv().backbone
    with torch.no_grad():
        trained.down.weight.mul_(1.01)
    assert len(found | {fingerprint(trained)}) == 4


def test_on_windows_a_file_that_was_read_can_be_replaced(tmp_path, monkeypatch):
    """There a file cannot be while a tensor of it is mapped: a training could not write its student anew."""
    path = tmp_path / "student.safetensors"
    save_file({"a": torch.ones(64)}, path, CARD.to_metadata())

    def mapped():
        return str(path) in Path("/proc/self/maps").read_text()

    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc/self/maps, which this system lacks")
    kept = read_student(path)[0]
    assert mapped()
    del kept
    monkeypatch.setattr("turbodistill.core.card.COPIES", True)
    tensors = read_student(path)[0]
    assert torch.equal(tensors["a"], torch.ones(64)) and not mapped()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers_are_told(tmp_path, value, dtype):
    save_file(
        {"a": torch.ones(4), "b": torch.tensor([1.0, value]).to(dtype)}, tmp_path / "x.safetensors", CARD.to_metadata()
    )
    with pytest.raises(CardError, match=r"1 of its 2 weights are no numbers .*, the first is b"):
        read_student(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": "4"}, "rank is '4', it must be a whole number"),
        ({"rank": True}, "rank is True"),
        ({"rank": -1}, "rank -1"),
        ({"guidance": "high"}, "guidance is 'high'"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"resolution": [64]}, "resolution is"),
        ({"resolution": [64, 64, 64]}, "resolution is"),
        ({"resolution": ["a", "b"]}, "resolution is"),
        ({"resolution": [0, -8]}, "resolution is"),
        ({"timesteps": ["a"]}, "timesteps are"),
        ({"timesteps": [1.5]}, "timesteps are"),
        ({"timesteps": 3}, "lacks a field"),
        ({"training": ["x"]}, "training is"),
        ({"base_model": None}, "base_model is None"),
        ({"guidance_only": 1}, "guidance_only is 1, it must be true or false"),
        ({"version": None}, "has no version"),
        ({"version": "1"}, "has no version"),
        ({"version": True}, "has no version"),
        ({"version": 0}, "has no version"),
    ],
)
def test_a_value_of_another_kind_is_named(tmp_path, changes, told):
    with pytest.raises(CardError, match=told):
        read_card(file_with(tmp_path / "x.safetensors", changes))


def test_a_card_nested_too_deep_is_told(tmp_path):
    path = file_with(tmp_path / "x.safetensors", header={KEY: "[" * 100_000})
    with pytest.raises(CardError, match="cannot be read"):
        read_card(path)


@pytest.mark.parametrize("field", ["guidance_rescale", "guidance_start", "guidance_end"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_guidance_beyond_its_bounds_is_no_card_s(field, value):
    given = {"kind": "lora", "base_model": "toy", "base_hash": "0" * 16, "architecture": "sd", "prediction": "eps"}
    given |= {"base_prediction": "eps", "timesteps": (999,), "guidance": 4.0, "resolution": (64, 64)}
    assert StudentCard(**given).guidance_end == 1
    with pytest.raises(CardError, match=rf"card: .*{field} {value!s}.* cannot be"):
        StudentCard(**given, **{field: value})
