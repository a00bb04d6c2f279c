"""The recipe of the embedded model: its split, its captions, and a small teacher from pictures to a packed model."""

import json
import random
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from turbodistill.demo import files
from turbodistill.demo.recipe import autoencoder, dataset, fit, pack, teacher, unpack, vision

NAMES = [f"thing {i}" for i in range(3000)]
STYLES = list(dataset.STYLES)


def test_the_split_holds_out_names_and_combinations():
    splits = {name: [dataset.split_of(name, style) for style in STYLES] for name in NAMES}
    kinds = Counter(tuple(sorted(of_name)) for of_name in splits.values())
    # A name is held out whole, or lacks one style, or has all.
    assert set(kinds) == {("heldout",) * 3, ("combination", "train", "train"), ("train",) * 3}
    assert kinds[("heldout",) * 3] / len(NAMES) == pytest.approx(13 / 256, abs=0.015)
    assert kinds[("combination", "train", "train")] / len(NAMES) == pytest.approx(0.1, abs=0.02)
    left_out = Counter(STYLES[s.index("combination")] for s in splits.values() if "combination" in s)
    assert min(left_out.values()) > 0.25 * sum(left_out.values())


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("fire engine", ["heldout", "heldout", "heldout"]),
        ("lizard", ["train", "train", "train"]),
        ("red apple", ["combination", "train", "train"]),
        ("rice ball", ["combination", "train", "train"]),
        ("clinking beer mugs", ["train", "combination", "train"]),
        ("candy", ["train", "train", "combination"]),
    ],
)
def test_the_split_stays_as_it_is(name, splits):
    # The embedded model is measured on it: a picture must not move from one side to the other.
    assert [dataset.split_of(name, style) for style in STYLES] == splits


def record(name="red apple", style="noto", split="train", words=("fruit", "mac", "school")):
    caption = f"{name}, food-fruit, {dataset.STYLES[style]}"
    return {"name": name, "caption": caption, "style": style, "split": split, "keywords": list(words)}


@pytest.mark.parametrize("kind", teacher.CAPTIONS)
def test_every_caption_says_style_and_thing(kind):
    draw, told = random.Random(0), record()
    captions = {teacher.CAPTIONS[kind](told, draw) for _ in range(300)}
    for text in captions:
        assert "flat noto" in text
        assert any(word in text for word in ("red apple", *told["keywords"]))
    assert told["caption"] in captions
    assert len(captions) == 3 if kind == "fixed" else len(captions) > 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe's folder of 24 plain pictures: coloured squares, 8 names in three styles, of each split some."""
    folder = tmp_path_factory.mktemp("recipe")
    draw, images, records = torch.Generator().manual_seed(0), [], []
    for i in range(8):
        for k, style in enumerate(STYLES):
            picture = torch.full((3, 64, 64), 255, dtype=torch.uint8)
            colour = torch.randint(0, 200, (3, 1, 1), generator=draw).to(torch.uint8)
            picture[:, 8 + k : 48, 8 : 48 + k] = colour
            images.append(picture)
            split = "heldout" if i == 7 else "combination" if i == 6 and k == 1 else "train"
            records.append(record(f"square {i}", style, split))
    save_file({"images": torch.stack(images)}, folder / "dataset.safetensors", {"records": json.dumps(records)})
    unpack.unpack(files.MODEL, folder)
    return folder


def call(folder, monkeypatch, *options):
    arguments = ["teacher", "--folder", str(folder), "--batch-size", "2", "--device", "cpu", *map(str, options)]
    monkeypatch.setattr(sys, "argv", arguments)
    teacher.main()


@pytest.mark.slow
def test_a_teacher_is_trained_branched_and_packed(folder, monkeypatch, capsys):
    from turbodistill.trainer.pipeline.load import load_model

    call(folder, monkeypatch, "--status")
    assert "no training" in capsys.readouterr().out
    call(folder, monkeypatch, "--updates", 3)
    state, *_ = teacher.paths(folder)
    assert state.stat().st_size < 64e6
    before = state.read_bytes()
    call(folder, monkeypatch, "--decay", 2)
    assert state.read_bytes() == before  # the branch leaves the training as it is
    assert "held-out loss" in capsys.readouterr().out
    call(folder, monkeypatch, "--updates", 4)
    call(folder, monkeypatch, "--status")
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["3", "4"]
    with pytest.raises(SystemExit, match="other settings"):
        call(folder, monkeypatch, "--updates", 5, "--weighting", "min-snr")
    call(folder, monkeypatch, "--decay", 1, "--weighting", "min-snr")  # the recipe is that of the training
    capsys.readouterr()
    model = folder / "model.safetensors"
    pack.pack_model(folder, model)
    host = load_model(model, "cpu")
    trained = load_file(folder / "teacher.safetensors")
    held = host.denoiser.backbone.state_dict()
    assert all(torch.equal(held[name], value.half().float()) for name, value in trained.items())


