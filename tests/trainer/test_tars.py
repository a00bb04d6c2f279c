"""Pictures in WebDataset's archives: read where they lie, whatever the archive says of itself."""

import io
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from turbodistill.trainer.data import captions, found
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.images import check_pictures, load_picture
from turbodistill.trainer.data.pictures import read_pictures


def encoded(colour="red", kind="png", size=(40, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def tar(path, files, **changes):
    """A tar file of (name, content) pairs; `changes` are attributes of every member."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as made:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for attribute, value in changes.items():
                setattr(member, attribute, value)
            made.addfile(member, io.BytesIO(content))
    return path


def texts(place, broken="stop"):
    return [each.text for each in read_pictures(place, broken).pictures]


def left(place, broken="skip"):
    """How many are left out for each reason."""
    return {reason.what: left.count for reason, left in read_pictures(place, broken).left.items()}


FOX = [("0/fox.jpg", encoded("blue", "jpeg")), ("0/fox.txt", b"a fox"), ("0/fox.json", b'{"caption": "not this"}')]
OWL = [("0/owl.png", encoded()), ("0/owl.json", b'{"caption": "an owl"}'), ("0/owl.cls", b"7")]


@pytest.fixture
def unwritten(tmp_path):
    """The folder `pictures`, in which no file is made, changed or opened for writing."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    yield folder
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".tar"}


def test_an_archive_s_pictures_are_read_where_they_lie(unwritten):
    tar(unwritten / "train-0.tar", [*FOX, *OWL])
    for place in (unwritten, unwritten / "train-0.tar"):
        read = read_pictures(place)
        assert [each.text for each in read.pictures] == ["a fox", "an owl"]
        assert read.pictures[0].name.endswith("train-0.tar: 0/fox.jpg")
        assert check_pictures(read.pictures) is None and load_picture(read.pictures[0], (4, 4))[2].min() > 0.9
    assert left(unwritten) == {"captions and tables that another one goes before": 1, "other files": 1}


def test_archives_of_another_split_are_left_out(unwritten):
    for name in ("train-0.tar", "train-1.tar", "test-0.tar", "val/0.tar", "more.tar"):
        tar(unwritten / name, FOX[:2])
    assert len(texts(unwritten)) == 3 and left(unwritten) == {"files of other splits than the training one": 2}
    for path in unwritten.glob("train*"):
        path.unlink()
    assert len(texts(unwritten)) == 3  # where there is no training split, all count


def test_samples_need_not_lie_together_and_have_masks_beside_them(unwritten):
    files = [("b.txt", b"an owl"), *FOX[:2], ("0/fox.mask.png", encoded()), ("b.png", encoded())]
    tar(unwritten / "a.tar", [*files, ("my.photo.png", encoded()), ("my.photo.txt", b"a house")])
    assert sorted(texts(unwritten)) == ["a fox", "a house", "an owl"]
    assert left(unwritten) == {"further pictures of a sample": 1}


def test_names_in_an_archive_name_no_file(unwritten, tmp_path):
    """Whatever they are, members are read at their places and nothing is written."""
    names = ["../../evil", str(tmp_path / "evil"), "a/../../../evil2", "C:\\evil", "\udcff\n\x1b[31m", "x" * 5000]
    tar(
        unwritten / "a.tar",
        [(f"{name}{end}", raw) for name in names for end, raw in ((".png", encoded()), (".txt", b"a fox"))],
    )
    before = {path for path in tmp_path.rglob("*")}
    read = read_pictures(unwritten)
    assert [each.text for each in read.pictures] == ["a fox"] * len(names)
    assert check_pictures(read.pictures) is None
    assert {path for path in tmp_path.rglob("*")} == before


def test_links_in_an_archive_lead_nowhere(unwritten):
    path = tar(unwritten / "a.tar", FOX[:2])
    with tarfile.open(path, "a") as made:
        for name, kind in (("b.png", tarfile.SYMTYPE), ("c.png", tarfile.LNKTYPE), ("d.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            made.addfile(member)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        made.addfile(folder)
    assert texts(unwritten) == ["a fox"] and left(unwritten) == {"links and special files": 3}


def test_what_an_archive_has_twice_counts_once(unwritten):
    tar(unwritten / "a.tar", [*FOX[:2], FOX[0], ("0/fox.txt", b"another"), ("._fox.png", b""), ("alone.txt", b"x")])
    assert texts(unwritten) == ["a fox"]
    assert left(unwritten) == {
        "files of a name that comes twice in an archive": 2, "hidden files and folders": 1,
        "captions without a picture": 1,
    }  # fmt: skip


def half(raw):
    return raw[: len(raw) // 2]


def without_end(raw):
    return raw[: 512 * 3 + 100]


def other_header(raw):
    """The second member's, of a picture of less than 512 bytes and its caption."""
    return raw[: 512 * 2] + b"x" * 512 + raw[512 * 3 :]


@pytest.mark.parametrize(
    ("harm", "usable"),
    [
        (lambda raw: b"", 0),
        (lambda raw: b"no archive" * 200, 0),
        (lambda raw: b"\x1f\x8b" + raw, 0),
        (lambda raw: raw[:300], 0),
        (without_end, 0),
        (other_header, 0),
    ],
    ids=["empty", "text", "packed", "half a header", "half a member", "no header"],
)
def test_an_archive_that_is_broken_stops_or_is_left_out_as_set(unwritten, harm, usable):
    path = tar(unwritten / "b.tar", [("fox.png", encoded()), ("fox.txt", b"a fox" * 100)])
    path.write_bytes(harm(path.read_bytes()))
    tar(unwritten / "a.tar", FOX[:2])
    told = r"archive .*b\.tar cannot be read to its end \(.+\): get it again"
    with pytest.raises(DataError, match=told):
        read_pictures(unwritten)
    read = read_pictures(unwritten, "skip")
    assert [each.text for each in read.pictures] == ["a fox"] and re.search(told, read.in_words())
    assert check_pictures(read.pictures) is None


def test_of_an_archive_that_ends_early_the_beginning_is_used_where_that_is_wanted(unwritten):
    path = tar(unwritten / "a.tar", [*FOX[:2], ("owl.txt", b"an owl"), ("owl.png", encoded())])
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.index(encoded()) + 20])
    assert texts(unwritten, "skip") == ["a fox"]
    assert left(unwritten) == {"archives that cannot be read to their end": 1, "captions without a picture": 1}


@pytest.mark.parametrize("files", [[], [("a.txt", b"a fox"), ("b.pdf", b"")]], ids=["empty", "no picture"])
def test_an_archive_without_pictures_is_told(unwritten, files):
    tar(unwritten / "a.tar", files)
    with pytest.raises(DataError, match=r"image folder .* holds no picture that can be used"):
        read_pictures(unwritten)


def test_what_is_said_of_a_name_can_be_printed_anywhere(unwritten):
    name = "a\x1b[31m\n\udcff.txt"
    tar(unwritten / "a.tar", [(name.replace("txt", "png"), encoded()), (name, b"caf\xe9"), *FOX[:2]])
    with pytest.raises(DataError, match=r"a\?\[31m\?\?\.txt is no UTF-8 text") as told:
        read_pictures(unwritten)
    assert str(told.value).isprintable() and read_pictures(unwritten, "skip").in_words().isprintable()


def test_an_archive_that_may_not_be_read_is_told(unwritten, monkeypatch):
    tar(unwritten / "a.tar", FOX)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match=r"archive .*a\.tar cannot be read to its end .*Permission denied"):
        read_pictures(unwritten)


def test_sizes_in_an_archive_are_bounded(unwritten, monkeypatch):
    tar(unwritten / "a.tar", [*FOX[:2], ("b.png", encoded()), ("b.txt", b"x" * 2000)])
    monkeypatch.setattr(captions, "LARGEST", 1000)
    with pytest.raises(DataError, match=r"b\.txt has 2,000 bytes: no caption has more than 1,000"):
        read_pictures(unwritten)
    (picture,) = read_pictures(unwritten, "skip").pictures
    monkeypatch.setattr(found, "LARGEST_FILE", 100)
    with pytest.raises(DataError, match=r"fox\.jpg cannot be read \(it has \d+ bytes, the most is 100\)"):
        load_picture(picture, (4, 4))
    monkeypatch.setattr(found, "MOST_FILES", 3)
    with pytest.raises(DataError, match="holds more than 3 files or rows"):
        read_pictures(unwritten)


def test_an_archive_whose_headers_lead_backwards_ends(unwritten):
    """As one of a negative size does in a tarfile that does not look: CVE-2025-8194."""
    path = tar(unwritten / "a.tar", FOX)
    header = bytearray(path.read_bytes()[:512])
    header[124:136] = tarfile.itn(-1024, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    members = path.read_bytes().rstrip(b"\0")
    path.write_bytes(members + bytes(-len(members) % 512) + bytes(header) + bytes(1024))
    with pytest.raises(DataError, match=r"to its end .(its headers lead backwards|a header is no header)"):
        read_pictures(path)


def test_a_sparse_member_takes_no_room(unwritten):
    """Eight gigabytes of nothing, in a kilobyte."""
    member = tarfile.TarInfo("bomb.png")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(8 << 30)}
    body = b"0\n".ljust(512, b"\0")
    member.size = len(body)
    with tarfile.open(unwritten / "a.tar", "w", format=tarfile.PAX_FORMAT) as made:
        made.addfile(member, io.BytesIO(body))
    with pytest.raises(DataError, match=r"holds no picture .*left out: 1 links and special files"):
        read_pictures(unwritten)


def test_odd_archives_end_in_words(fuzz, tmp_path):
    sample = tar(tmp_path / "sample.tar", [*FOX, *OWL, ("x" * 200 + ".png", encoded())], mtime=1.5).read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()

    def archive(draws):
        raw = fuzz.bytes_of(draws, sample)
        header = draws.randrange(0, len(sample), 512)  # of which the checksum is right again
        raw = bytearray(raw.ljust(header + 512, b"\0"))
        raw[header + 148 : header + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(raw[header : header + 512]))[0]
        (folder / "a.tar").write_bytes(raw)
        for picture in read_pictures(folder, draws.choice(("stop", "skip"))).pictures:
            assert load_picture(picture, (8, 8)).shape == (3, 8, 8)

    assert fuzz.endures(archive, fuzz.TRIES // 10, (DataError,), fresh=folder)
