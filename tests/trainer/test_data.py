"""Prompts and captioned pictures: encoded once, and refused with a reason when they cannot be used."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from turbodistill.trainer.data import conditioning, images
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.found import Picture, open_file
from turbodistill.trainer.data.images import check_pictures, load_images, load_picture
from turbodistill.trainer.data.pictures import read_pictures
from turbodistill.trainer.data.prompts import prompt_lines, read_prompts
from turbodistill.trainer.data.samples import Samples


def test_prompts_are_lines_without_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# a comment\n a red fox \r\n\n\u00fcber owl\n".encode())
    assert read_prompts(path) == ["a red fox", "über owl"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist: check the name"),
        (b"", "holds no prompt: write one a line"),
        (b"\n# only a comment\n", "holds no prompt"),
        (b"caf\xe9\n", "is no UTF-8 text"),
    ],
)
def test_a_bad_prompt_file_is_told(tmp_path, content, told):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_prompts(path)


def in_folder(folder):
    """The pictures of a folder as pairs of path and caption."""
    return [(Path(found.name), found.text) for found in read_pictures(folder).pictures]


def load(path, size):
    """A picture file's pixels, whatever lies beside it."""
    return load_picture(Picture(str(path), path.name, "", partial(open_file, path)), size)


def cache_images(host, folder, cache, broken="stop"):
    return images.cache_images(host, read_pictures(folder, broken), cache, broken)


def picture(path, colour="red", size=(40, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def captioned(folder, count=3):
    for i in range(count):
        picture(folder / f"{i}.png", (80 * i, 0, 0)).with_suffix(".txt").write_text(f"picture {i}\n")
    return folder


def test_captions_come_from_text_files(tmp_path):
    found = in_folder(captioned(tmp_path / "images"))
    assert [(p.name, text) for p, text in found] == [(f"{i}.png", f"picture {i}") for i in range(3)]


def test_captions_come_from_a_table(tmp_path):
    picture(tmp_path / "deep" / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "deep/a.png", "text": "a fox", "more": 1}\n\n')
    assert in_folder(tmp_path) == [(tmp_path / "deep" / "a.png", "a fox")]


def test_tables_come_as_other_programs_write_them(tmp_path):
    """With a byte order mark, odd letters within a caption, Windows' paths, or as CSV."""
    path = picture(tmp_path / "deep" / "a.png")
    table = tmp_path / "metadata.jsonl"
    table.write_bytes('\ufeff{"file_name": "deep\\\\a.png", "text": "a\u2028b\u0085cd"}\r\n'.encode())
    assert [(p.resolve(), text) for p, text in in_folder(f' "{tmp_path}" ')] == [(path, "a\u2028b\u0085cd")]
    table.unlink()
    (tmp_path / "metadata.csv").write_bytes(b'\xef\xbb\xbffile_name,text\r\ndeep/a.png,"a fox, red"\r\n')
    assert in_folder(tmp_path) == [(path, "a fox, red")]


def test_other_endings_are_found_and_the_system_s_own_files_are_not(tmp_path):
    for name, caption in (("a.JPG", "a.TXT"), ("b.jfif", "b.caption"), ("c.tiff", "c.txt"), ("d.gif", "d.txt")):
        image = Image.new("RGB", (20, 20), "red")
        image.save(tmp_path / name, {"b.jfif": "JPEG"}.get(name))
        (tmp_path / caption).write_text(name)
    (tmp_path / "._a.png").write_bytes(b"of macOS")
    found = read_pictures(tmp_path)
    assert [(Path(p.name).name, p.text) for p in found.pictures] == [
        (n, n) for n in ("a.JPG", "b.jfif", "c.tiff", "d.gif")
    ]
    assert check_pictures(found.pictures) is None
    assert all(load_picture(p, (8, 8)).shape == (3, 8, 8) for p in found.pictures)


def test_a_picture_lies_as_its_camera_was_held(tmp_path):
    image = Image.new("RGB", (20, 20), "red")
    image.paste("blue", (0, 0, 20, 10))  # above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    shown = load(tmp_path / "a.png", (20, 20))
    assert shown[0, 5, 10] == 1 and shown[2, 15, 10] == 1


def test_a_picture_of_sixteen_bits_keeps_its_tones(tmp_path):
    values = np.linspace(0, 65535, 20).astype(np.uint16)[None].repeat(20, 0)
    Image.fromarray(values).save(tmp_path / "a.png")
    shown = load(tmp_path / "a.png", (20, 20))
    assert torch.allclose(shown[0, 0], torch.from_numpy(values[0].astype(np.float32) / 65535), atol=1 / 255)


def no_caption(folder):
    picture(folder / "a.png")


def caption_in_another_encoding(folder):
    picture(folder / "a.png").with_suffix(".txt").write_bytes(b"caf\xe9")


def table(line):
    def make(folder):
        picture(folder / "a.png")
        (folder / "metadata.jsonl").write_bytes(line)

    return make


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: folder.rmdir(), "does not exist"),
        (lambda folder: None, "holds no picture"),
        (no_caption, "1 pictures have no caption, the first is .*a.png: write it to a .txt"),
        (caption_in_another_encoding, "a.txt is no UTF-8 text"),
        (table(b'{"file_name": "a.png"}'), "every row must have file_name and text"),
        (table(b"a.png, a fox"), "every row must have"),
        (table(b'["a.png", "a fox"]'), "every row must have"),
        (table(b'{"file_name": "a.png", "text": null}'), "1 pictures have no caption, the first is .*a.png"),
        (table(b'{"file_name": "a.png", "text": " "}'), "1 pictures have an empty caption, the first is .*a.png"),
        (table(b'{"file_name": "../a.png", "text": "a"}'), "names '../a.png', which is not in its folder"),
        (table(b'{"file_name": "/etc/passwd", "text": "a"}'), "names '/etc/passwd', which is not in its folder"),
        (table(b"[" * 100_000), "every row must have"),
        (table("{}".encode("utf-16-le")), "is no UTF-8 text"),
        (table(b'{"file_name": "a.png", "text": "caf\xe9"}'), "is no UTF-8 text"),
        (table(b"\n"), "holds no picture"),
    ],
)
def test_a_bad_image_folder_is_told(tmp_path, make, told):
    folder = tmp_path / "images"
    folder.mkdir()
    make(folder)
    with pytest.raises(DataError, match=told):
        read_pictures(folder)


