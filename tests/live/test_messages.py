"""What the Live page sends: read as it is meant, and refused in words where it cannot be."""

import io
import json

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="needs gradio: pip install 'turbodistill[ui]'")
from turbodistill.app.live.clip import clip_of
from turbodistill.app.live.messages import LONGEST, MessageError, asked, file_of, packed, picture_of, unpacked

SIZE = (32, 16)


def file(image, kind="png"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_an_input_is_read_as_it_was_sent():
    about = {
        "number": 7, "prompt": "a fox 🦊", "towards": "an owl", "mix": 0.5, "strength": 0.4, "seed": 3, "steps": 2,
        "angle": 1, "student": "mine",
    }  # fmt: skip
    found = asked(packed(about, file(Image.new("RGB", SIZE, (255, 0, 51)))), SIZE)
    assert (found.number, found.student) == (7, "mine")
    shot = found.shot
    assert (shot.prompt, shot.towards, shot.mix, shot.strength) == ("a fox 🦊", "an owl", 0.5, 0.4)
    assert (shot.seed, shot.steps, shot.angle) == (3, 2, 1.0)
    assert torch.allclose(shot.picture[:, 4, 5], torch.tensor([1.0, 0.0, 0.2])) and shot.picture.shape == (3, 16, 32)
    assert asked(packed({"number": 1, "prompt": ""}), SIZE).shot.picture is None


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"promt": "a"}, "promt is no field"),
        ({"prompt": 3}, "prompt is 3: give a text"),
        ({"prompt": "a" * 4001}, "at most 4000 letters"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"strength": 0}, r"strength is 0: give 0.01 to 1"),
        ({"strength": True}, "strength is True"),
        ({"mix": 10**400}, "mix is 1"),
        ({"seed": -1}, "seed is -1: give a whole number"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"steps": 9}, "steps is 9: give a whole number, 1 to 8"),
        ({"number": "1"}, "number is '1'"),
        ({"angle": 1e300}, "angle is 1e"),
    ],
)
def test_wrong_values_are_told(about, words):
    with pytest.raises(MessageError, match=words):
        asked(packed(about), SIZE)


@pytest.mark.parametrize(
    "message", [b"", b"\0", b"\0\0\0\xff{}", b"\0\0\0\2[]", b"\0\0\0\1{", b"\xff\xff\xff\xff", b"\0\0\0\2{}no picture"]
)
def test_what_is_no_message_is_told(message):
    with pytest.raises(MessageError):
        asked(message, SIZE)


def test_nan_is_told():
    text = b'{"strength": NaN}'
    with pytest.raises(MessageError, match="strength is nan"):
        asked(len(text).to_bytes(4, "big") + text, SIZE)


def test_a_message_has_bounds():
    with pytest.raises(MessageError, match=r"has 8,388,6\d\d bytes: send at most 8,388,608"):
        unpacked(packed({}, bytes(LONGEST)))
    deep = b"[" * 100_000
    with pytest.raises(MessageError, match="no JSON"):
        unpacked(len(deep).to_bytes(4, "big") + deep)


def test_pictures_are_fitted_turned_and_put_on_white():
    wide = Image.new("RGB", (100, 20), "red")
    wide.paste("blue", (0, 0, 10, 20))  # which a crop to the middle leaves out
    found = picture_of(file(wide), SIZE)
    assert found.shape == (3, 16, 32) and torch.allclose(found[:, 8], torch.tensor([1.0, 0.0, 0.0])[:, None], atol=0.02)
    assert (picture_of(file(Image.new("RGBA", (32, 16), (0, 0, 0, 0))), SIZE) == 1).all()
    phone = Image.new("RGB", (16, 32), "white")
    phone.paste("black", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # it was held upright: its left side is below
    buffer = io.BytesIO()
    phone.save(buffer, "jpeg", exif=exif, quality=95)
    upright = picture_of(buffer.getvalue(), SIZE)
    assert upright[:, :, :12].mean() > 0.9 > 0.1 > upright[:, :, 20:].mean()


@pytest.mark.parametrize("kind", ["gif", "bmp", "tiff"])
def test_other_kinds_of_pictures_are_refused(kind):
    with pytest.raises(MessageError, match="send PNG, JPEG or WebP"):
        picture_of(file(Image.new("RGB", SIZE), kind), SIZE)


def test_a_picture_of_too_many_pixels_is_refused_unread():
    with pytest.raises(MessageError, match="5000 x 5000 pixels: send at most 4096 on a side"):
        picture_of(file(Image.new("1", (5000, 5000))), SIZE)


@pytest.mark.parametrize(("side", "kind"), [(64, "image/png"), (512, "image/jpeg")])
def test_a_frame_s_file_is_its_picture(side, kind):
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    picture = torch.stack([rows / side, columns / side, torch.full((side, side), 0.3)])
    made, found = file_of(picture)
    assert found == kind
    pixels = torch.from_numpy(__import__("numpy").array(Image.open(io.BytesIO(made)))).permute(2, 0, 1) / 255
    assert (pixels - picture).abs().max() < (0.003 if side == 64 else 0.05)


def clip(kind="gif", times=(0, 100, 250), frames=None, **changes):
    files = [file(Image.new("RGB", SIZE, (k * 60, 0, 0))) for k in range(3)] if frames is None else frames
    about = {"format": kind, "times": list(times), "lengths": [len(f) for f in files]} | changes
    return packed(about, b"".join(files))


def test_a_clip_has_its_frames_for_their_times():
    made, kind = clip_of(clip())
    film = Image.open(io.BytesIO(made))
    stays = []
    for k in range(film.n_frames):
        film.seek(k)
        stays.append(film.info["duration"])
    assert kind == "gif" and stays == [100, 150, 100]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (clip("avi"), "format is 'avi'"),
        (clip(times=(0, 50, 20)), "times rise"),
        (clip(times=(0, 1)), "as many numbers"),
        (clip(times=(0, 1, 10**9)), "in 60 s"),
        (clip(lengths=[1, 2, 3]), "the lengths are those"),
        (clip(lengths=[True, 2, 3]), "as many numbers"),
        (clip(frames=[b"a", b"b", b"c"]), "a frame cannot be read"),
        (packed({"format": "gif"}), "as many numbers"),
    ],
)
def test_a_clip_that_cannot_be_is_told(message, words):
    with pytest.raises(ValueError, match=words):
        clip_of(message)


def test_a_message_is_what_the_page_packs():
    about, rest = unpacked(packed({"a": [1, "ü"]}, b"rest"))
    assert about == {"a": [1, "ü"]} and rest == b"rest"
    assert packed({}, b"x") == b"\0\0\0\2" + json.dumps({}).encode() + b"x"