@pytest.mark.parametrize(
    "options",
    [
        ("--decay", 0),
        ("--updates", -1),
        ("--lr", "nan"),
        ("--save-every", 0),
        ("--align", "nan"),
        ("--device", "nonsense"),
        ("--device", "meta"),
    ],
)
def test_numbers_that_cannot_be_are_told_before_anything_is_loaded(tmp_path, monkeypatch, capsys, options):
    with pytest.raises(SystemExit, match="2"):
        call(tmp_path, monkeypatch, *options)
    assert f"{options[0]} is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe",
    [
        teacher.Recipe(prediction="x0"),
        teacher.Recipe(weighting="min-snr"),
        teacher.Recipe(timesteps="logit-normal", captions="drawn"),
        teacher.Recipe(augment=True),
    ],
    ids=lambda r: "-".join(str(v) for v in vars(r).values()),
)
def test_every_recipe_gives_a_loss_with_gradients(folder, recipe):
    made = teacher.Teacher(folder, recipe, "cpu", 2)
    value = made.loss(made.learner, 0)
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.learner.parameters())
    assert torch.equal(value, made.loss(made.learner, 0))  # drawn by the step alone
    assert not torch.equal(value, made.loss(made.learner, 1))


def test_an_x0_network_that_is_right_has_no_loss(folder):
    made = teacher.Teacher(folder, teacher.Recipe(prediction="x0"), "cpu", 2)
    x0, noise = made.latents[:2, 0].float(), torch.randn(2, 4, 16, 16)

    class Right:
        def __call__(self, *_):
            return type("Output", (), {"sample": x0})

    errors, _ = made.passed(Right(), x0, noise, torch.tensor([10, 900]), ["", ""])
    assert errors.abs().max() < 1e-9


def test_alignment_wants_what_the_vision_transformer_sees(folder):
    features = torch.randn(24, 384, 8, 8).half()
    save_file({"features": features}, folder / "features.safetensors")
    made = teacher.Teacher(folder, teacher.Recipe(align=0.5), "cpu", 2)
    plain = teacher.Teacher(folder, teacher.Recipe(), "cpu", 2)
    plain.learner.unet.load_state_dict(made.learner.unet.state_dict())
    aligned, without = made.loss(made.learner, 0), plain.loss(plain.learner, 0)
    assert aligned.item() == pytest.approx(without.item() + 0.5, abs=0.2)  # of random features: hardly any likeness
    aligned.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.learner.head.parameters())


def test_a_view_is_the_picture_moved_on_white():
    from turbodistill.demo.recipe import views

    image = torch.ones(4, 3, 64, 64)
    image[:, :, 20:44, 20:44] = -1.0
    seen = views.moved(image, 0)
    assert seen.shape == image.shape
    assert (seen[:, :, :6] > 0.95).all() and (seen[:, :, :, -6:] > 0.95).all()  # white comes in from beyond the edge
    assert (seen[:, :, 30:34, 30:34] < -0.95).all()
    area = (seen[:, 0] < 0).float().sum((1, 2)) / 24**2
    assert (area > views.SMALLEST**2 - 0.08).all() and (area < 1.05).all()


def test_the_reference_has_the_kin_of_every_held_out_combination():
    records = [
        {"name": name, "style": style, "split": dataset.split_of(name, style)} for name in NAMES for style in STYLES
    ]
    records = records[:4800]
    rows = pack.reference_rows(records)
    chosen = [records[i] for i in rows]
    assert len(set(rows)) == len(rows)
    assert Counter(r["split"] for r in chosen)["train"] == pack.REFERENCE
    held = {r["name"] for r in records if r["split"] != "train"}
    styles = Counter(r["name"] for r in chosen)
    assert all(styles[name] == 3 for name in held)


def test_positions_are_those_of_a_smaller_grid():
    grid = torch.arange(37.0).view(1, 1, 37, 1).expand(1, 37, 37, 2)  # grows from left to right
    positions = torch.cat([torch.full((1, 1, 2), -7.0), grid.flatten(1, 2)], 1)
    small = vision.resized(positions, 16)
    assert small.shape == (1, 257, 2)
    assert (small[:, 0] == -7).all()
    rows = small[:, 1:].unflatten(1, (16, 16))
    assert torch.allclose(rows[0, :, :, 0], rows[0, :1, :, 0].expand(16, 16))
    assert (rows[0, 0, :, 0].diff() > 2).all()


def test_the_autoencoder_s_settings_are_those_of_the_embedded_model():
    assert pack.describe(1.0, "{}", "v")["modelspec.resolution"] == "64x64"
    from safetensors import safe_open

    with safe_open(files.MODEL, "pt") as file:
        about = json.loads(file.metadata()[files.HEADER])
    assert about["vae"].items() >= json.loads(json.dumps(autoencoder.CONFIG)).items()
    assert about["unet"] == json.loads(json.dumps(teacher.CONFIG))
    assert fit.FORMAT == 1