def test_a_picture_is_scaled_and_cropped_about_its_centre(tmp_path):
    wide = Image.new("RGB", (80, 20), "red")
    wide.paste("blue", (30, 0, 50, 20))
    wide.save(tmp_path / "wide.png")
    x = load(tmp_path / "wide.png", (10, 10))
    assert x.shape == (3, 10, 10) and x.dtype == torch.float32
    assert (x[2] - x[0] > 0.9)[:, 2:-2].all()  # the blue middle; its edges are filtered


def test_a_transparent_picture_is_put_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load(tmp_path / "clear.png", (8, 8)) == 1).all()


def broken_pictures():
    import io

    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "png")
    whole = buffer.getvalue()
    # A wrong first chunk makes Pillow raise SyntaxError or ValueError instead of OSError.
    return {
        "empty": b"",
        "text": b"no picture",
        "truncated": whole[: len(whole) // 2],
        "chunk": whole[:12] + b"\x00\x01\x02\x03" + whole[16:],
        "length": whole[:8] + b"\x00\x00\x00\x01" + whole[12:],
    }


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "chunk", "length"])
def test_a_broken_picture_is_named(tmp_path, kind):
    path = tmp_path / "a.png"
    path.write_bytes(broken_pictures()[kind])
    with pytest.raises(DataError, match=r"picture .*a.png cannot be read .*: replace or remove it"):
        load(path, (8, 8))


