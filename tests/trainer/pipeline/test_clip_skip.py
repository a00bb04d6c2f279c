"""Clip skip in plain Python: the layer that is read, what is refused, the pairs' key, and what a student says of it."""

import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from turbodistill import load_model
from turbodistill.app.cli import main
from turbodistill.core.card import read_card
from turbodistill.generate.few_step import few_step_model, open_file
from turbodistill.trainer.data.pairs import pairs_key
from turbodistill.trainer.pipeline.host import ModelError

LAYERS = 5


def clip(tiny, projects=False):
    settings = {**tiny.PLAIN, "num_hidden_layers": LAYERS, "projection_dim": tiny.WIDTH}
    config = CLIPTextConfig(**settings, vocab_size=54, max_position_embeddings=16, bos_token_id=0, eos_token_id=1)
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


@pytest.fixture
def deep(tiny_kit):
    """A short name -> a tiny pipeline whose text encoders have LAYERS layers."""

    def make(name):
        torch.manual_seed(0)
        pipe = tiny_kit.tiny.make(name)
        if name == "sd":
            pipe.text_encoder = clip(tiny_kit.tiny)
        else:
            pipe.text_encoder, pipe.text_encoder_2 = clip(tiny_kit.tiny), clip(tiny_kit.tiny, True)
        return pipe

    return make


def put_out(encoder, number, prompt, tokenizer):
    """What the layer of that number, counted from the end and from 1, puts out for a prompt."""
    ids = tokenizer(prompt, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    found = []
    hook = (
        getattr(encoder, "text_model", encoder)
        .encoder.layers[-number]
        .register_forward_hook(lambda _m, _a, out: found.append(out))
    )
    with torch.no_grad():
        encoder(ids)
    hook.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


@pytest.mark.parametrize("skip", [None, 1, 2, 3])
def test_stable_diffusion_reads_that_layer_through_the_last_norm(deep, tiny_kit, skip):
    pipe = deep("sd")
    model = load_model(pipe, size=(16, 16), clip_skip=skip)
    states = put_out(pipe.text_encoder, skip or 1, "a red fox", pipe.tokenizer)
    with torch.no_grad():
        text_model = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)  # transformers 5 has none
        expected = text_model.final_layer_norm(states)
    before = tiny_kit.everything(pipe)
    assert torch.allclose(model.encode_text(["a red fox"]).context, expected, atol=1e-6)
    assert model.clip_skip == (skip or 1) and tiny_kit.everything(pipe) == before


@pytest.mark.parametrize(("skip", "layer"), [(None, 2), (1, 2), (2, 2), (3, 3)])
def test_xl_reads_that_layer_of_both_but_none_above_the_one_before_the_last(deep, skip, layer):
    pipe = deep("sdxl")
    model = load_model(pipe, size=(16, 16), clip_skip=skip)
    expected = [
        put_out(encoder, layer, "a red fox", tokenizer)
        for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))
    ]
    assert torch.allclose(model.encode_text(["a red fox"]).context, torch.cat(expected, -1), atol=1e-6)
    assert model.clip_skip == layer
    assert not model.encode_text([""]).context.any()  # the empty prompt stays zeros


def test_another_clip_skip_has_pairs_of_its_own_and_the_model_s_own_keeps_them(deep, tiny_kit):
    for name, own, other in (("sd", 1, 2), ("sdxl", 2, 3)):
        pipe = deep(name)
        keys = [
            pairs_key(load_model(pipe, size=(16, 16), clip_skip=skip), tiny_kit.settings(), ["a fox"])
            for skip in (None, own, other)
        ]
        assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("skip", [0, 13, -1, 1.5, True, "2"])
def test_a_number_that_is_none_is_refused_before_anything_is_loaded(skip):
    with pytest.raises(ModelError, match=r"clip_skip is .*: give 1, the last layer of CLIP, to 12"):
        load_model("no such model", clip_skip=skip)


def test_a_text_encoder_without_such_layers_is_refused(tiny_kit, deep):
    for name in ("sd3", "flux-dev", "chroma", "qwen-image", "sana"):
        with pytest.raises(ModelError, match=r"clip_skip is 2: the text encoder of .* has no layer .*: leave it out"):
            load_model(tiny_kit.tiny.make(name), clip_skip=2)
    with pytest.raises(ModelError, match=r"clip_skip is 6: the text encoder of .* has 5 layers"):
        load_model(deep("sd"), clip_skip=6)
    with pytest.raises(ModelError, match="clip_skip is 2: the embedded model's text encoder has no layers"):
        load_model(clip_skip=2)


def test_a_student_tells_it_and_is_remarked_on_where_it_is_another(deep, tiny_kit, tmp_path):
    pipe = deep("sd")
    path = tiny_kit.distil(load_model(pipe, size=(16, 16), clip_skip=2), tmp_path)
    assert read_card(path).clip_skip == 2
    assert "\nClip skip: 2.\n" in read_card(path).in_words()
    for skip, said in ((2, []), (None, ["trained with clip skip 2, and is sampled with 1: set it to 2."])):
        _, remarks = few_step_model(load_model(pipe, size=(16, 16), clip_skip=skip), open_file(path))
        assert [r for r in remarks if "clip skip" in r] == [f"student.safetensors was {words}" for words in said]


def test_a_student_of_the_model_s_own_says_nothing(tiny_kit, tmp_path):
    card = read_card(tiny_kit.distil(tiny_kit.host("sd"), tmp_path))
    assert card.clip_skip == 1 and "Clip skip" not in card.in_words()


def test_sample_takes_the_card_s_unless_another_is_asked_for(deep, tiny_kit, tmp_path, capsys):
    folder = tmp_path / "base"
    deep("sd").save_pretrained(folder)
    student = tiny_kit.distil(load_model(folder, size=(16, 16), clip_skip=2), tmp_path / "run")
    for flags, written, said in (([], "Clip skip: 2,", False), (["--clip-skip", "1"], "", True)):
        out = tmp_path / f"pictures{len(flags)}"
        asked = ["sample", "a red fox", "--model", folder, "--student", student, "--size", "16x16", "--out", out]
        assert main([*map(str, asked), *flags]) == 0
        (picture,) = out.glob("*.png")
        with Image.open(picture) as made:
            assert (written or "Steps: ") in made.text["parameters"]
            assert ("Clip skip" in made.text["parameters"]) == bool(written)
        assert ("trained with clip skip 2, and is sampled with 1" in capsys.readouterr().err) == said
    with pytest.raises(SystemExit):
        main(["sample", "a fox", "--clip-skip", "13"])
    assert "is '13': give a whole number from 1 to 12" in " ".join(capsys.readouterr().err.split())
