"""What is said where student, loaded model and settings do not fit, and what is refused."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from turbodistill.core.card import CardError, StudentCard, fingerprint
from turbodistill.core.fit import Base, check_fit, read_base

CARD = StudentCard("lora", "base.safetensors", "a" * 16, "stable-diffusion-v1", "x0", "eps", (999,), 4.0, (512, 512))
RIGHT = Base("stable-diffusion-v1", "eps", ("b" * 16, "a" * 16), "renamed.safetensors")


def test_what_fits_is_not_spoken_of():
    assert check_fit(CARD, RIGHT) == check_fit(CARD, Base()) == []
    assert check_fit(replace(CARD, timesteps=(999, 499)), RIGHT, steps=2) == []


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (
            replace(RIGHT, architecture="stable-diffusion-xl-v1-base", hashes=("c" * 16,)),
            "s was made for a model of architecture stable-diffusion-v1, the loaded one is "
            "stable-diffusion-xl-v1-base: load base.safetensors, its base",
        ),
        (
            replace(RIGHT, prediction="v", hashes=("c" * 16,)),
            "s was made for a model that predicts eps, the loaded one predicts v: load base.safetensors, its base",
        ),
        (
            replace(RIGHT, prediction="v"),
            "s was made for a model that predicts eps, the loaded one predicts v: it is the right file, read wrongly: "
            "say what it predicts, in ComfyUI by ModelSamplingDiscrete, in AUTOMATIC1111 and Forge by a .yaml of its "
            "name with `parameterization: eps`",
        ),
    ],
)
def test_where_no_picture_could_come_of_it_it_is_refused(base, words):
    with pytest.raises(CardError) as error:
        check_fit(CARD, base, "s")
    assert str(error.value) == words


def test_an_architecture_that_is_not_known_decides_nothing():
    """Hosts have names of their own; and the same weights are the same model, whatever a card of old says."""
    assert check_fit(CARD, replace(RIGHT, architecture="SD15_instructpix2pix")) == []
    assert check_fit(replace(CARD, architecture="stable-diffusion-v2"), RIGHT) == []


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (
            replace(RIGHT, hashes=("c" * 16,)),
            f"s was made for base.safetensors ({'a' * 16}), the loaded model is another ({'c' * 16}): "
            "pictures may suffer.",
        ),
        (
            Base(name="other.ckpt"),
            "s was made for base.safetensors, the loaded model is other.ckpt: pictures may suffer.",
        ),
        (Base(name=r"C:\models\Base.ckpt"), None),
    ],
)
def test_another_base_of_its_kind_is_warned_of(base, words):
    assert check_fit(CARD, base, "s") == ([words] if words else [])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 4}, "steps is 4: s was made for 1 step."),
        ({"weight": 0.7}, "the weight of s is 0.7: it was trained at 1, another blurs or burns the picture."),
        ({"weight": -1.0}, "the weight of s is -1: it was trained at 1, another blurs or burns the picture."),
        ({"cfg": 7.0}, "cfg is 7: s was made for 1, more burns the picture."),
    ],
)
def test_settings_that_it_was_not_trained_for_are_warned_of(settings, words):
    assert check_fit(CARD, RIGHT, "s", **settings) == [words]


def test_a_student_of_guidance_alone_takes_as_many_steps_as_one_likes():
    card = replace(CARD, timesteps=tuple(range(999, 0, -63)), guidance_only=True)
    assert check_fit(card, RIGHT, "s") == check_fit(card, RIGHT, "s", steps=30) == []
    assert check_fit(card, RIGHT, "s", steps=2, cfg=7.0) == [
        "steps is 2: s was made for 8 steps or more.",
        "cfg is 7: s was made for 1, more burns the picture.",
    ]


def test_the_same_file_in_another_precision_is_the_same_model():
    assert check_fit(CARD, replace(RIGHT, hashes=("c" * 16,), name="Base.safetensors")) == []


def test_a_checkpoint_s_file_says_what_it_is(tmp_path):
    network = {f"blocks.{k}.weight": torch.randn(4, 4).half() for k in range(15)}
    network["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = torch.randn(4, 768).half()
    file = tmp_path / "a.safetensors"
    save_file({f"model.diffusion_model.{k}": v for k, v in network.items()} | {"vae.weight": torch.zeros(1)}, file)
    right = Base("stable-diffusion-v1", hashes=(fingerprint(network),), name="a.safetensors")
    assert read_base(file) == right
    save_file(network, file)  # the network alone
    os.utime(file, (1, 1))
    assert read_base(file) == right
    for name in ("b.ckpt", "gone.safetensors"):
        (tmp_path / "b.ckpt").write_bytes(b"x")
        assert read_base(tmp_path / name) == Base(name=name)


def test_all_of_it_at_once():
    said = check_fit(CARD, replace(RIGHT, hashes=("c" * 16,)), "s", steps=2, weight=0.5, cfg=2.0)
    assert [words.split(" is ")[0].split(" was ")[0] for words in said] == ["s", "the weight of s", "steps", "cfg"]