def test_pictures_are_encoded_once(kit, host, tmp_path, monkeypatch):
    folder, cache = captioned(tmp_path / "images"), tmp_path / "cache"
    ((done, latents),) = cache_images(host, folder, cache)
    first = load_images(cache, 3)
    assert done == 3 and first.prompts == ["picture 0", "picture 1", "picture 2"] and first.seeds is None
    assert first.latents.shape == (3, *host.latent_shape)
    expected = host.encode_images(load(folder / "1.png", host.resolution)[None])
    assert torch.equal(latents[1:2], expected) and torch.allclose(first.latents[:], latents, atol=2e-3)
    assert torch.allclose(first.cond.rows(slice(3)).context, host.encode_text(first.prompts).context, atol=2e-3)
    encoded, encode = [], host.encode_images
    monkeypatch.setattr(host, "encode_images", lambda images: [encoded.append(images), encode(images)][1])
    ((_, again),) = cache_images(host, folder, cache)
    assert torch.allclose(again.float(), latents, atol=2e-3)
    assert len(encoded) == 1  # to see that the autoencoder is the same
    # A new caption is a new picture.
    (folder / "1.txt").write_text("another")
    list(cache_images(host, folder, cache))
    changed = load_images(cache, 3)
    assert changed.prompts[1] == "another"
    assert torch.allclose(changed.cond.rows(slice(3)).context, host.encode_text(changed.prompts).context, atol=2e-3)


def test_a_broken_picture_in_a_folder_stops_the_encoding(host, tmp_path):
    folder = captioned(tmp_path / "images")
    (folder / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        list(cache_images(host, folder, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_pictures_have_no_noise(host):
    samples = Samples(torch.zeros(1, 4, 8, 8), host.encode_text(["a"]), ["a"])
    with pytest.raises(ValueError, match="only teacher pairs do"):
        samples.noise(torch.tensor([0]))


def test_pictures_of_another_model_are_encoded_anew_and_nothing_of_the_old_is_left(kit, host, tmp_path, monkeypatch):
    for module in (images, conditioning):
        monkeypatch.setattr(module, "SHARD", 2)
    folder = captioned(tmp_path / "images")
    list(cache_images(kit.conv_host(seed=1), folder, tmp_path / "cache"))
    (folder / "0.png").unlink()
    (folder / "1.txt").write_text("picture 2")
    list(cache_images(host, folder, tmp_path / "cache"))  # one prompt now, where the old one was of a second file
    found = load_images(tmp_path / "cache", 2)
    assert found.prompts == ["picture 2"] * 2 and found.cond.index.tolist() == [0, 0]


def test_pictures_are_encoded_anew_by_another_autoencoder(host, tmp_path, monkeypatch):
    folder, cache = captioned(tmp_path / "images"), tmp_path / "cache"
    ((_, before),) = cache_images(host, folder, cache)
    encode = host.encode_images
    monkeypatch.setattr(host, "encode_images", lambda images: 1.5 * encode(images))
    ((_, after),) = cache_images(host, folder, cache)
    assert torch.equal(after, 1.5 * before)


def test_captions_are_encoded_anew_by_another_text_encoder(host, tmp_path, monkeypatch):
    folder, cache = captioned(tmp_path / "images"), tmp_path / "cache"
    list(cache_images(host, folder, cache))
    before = load_images(cache, 3).cond.rows(slice(3)).context
    encode = host.encode_text
    monkeypatch.setattr(host, "text_hash", "another")
    monkeypatch.setattr(host, "encode_text", lambda prompts: encode([f"other {prompt}" for prompt in prompts]))
    list(cache_images(host, folder, cache))
    assert not torch.allclose(load_images(cache, 3).cond.rows(slice(3)).context, before, atol=0.1)


def test_prompts_are_the_lines_of_a_text():
    assert prompt_lines(" a fox \r\n\n# not this\n\tan owl #2") == ["a fox", "an owl #2"]
    assert prompt_lines("\n  # nor this\n") == []


def test_whole_pictures_pass(tmp_path):
    assert check_pictures(read_pictures(captioned(tmp_path / "images")).pictures) is None


@pytest.mark.parametrize("kind", ["empty", "text", "chunk", "length"])
def test_a_broken_picture_among_others_is_named_without_decoding_them(tmp_path, monkeypatch, kind):
    found = read_pictures(captioned(tmp_path / "images")).pictures
    (tmp_path / "images" / "1.png").write_bytes(broken_pictures()[kind])
    monkeypatch.setattr(images, "load_picture", None)
    with pytest.raises(DataError, match=r"picture .*1\.png cannot be read .*: replace or remove it"):
        check_pictures(found)


def test_a_picture_that_a_table_names_must_be_there(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a fox"}')
    told = r"1 pictures that a table names are not there, the first is a\.png .*row 1.*: put them there"
    with pytest.raises(DataError, match=told):
        read_pictures(tmp_path)
