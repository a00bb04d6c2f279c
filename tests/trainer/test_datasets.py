"""Pictures in parquet and arrow files, as Hugging Face's datasets are stored, and captions in a parquet table."""

import io
import json
import math

import pytest
from PIL import Image
from turbodistill.trainer.data import columns, found
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.images import check_pictures, load_picture
from turbodistill.trainer.data.pictures import read_pictures

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'turbodistill[data]'")
pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'turbodistill[data]'")

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(shade):
    file = io.BytesIO()
    Image.new("RGB", (40, 20), (shade, 0, 0)).save(file, "png")
    return file.getvalue()


def structs(count, path="x.png"):
    return pa.array([{"bytes": encoded(20 * k), "path": path} for k in range(count)], STRUCT)


def table(count=5, image="image", text="text", **more):
    shown = {"label": list(range(count)), image: structs(count), text: [f"number {k}" for k in range(count)]}
    return pa.table(shown | more)


def write(path, made, **options):
    """As its ending says: parquet, or arrow's stream, as `datasets` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(made, path, **options)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
            writer.write_table(made, 2)
    return path


def texts(place, broken="stop"):
    return [each.text for each in read_pictures(place, broken).pictures]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_dataset_s_pictures_and_captions(tmp_path, suffix):
    options = {"row_group_size": 2} if suffix == ".parquet" else {}
    path = write(tmp_path / f"train-00000-of-00001{suffix}", table(), **options)
    for place in (tmp_path, path):
        read = read_pictures(place)
        assert [each.text for each in read.pictures] == [f"number {k}" for k in range(5)]
        assert read.pictures[3].name.endswith(f"{path.name}, row 4")
        assert "pictures of column 'image' and captions of column 'text'" in read.in_words()
        for k in (*range(5), 0, 4, 2):  # in any order
            assert load_picture(read.pictures[k], (4, 4))[0].min() * 255 == pytest.approx(20 * k, abs=0.01)
        assert check_pictures(read.pictures) is None


def test_a_folder_that_datasets_saved(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split / "data-00000-of-00001.arrow", table())
        (tmp_path / split / "state.json").write_text("{}")
    write(tmp_path / "train" / "cache-0123456789.arrow", table())
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    read = read_pictures(tmp_path)
    assert len(read.pictures) == 5
    told = {reason.what: left.count for reason, left in read.left.items()}
    assert told == {"other files": 3, "caches": 1, "files of other splits than the training one": 1}


def test_an_arrow_file_that_can_be_read_at_random_too(tmp_path):
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table().schema) as writer:
        writer.write_table(table())
    assert len(texts(tmp_path)) == 5


@pytest.mark.parametrize(
    ("image", "text"),
    [("img", "caption"), ("jpg", "prompt"), ("scan", "blip_caption"), ("IMAGE", "Text"), ("png", "captions")],
)
def test_columns_are_chosen_and_told(tmp_path, image, text):
    made = table(2, image, text, other=["no"] * 2, url=["no"] * 2)
    read = read_pictures(write(tmp_path / "a.parquet", made))
    assert [each.text for each in read.pictures] == ["number 0", "number 1"]
    assert f"pictures of column {image!r} and captions of column {text!r}" in read.in_words()


def test_a_column_may_hold_bytes_alone_and_several_captions(tmp_path):
    made = pa.table(
        {
            "embedding": [b"no picture"] * 2, "jpg": [encoded(0), encoded(20)],
            "caption": [["", "a fox", "not this"], ["an owl"]], "text": [1, 2],
        }
    )  # fmt: skip
    read = read_pictures(write(tmp_path / "a.parquet", made))
    assert [each.text for each in read.pictures] == ["a fox", "an owl"] and check_pictures(read.pictures) is None


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_captions_may_be_stored_in_other_ways(tmp_path, kind):
    made = table(2).drop_columns("text").append_column("text", pa.array(["a fox", "an owl"]).cast(kind))
    for suffix in (".parquet", ".arrow"):
        assert texts(write(tmp_path / f"a{suffix}", made)) == ["a fox", "an owl"]


def test_what_lies_beside_an_archive_is_no_error(tmp_path):
    """As img2dataset leaves a table of addresses beside each of its archives."""
    write(tmp_path / "00000.parquet", pa.table({"url": ["x"], "caption": ["a fox"]}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a fox")
    assert "left out: 1 tables without a column of pictures" in read_pictures(tmp_path).in_words()


def test_a_dataset_without_captions_is_told(tmp_path):
    path = write(tmp_path / "a.parquet", table(2).drop_columns("text"))
    with pytest.raises(DataError, match=r"a\.parquet has no column of captions \(label, image\): name it text"):
        read_pictures(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_rows_that_cannot_be_used_stop_or_are_left_out_as_set(tmp_path, suffix):
    made = pa.table({"image": structs(4), "text": ["a fox", None, " ", "x" * 70_000]})
    path = write(tmp_path / f"a{suffix}", made)
    with pytest.raises(DataError, match=r"1 pictures have no caption, the first is .*row 2"):
        read_pictures(path)
    read = read_pictures(path, "skip")
    assert [each.text for each in read.pictures] == ["a fox"]
    assert sorted(left.count for left in read.left.values()) == [1, 1, 1]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "there is no picture in its row"),
        ({"bytes": None, "path": None}, "there is no picture in its row"),
        ({"bytes": None, "path": "/etc/passwd"}, "its row names /etc/passwd, which is not in its folder: store"),
        ({"bytes": None, "path": "../x.png"}, "its row names ../x.png, which is not in its folder"),
        ({"bytes": None, "path": "gone.png"}, "No such file"),
        ({"bytes": b"", "path": None}, "it is empty or no picture"),
        ({"bytes": b"x" * 99, "path": None}, "it is empty or no picture"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_row_without_a_picture_is_named(tmp_path, value, told, suffix):
    path = write(tmp_path / f"a{suffix}", pa.table({"image": pa.array([value], STRUCT), "text": ["a fox"]}))
    with pytest.raises(DataError, match=rf"picture .*a\{suffix}, row 1 cannot be read \(.*{told}"):
        check_pictures(read_pictures(path).pictures)


def test_a_picture_that_a_row_names_by_its_path_is_read_from_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(encoded(200))
    made = pa.table({"image": pa.array([{"bytes": None, "path": "in/x.png"}], STRUCT), "text": ["a fox"]})
    (picture,) = read_pictures(write(tmp_path / "a.parquet", made)).pictures
    assert load_picture(picture, (4, 4))[0].min() * 255 == pytest.approx(200)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kept", [0, 3, 0.5, 0.9])
def test_half_a_file_is_told(tmp_path, suffix, kept):
    path = write(tmp_path / f"b{suffix}", table(40))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(kept * len(raw)) if isinstance(kept, float) else kept])
    write(tmp_path / "a.parquet", table(2))
    with pytest.raises(DataError, match=rf"b\{suffix} cannot be read \(.+\): get it again"):
        check_pictures(read_pictures(tmp_path).pictures)
    read = read_pictures(tmp_path, "skip")
    assert [each.text for each in read.pictures][:2] == ["number 0", "number 1"] and "archives" in read.in_words()


def test_rows_and_sizes_are_bounded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", table(30))
    (first, *_) = read_pictures(path).pictures
    monkeypatch.setattr(found, "LARGEST_FILE", 50)
    with pytest.raises(DataError, match=r"row 1 cannot be read \(it has \d+ bytes, the most is 50\)"):
        load_picture(first, (4, 4))
    monkeypatch.setattr(found, "MOST_FILES", 20)
    with pytest.raises(DataError, match="holds more than 20 files or rows"):
        read_pictures(path)


def test_of_many_pictures_few_are_in_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", table(200))
    read = read_pictures(path).pictures
    held = []
    inner = columns.Reader.open

    def opened(self, *given):
        file = inner(self, *given)
        held.append(len(self._batch))
        return file

    monkeypatch.setattr(columns.Reader, "open", opened)
    again = read_pictures(path).pictures
    assert len(again) == len(read) == 200 and held == []  # captions alone were read
    check_pictures(again)
    assert len(held) == 200 and max(held) <= columns.ROWS


def test_a_table_in_parquet(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(encoded(0))
    rows = {"file_name": ["a.png", "b.png", "a.png"], "text": ["a fox", "an owl", None], "score": [0.5, math.nan, 1.0]}
    write(tmp_path / "metadata.parquet", pa.table(rows))
    with pytest.raises(DataError, match=r"1 pictures have no caption, the first is .*a\.png"):
        read_pictures(tmp_path)
    assert texts(tmp_path, "skip") == ["a fox", "an owl"]


@pytest.mark.parametrize(
    "rows",
    [{"text": [math.nan, math.nan]}, {"text": [1, 2]}, {}, {"caption": [{"a": 1}] * 2}],
    ids=["NaN", "numbers", "none", "structs"],
)
def test_a_table_in_parquet_with_other_captions_is_told(tmp_path, rows):
    (tmp_path / "a.png").write_bytes(encoded(0))
    write(tmp_path / "metadata.parquet", pa.table({"file_name": ["a.png"] * 2} | rows))
    with pytest.raises(DataError, match=r"2 pictures have no caption|row 1: every row must have file_name and text"):
        read_pictures(tmp_path)


def test_without_pyarrow_words_say_what_is_missing(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", table(2))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setattr("turbodistill.trainer.data.pictures.has_pyarrow", lambda: False)
    told = r"left out: 1 parquet and arrow files, for which pyarrow is missing \(pip install pyarrow\)"
    with pytest.raises(DataError, match=told):
        read_pictures(tmp_path)
    (tmp_path / "a.parquet").rename(tmp_path / "metadata.parquet")
    with pytest.raises(DataError, match=r"reading .*metadata\.parquet needs pyarrow: pip install pyarrow"):
        read_pictures(tmp_path)


def test_odd_files_end_in_words(fuzz, tmp_path):
    samples = {suffix: write(tmp_path / f"sample{suffix}", table(6)).read_bytes() for suffix in (".parquet", ".arrow")}
    folder = tmp_path / "in"
    folder.mkdir()

    def dataset(draws):
        suffix = draws.choice(list(samples))
        (folder / f"a{suffix}").write_bytes(fuzz.bytes_of(draws, samples[suffix]))
        for picture in read_pictures(folder, draws.choice(("stop", "skip"))).pictures:
            assert load_picture(picture, (8, 8)).shape == (3, 8, 8)

    assert fuzz.endures(dataset, fuzz.TRIES // 15, (DataError,), fresh=folder)
