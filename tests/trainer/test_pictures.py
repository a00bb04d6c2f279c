"""Pictures as people have them: folders and tables, what is left out of them, and their bounds."""

import io
import json
import os
import re
import time
from pathlib import Path

import pytest
import turbodistill
from PIL import Image
from turbodistill.trainer.data import captions, found, images, pictures, tables, tars, walk
from turbodistill.trainer.data.columns import PICTURES as PICTURE_COLUMNS
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.images import check_pictures, load_picture
from turbodistill.trainer.data.pictures import read_pictures
from turbodistill.trainer.data.walk import stamp
from turbodistill.trainer.run.events import Finished, PairsMade, Warned


def encoded(colour="red", kind="png", size=(40, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def put(folder, files):
    """Files of a folder by their names: bytes, texts, or values for JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = content if isinstance(content, bytes) else content if isinstance(content, str) else json.dumps(content)
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return folder


def texts(place, broken="stop"):
    return [each.text for each in read_pictures(place, broken).pictures]


def left(place, broken="skip"):
    """How many are left out for each reason."""
    return {reason.what: left.count for reason, left in read_pictures(place, broken).left.items()}


# --- folders ---


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", " a fox \n", "a fox"),
        ("a.TXT", "\ufeffa fox", "a fox"),
        ("a.Caption", "a fox", "a fox"),
        ("a.json", '"a fox"', "a fox"),
        ("a.JSON", {"caption": "a fox", "other": 1}, "a fox"),
        ("a.json", {"prompt": "a fox"}, "a fox"),
        ("a.json", {"text": "a fox", "prompt": "not this"}, "a fox"),
        ("a.json", {"captions": ["", "a fox", "not this"]}, "a fox"),
        ("a.json", {"Prompt": "a fox"}, "a fox"),
    ],
)
def test_a_caption_lies_beside_its_picture(tmp_path, name, content, text):
    found = read_pictures(put(tmp_path, {"a.png": encoded(), name: content}))
    assert [each.text for each in found.pictures] == [text] and found.in_words() == ""


def test_of_several_captions_the_plainest_counts_and_the_others_are_told(tmp_path):
    put(tmp_path, {"a.png": encoded(), "a.json": '"no"', "a.caption": "no", "a.txt": "a fox"})
    assert texts(tmp_path) == ["a fox"] and left(tmp_path) == {"captions and tables that another one goes before": 2}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", {"tags": ["fox"]}, "1 pictures have no caption, the first is .*a.png: write it to a .txt"),
        ("a.json", {"caption": None}, "1 pictures have no caption"),
        ("a.json", {"caption": 5}, r"a.json holds no caption \(5 is no text\): write it as plain text"),
        ("a.json", "[" * 100_000, "a.json holds no caption"),
        ("a.json", '{"caption": "a f', "a.json holds no caption"),
        ("a.json", "", "a.json holds no caption"),
        ("a.txt", "x" * 70_000, r"a.txt holds no caption \(70000 letters, where a caption has at most 65536\)"),
        ("a.txt", b"caf\xe9", "a.txt is no UTF-8 text"),
        ("a.txt", " \n", "1 pictures have an empty caption, the first is .*a.png: write what it shows"),
        ("a.txt", b"x" * (captions.LARGEST + 1), "a.txt is larger than a caption"),
        ("b.txt", "a fox", "1 pictures have no caption"),
    ],
)
def test_a_caption_that_cannot_be_used_stops_or_is_left_out_as_set(tmp_path, name, content, told):
    put(tmp_path, {"a.png": encoded(), name: content, "good.png": encoded(), "good.txt": "an owl"})
    with pytest.raises(DataError, match=told + r".*\. Or set broken_pictures to skip$"):
        read_pictures(tmp_path)
    assert texts(tmp_path, "skip") == ["an owl"] and sum(left(tmp_path).values()) == 1 + (name == "b.txt")
    for each in tmp_path.glob("good.*"):
        each.unlink()
    with pytest.raises(DataError, match="holds no picture that can be used; left out: 1 "):
        read_pictures(tmp_path, "skip")


def test_nothing_is_left_out_without_a_word(tmp_path):
    put(
        tmp_path,
        {
            "a.png": encoded(), "a.txt": "a fox", "b.jpg": encoded("blue", "jpeg"), "c.png": encoded(), "c.txt": "",
            "alone.txt": "no picture", "notes.pdf": b"", "data.zip": b"PK", "other.json": "{}", ".DS_Store": b"",
            "._a.png": b"", ".git/config": "", "@eaDir/a.png": encoded(), "x/d.webp": encoded("red", "webp"),
        },
    )  # fmt: skip
    (tmp_path / "linked").symlink_to(tmp_path / "x", target_is_directory=True)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    assert left(tmp_path) == {
        "pictures without a caption": 2, "pictures with an empty caption": 1, "captions without a picture": 1,
        "other files": 3, "hidden files and folders": 4, "linked folders": 1, "links and special files": 1,
    }  # fmt: skip
    words = read_pictures(tmp_path, "skip").in_words()
    assert words.startswith(f"1 pictures of image folder {tmp_path}; left out: ")
    assert "3 other files (.zip, .pdf, .json)" in words and "2 pictures without a caption (the first is " in words


def test_a_plain_folder_of_which_all_is_used_has_nothing_to_say(tmp_path):
    put(tmp_path, {"a.png": encoded(), "a.txt": "a fox", "deep/b.png": encoded(), "deep/b.txt": "an owl"})
    assert texts(tmp_path) == ["a fox", "an owl"] and read_pictures(tmp_path).in_words() == ""


def test_a_link_to_a_picture_is_that_picture(tmp_path):
    put(tmp_path / "store", {"x": encoded("blue"), "y": "a fox"})
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.png").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "hub" / "a.txt").symlink_to(tmp_path / "store" / "y")
    (picture,) = read_pictures(tmp_path / "hub").pictures
    assert picture.text == "a fox" and load_picture(picture, (4, 4))[2].min() == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which this system has not")
def test_a_pipe_is_not_waited_for(tmp_path):
    put(tmp_path, {"a.png": encoded(), "a.txt": "a fox"})
    for name in ("b.png", "b.txt", "metadata.csv", "c.tar"):
        os.mkfifo(tmp_path / name)
    assert texts(tmp_path) == ["a fox"] and left(tmp_path) == {"links and special files": 4}


def test_a_whole_disk_is_not_walked(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "MANY", 200)
    put(tmp_path, {f"system/{k}/{i}.so": b"" for k in range(10) for i in range(50)})
    put(tmp_path, {"z/a.png": encoded(), "z/a.txt": "a fox"})
    looked = []
    inner = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: (looked.append(1) or each for each in inner(*a, **k)))
    told = r"holds \d pictures among more than 200 other files and folders: give the folder in which the pictures lie"
    with pytest.raises(DataError, match=told):
        read_pictures(tmp_path)
    assert len(looked) < 10
    with pytest.raises(DataError, match=told):
        stamp(tmp_path)
    assert texts(tmp_path / "z") == ["a fox"]


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    put(tmp_path, {f"{i}.png": b"" for i in range(30)})
    monkeypatch.setattr(found, "MOST_FILES", 20)
    with pytest.raises(DataError, match="holds more than 20 files or rows: give the folder of the pictures alone"):
        read_pictures(tmp_path)


def test_the_stamp_of_a_folder_changes_with_any_of_its_files(tmp_path):
    put(tmp_path, {"a.png": encoded(), "a.txt": "a fox"})
    stamps = [stamp(tmp_path)]
    assert stamp(tmp_path) == stamps[0]
    for name, content in (("a.txt", "an owl in the snow"), ("b.txt", ""), ("deep/c.tar", "")):
        put(tmp_path, {name: content})
        stamps.append(stamp(tmp_path))
    assert len(set(stamps)) == 4 and stamp(tmp_path / "a.txt") != stamp(tmp_path / "b.txt")


@pytest.mark.parametrize("name", ["a.txt", "pictures.zip", "pictures.tar.gz"])
def test_a_file_that_is_no_archive_is_told(tmp_path, name):
    put(tmp_path, {name: "x"})
    with pytest.raises(DataError, match=r"is no folder: give one, or a \.arrow, \.parquet, \.tar file"):
        read_pictures(tmp_path / name)


# --- tables ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "x/a.png", "text": "a fox"}\n'),
        ("METADATA.jsonl", '{"image": "x/a.png", "caption": "a fox"}\n'),
        ("metadata.csv", "path,number,prompt\nx/a.png,1,a fox\n"),
        ("x/metadata.csv", "file_name,text\na.png,a fox\n"),
        ("x/metadata.csv", "File_Name;Text \na.png;a fox\n"),  # a spreadsheet's
        ("x/metadata.csv", "FILENAME\tCaption\na.png\ta fox\n"),
        ("x/metadata.jsonl", '{"File_Name": "a.png", "Caption": "a fox"}'),
        ("metadata.jsonl", '{"file_name": "./x/../x/a.png", "text": ["a fox", "not this"]}\n'),
    ],
)
def test_a_table_names_pictures_and_captions(tmp_path, name, content):
    found = read_pictures(put(tmp_path, {"x/a.png": encoded("blue"), name: content}))
    assert [each.text for each in found.pictures] == ["a fox"] and found.in_words() == ""
    assert load_picture(found.pictures[0], (4, 4))[2].min() == 1


def test_what_a_table_does_not_name_is_told(tmp_path):
    rows = [{"file_name": "a.png", "text": "a fox"}, {"file_name": "a.png", "text": "a red fox"}]
    put(tmp_path, {"metadata.jsonl": "\n".join(map(json.dumps, rows)), "metadata.csv": "", "b.png": encoded()})
    put(tmp_path, {"a.png": encoded(), "b.txt": "not this", "deep/metadata.csv": "", "readme.md": ""})
    assert texts(tmp_path) == ["a fox", "a red fox"]  # a picture may have more than one
    assert left(tmp_path) == {
        "pictures that no row of the table names": 1, "captions without a picture": 1, "other files": 1,
        "captions and tables that another one goes before": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"file_name": "a.png", "text": NaN}', "1 pictures have no caption, the first is .*a.png"),
        ('{"file_name": "a.png", "text": 5}', "row 2: every row must have file_name and text .5 is no text"),
        ('{"file_name": 5, "text": "a"}', "row 2: every row must have .*5 is no file's name"),
        ('{"file_name": "a.png", "text": {"a": 1}}', "row 2: every row must have .*is no text"),
        ('{"file_name": "a.png"}', "row 2: every row must have file_name and text .it has file_name"),
        ('{"file_name": "a.png", "text": "a', "row 2: every row must have"),
        ('["a.png", "a fox"]', "row 2: every row must have"),
        ("[" * 100_000, "row 2: every row must have"),
        ('{"file_name": "../a.png", "text": "a"}', "row 2 names '../a.png', which is not in its folder"),
        ('{"file_name": "/etc/passwd", "text": "a"}', "row 2 names '/etc/passwd', which is not in its folder"),
        ('{"file_name": "a\\u0000.png", "text": "a"}', "that a table names are not there"),
        ('{"file_name": "b.png", "text": "a"}', "1 pictures that a table names are not there, the first is b.png"),
        ('{"file_name": "https://x/a.png", "text": "a"}', "that a table names are not there"),
        ('{"file_name": ".", "text": "a"}', "row 2 names '.', which is not in its folder"),
    ],
)
def test_a_row_that_cannot_be_used_stops_or_is_left_out_as_set(tmp_path, row, told):
    put(tmp_path, {"a.png": encoded(), "metadata.jsonl": f'{{"file_name": "a.png", "text": "a fox"}}\n{row}\n'})
    with pytest.raises(DataError, match=told):
        read_pictures(tmp_path)
    assert texts(tmp_path, "skip") == ["a fox"] and sum(left(tmp_path).values()) == 1


def test_a_table_of_a_hundred_thousand_rows_is_read_in_seconds(tmp_path):
    put(tmp_path, {f"{k}.png": b"" for k in range(10)})
    rows = [f'{{"file_name": "{k % 10}.png", "text": "number {k}"}}' for k in range(100_000)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    began = time.process_time()
    read = read_pictures(tmp_path)
    assert len(read.pictures) == 100_000 and read.pictures[-1].text == "number 99999"
    assert time.process_time() - began < 20


def test_a_table_that_is_larger_than_any_is_refused(tmp_path, monkeypatch):
    put(tmp_path, {"a.png": encoded(), "metadata.jsonl": '{"file_name": "a.png", "text": "a fox"}\n'})
    monkeypatch.setattr(tables, "LARGEST", 20)
    with pytest.raises(DataError, match=r"metadata.jsonl has more than 0 MB: split it"):
        read_pictures(tmp_path)


# --- what is decoded ---


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "it is empty or no picture"),
        (encoded()[:60], ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is empty or no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is empty or no picture"),
    ],
    ids=["empty", "half", "a program", "drawing"],
)
def test_a_broken_picture_stops_or_is_left_out_as_set(kit, host, tmp_path, raw, told):
    put(tmp_path / "in", {f"{k}.png": encoded(("red", "blue")[k % 2]) for k in range(3)})
    put(tmp_path / "in", {f"{k}.txt": f"number {k}" for k in range(3)} | {"1.png": raw})
    settings = kit.config(positives="both")
    with pytest.raises(DataError, match=rf"picture .*1\.png cannot be read \(.*{told}"):
        kit.go(host, settings, tmp_path / "stop", images=tmp_path / "in")
    assert not (tmp_path / "stop" / "pairs").exists()  # told before the hours of pairs
    settings = settings.replace(broken_pictures="skip")
    for _ in range(2):  # the second time from what is encoded
        events = kit.go(host, settings, tmp_path / "skip", images=tmp_path / "in")
        (warned,) = [e.text for e in events if isinstance(e, Warned) and "left out" in e.text]
        assert warned.startswith("2 pictures of ") and "left out: 1 pictures that cannot be read (picture " in warned
        assert "1.png cannot be read" in warned and isinstance(events[-1], Finished)
        settings = settings.replace(updates=settings.updates + 1)
    assert images.load_images(tmp_path / "skip" / "images", 2).prompts == ["number 0", "number 2"]
    # What was left out stops where it now must not be.
    with pytest.raises(DataError, match=r"picture .*1\.png cannot be read"):
        kit.go(host, settings.replace(broken_pictures="stop"), tmp_path / "skip", images=tmp_path / "in")
    assert [e.done for e in events if isinstance(e, PairsMade) and e.what == "pictures"] == [3]


def test_where_every_picture_is_broken_that_is_told(kit, host, tmp_path):
    put(tmp_path / "in", {"a.png": b"", "a.txt": "a fox"})
    settings = kit.config(positives="both", broken_pictures="skip")
    with pytest.raises(DataError, match=r"none of the 1 pictures of .* can be read, the first: picture .*a\.png"):
        kit.go(host, settings, tmp_path / "out", images=tmp_path / "in")


def test_what_is_left_out_is_told_before_anything_is_made(kit, host, tmp_path):
    put(tmp_path / "in", {"a.png": encoded(), "a.txt": "a fox", "b.pdf": b""})
    events = kit.go(host, kit.config(positives="both"), tmp_path / "out", images=tmp_path / "in")
    assert isinstance(events[0], Warned) and events[0].text.endswith("left out: 1 other files (.pdf)")


def test_a_picture_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    (picture,) = read_pictures(put(tmp_path, {"a.png": encoded(size=(30, 40)), "a.txt": "a fox"})).pictures
    monkeypatch.setattr(images, "MOST_PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as hosts set it
    for read in (lambda: load_picture(picture, (4, 4)), lambda: check_pictures([picture])):
        with pytest.raises(DataError, match=r"a\.png cannot be read \(30 x 40 pixels, the most is 1,000\)"):
            read()


@pytest.mark.parametrize(
    ("kind", "suffix"), [("avif", ".avif"), ("jxl", ".jxl"), ("tiff", ".tif"), ("jpeg", ".jfif"), ("bmp", ".BMP")]
)
def test_other_kinds_of_pictures_are_read_where_pillow_reads_them(tmp_path, kind, suffix):
    images._formats()
    if suffix.lower() not in Image.registered_extensions():
        (picture,) = read_pictures(put(tmp_path, {f"a{suffix}": b"\xff\x0a.", "a.txt": "a fox"})).pictures
        with pytest.raises(DataError, match=rf"a\{suffix} cannot be read \(\{suffix} needs "):
            load_picture(picture, (4, 4))
        return
    (picture,) = read_pictures(put(tmp_path, {f"a{suffix}": encoded("blue", kind), "a.txt": "a fox"})).pictures
    assert load_picture(picture, (4, 4))[2].min() > 0.9


# --- anything at all ---


def test_odd_captions_end_in_words(fuzz, tmp_path):
    def caption(draws):
        suffix = draws.choice(captions.SUFFIXES)
        values = fuzz.values_of(draws, {"caption": "a fox", "text": ["a fox"], "more": {"a": 1}}, 0.5)
        (tmp_path / f"a{suffix}").write_bytes(fuzz.bytes_of(draws, json.dumps(values).encode()))
        (tmp_path / "a.png").write_bytes(encoded())
        assert all(texts(tmp_path, draws.choice(("stop", "skip"))))

    assert fuzz.endures(caption, fuzz.TRIES // 10, (DataError,), fresh=tmp_path)


# --- the page that says all this ---


def test_the_page_of_docs_names_all_that_is_read():
    page = (Path(turbodistill.__file__).parent / "docs" / "data.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([^`\s]+)`", page))
    read = walk.PICTURES | walk.ARCHIVES | {*captions.SUFFIXES, *tables.TABLES}
    assert read <= named and {name for name in named if name.startswith(".")} <= read
    assert {*captions.NAMES, *tables.FILES, *PICTURE_COLUMNS} <= named
    for number in (found.MOST_FILES, captions.LONGEST, images.MOST_PIXELS >> 20, found.LARGEST_FILE >> 20):
        assert f"{number:,}" in page
    assert pictures.read_pictures and tars.read_tar
