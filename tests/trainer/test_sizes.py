"""Several sizes in one training: pairs of each, batches of one, pictures where they fit, and the card's list."""

import io
from functools import partial

import pytest
import torch
from PIL import Image
from turbodistill.core.card import read_card
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.data.found import Found
from turbodistill.trainer.data.pairs import load_pairs, make_pairs, pairs_recipe
from turbodistill.trainer.data.sizes import by_size, pictures_by_size, with_buckets
from turbodistill.trainer.loop import batch as drawing
from turbodistill.trainer.loop.batch import draw_batch
from turbodistill.trainer.run.estimate import estimate
from turbodistill.trainer.run.events import PairsMade, Preview, Selected
from turbodistill.trainer.sizes import sizes_of

SIZES = "32x32, 24x40, 40x24"  # of the toy, which makes latents of a quarter
LATENTS = [(4, 8, 8), (4, 10, 6), (4, 6, 10)]  # channels, height, width


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("64x64", [(64, 64)]),
        (" 1024 x 1024 ,832X1216, 1216×832,", [(1024, 1024), (832, 1216), (1216, 832)]),
        ("64x64, 64x64", [(64, 64)]),
    ],
)
def test_sizes_as_people_write_them(text, expected):
    assert sizes_of(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("64", "sizes has '64': write width x height, such as 1024x1024, 832x1216"),
        ("64x64x64", "sizes has '64x64x64'"),
        ("-64x64", "sizes has '-64x64'"),
        ("64x63", "height is 63: give a multiple of 8 from 16 to 4096"),
        ("99999999x64", "sizes has '99999999x64'"),
        (", ".join(f"{8 * k}x64" for k in range(2, 19)), "sizes has 17: give at most 16"),
        ("64x64, 32x32, 16x16", "pairs is 11: 3 sizes need at least 12"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything(text, words):
    with pytest.raises(ConfigError, match=words):
        Config(sizes=text, pairs=11)


def test_each_size_has_its_share_of_pairs_in_a_folder_of_its_own(kit, host, tmp_path):
    config = kit.config(sizes=SIZES, pairs=14)
    told = [(done, newest.shape[1:]) for done, newest in make_pairs(host, config, kit.WORDS, tmp_path)]
    assert [done for done, _ in told] == [4, 5, 9, 10, 14]
    assert [tuple(shape) for _, shape in told] == [LATENTS[0]] * 2 + [LATENTS[1]] * 2 + [LATENTS[2]]
    for name, count, latents in zip(("32x32", "24x40", "40x24"), (5, 5, 4), LATENTS, strict=True):
        pairs = load_pairs(tmp_path / name)
        assert tuple(pairs.latents.shape) == (count, *latents)
    alone = kit.pairs(host.sized(24, 40), kit.config(pairs=5), tmp_path / "alone", kit.WORDS[4:] + kit.WORDS[:4])
    assert torch.equal(alone.latents[:], load_pairs(tmp_path / "24x40").latents[:])


def test_sizes_begin_at_different_prompts_and_more_pairs_go_on(kit, host, tmp_path):
    few = [[*share.prompts[:2]] for share in by_size(host, kit.config(sizes=SIZES), kit.WORDS, tmp_path)]
    assert few == [[*kit.WORDS[:2]], [*kit.WORDS[4:6]], [*kit.WORDS[8:10]]]
    kit_pairs = kit.config(sizes=SIZES, pairs=12)
    list(make_pairs(host, kit_pairs, kit.WORDS, tmp_path))
    before = load_pairs(tmp_path / "40x24").latents[:]
    list(make_pairs(host, kit_pairs.replace(pairs=24), kit.WORDS, tmp_path))
    after = load_pairs(tmp_path / "40x24")
    assert len(after) == 8 and torch.equal(after.latents[:4], before)


def test_other_sizes_are_other_pairs(kit, host):
    recipes = [pairs_recipe(host, kit.config(sizes=sizes), kit.WORDS) for sizes in ("", "32x32", SIZES, "24x40, 32x32")]
    assert recipes[0] == recipes[1]
    assert [recipe["size"].removesuffix(" (of latents)") for recipe in recipes[1:]] == [
        "8 x 8", "8 x 8, 6 x 10, 10 x 6", "6 x 10, 8 x 8"
    ]  # fmt: skip


def test_each_batch_is_of_one_size_and_all_come(kit, host, tmp_path, monkeypatch):
    drawn = []

    def draw(*args, **more):
        drawn.append(draw_batch(*args, **more))
        return drawn[-1]

    monkeypatch.setattr(drawing, "draw_batch", draw)
    config = kit.config(
        sizes=SIZES, pairs=24, updates=12, evaluate_every=6, preview_every=6, distillation_weight=1.0, positives="both"
    )
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, size in enumerate([(32, 32), (24, 40), (300, 500)]):
        Image.new("RGB", size, (k * 80, 0, 0)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(kit.WORDS[k])
    events = kit.go(host, config, tmp_path / "run", images=folder)
    assert {tuple(batch.x.shape[1:]) for batch in drawn} == set(LATENTS)
    assert len([e for e in events if isinstance(e, Selected)]) == 2
    assert all(tuple(e.student.shape[1:]) == LATENTS[0] for e in events if isinstance(e, Preview))
    encoded = [(e.done, tuple(e.newest.shape)) for e in events if isinstance(e, PairsMade) and e.what == "pictures"]
    assert encoded == [(1, (1, *LATENTS[0])), (3, (2, *LATENTS[1]))]
    card = read_card(events[-1].path)
    assert card.sizes == SIZES and card.resolution == (32, 32)
    assert f"Resolution: {SIZES}." in card.in_words()


def test_a_run_of_several_sizes_goes_on_to_the_same(kit, host, tmp_path):
    config = kit.config(sizes=SIZES, updates=6)
    *_, whole = kit.go(host, config, tmp_path / "whole")
    kit.go(host, config.replace(updates=3), tmp_path / "cut")
    *_, cut = kit.go(host, config, tmp_path / "cut")
    assert kit.same(kit.tensors(whole.path), kit.tensors(cut.path))
    with pytest.raises(ConfigError, match="sizes was '32x32, 24x40, 40x24' and is '32x32'"):
        kit.go(host, config.replace(sizes="32x32"), tmp_path / "cut")


def test_keys_of_pictures_differ_between_sizes(kit, host, tmp_path):
    config = kit.config(pairs=12)
    pairs = kit.pairs(host, config, tmp_path)
    student = kit.state(host, config, pairs).student
    uncond = host.encode_text([""])
    keys = [
        set(drawing.Group.of(pairs, uncond, pictures, number)
            .batch(config.replace(positives="both", batch_size=64), student, drawing.generator(0, 0))
            .positive_key.tolist())
        for number in (0, 1) for pictures in (None, pairs)
    ]  # fmt: skip
    assert not (keys[0] | keys[1]) & (keys[2] | keys[3])
    assert len(keys[1]) > 12  # pictures of one's own are no pairs'


def test_pictures_go_where_their_shape_fits(kit):
    found = Found("here")

    def add(name, size, orientation=None):
        file = io.BytesIO()
        image = Image.new("RGB", size)
        exif = image.getexif()
        if orientation:
            exif[0x0112] = orientation
        image.save(file, "JPEG", exif=exif)
        found.add(name, name, "a", lambda: io.BytesIO(file.getvalue()))

    add("square", (100, 100))
    add("tall", (500, 900))
    add("lying", (900, 500), orientation=6)  # a camera that was held upright
    add("wide", (900, 500))
    found.add("broken", "broken", "a", lambda: io.BytesIO(b"no picture"))
    parts = pictures_by_size(found, sizes_of(SIZES))
    assert [[p.name for p in part.pictures] for part in parts] == [["square", "broken"], ["tall", "lying"], ["wide"]]


def test_the_estimate_is_of_all_sizes(kit):
    unet = kit.unet_host()
    config = kit.config(taps="", pairs=12)
    one, both = estimate(unet, config, kit.WORDS), estimate(unet, config.replace(sizes="32x32, 64x64"), kit.WORDS)
    large = estimate(unet.sized(64, 64), config, kit.WORDS)
    assert both.memory == large.memory and both.memory.activations > one.memory.activations
    assert one.on_disk < both.on_disk < large.on_disk


@pytest.mark.parametrize(
    ("resolution", "shapes", "expected"),
    [
        # Shapes that SDXL was trained with (its paper's appendix I), of pictures as cameras and phones make them.
        ((1024, 1024), {(3000, 3000): 5, (3000, 2000): 5, (1080, 1920): 5}, "768x1344, 1024x1024, 1216x832"),
        ((1024, 1024), {(3000, 3000): 95, (3000, 2000): 4}, "1024x1024"),  # too few of the other
        ((512, 512), {(4000, 3000): 1, (3000, 4000): 1}, "448x576, 576x448"),
        ((64, 64), {(48, 72): 1, (9000, 1000): 1}, "48x80, 88x40"),
    ],
)
def test_buckets_are_shapes_of_the_pictures(resolution, shapes, expected):
    found = Found("here")
    for size, count in shapes.items():
        file = io.BytesIO()
        Image.new("1", size).save(file, "PNG")
        for k in range(count):
            found.add(f"{size}-{k}", "", "a", partial(io.BytesIO, file.getvalue()))
    config = Config(sizes="buckets", pairs=64)
    assert with_buckets(config, found, resolution).sizes == expected
    assert with_buckets(Config(), found, resolution).sizes == ""


def test_buckets_without_pictures_are_refused(kit, host, tmp_path):
    with pytest.raises(
        ConfigError, match="sizes is 'buckets', which takes them from an image folder, and there is none"
    ):
        kit.go(host, kit.config(sizes="buckets"), tmp_path)


def test_buckets_leave_out_what_cannot_be_read_and_many_rare_shapes_still_count():
    found = Found("here")
    found.add("broken", "", "a", lambda: io.BytesIO(b"no picture"))
    for k in range(30):  # none of whose shapes has a twentieth of them
        file = io.BytesIO()
        Image.new("1", (1000 + 40 * k, 2000 - 40 * k)).save(file, "PNG")
        found.add(str(k), "", "a", partial(io.BytesIO, file.getvalue()))
    sizes = sizes_of(with_buckets(Config(sizes="buckets", pairs=64), found, (1024, 1024)).sizes)
    assert 1 <= len(sizes) <= 8 and all(width * height <= 1024**2 for width, height in sizes)
