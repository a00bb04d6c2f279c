"""The node Image Folder: captioned pictures of one's own."""

import pytest
from PIL import Image
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.data.files import DataError


@pytest.fixture
def pictures(places):
    """A folder of captioned pictures in the input folder."""
    folder = places.input / "pets"
    folder.mkdir()
    for k, text in enumerate(("a fox", "an owl", "a fox", "an owl")):
        Image.new("RGB", (40, 20 + k), (80 * k, 0, 0)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(text)
    return folder


def test_a_folder_of_pictures_with_their_captions(nodes, pictures):
    node = nodes.data.ImageFolder
    for name in ("pets", " pets ", str(pictures)):
        made = node.run(folder=name, broken_pictures="stop")
        assert made[0] == nodes.data.Images(pictures, "stop") and made[2] == "4 pictures"
        assert made[1] == ["a fox", "an owl"]  # as prompts, each once
        assert made.ui.image.shape == (4, 256, 256, 3) and 0 <= made.ui.image.min() <= made.ui.image.max() <= 1


def test_of_many_pictures_some_are_shown(nodes, pictures):
    for k in range(4, 20):
        Image.new("RGB", (8, 8)).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text(f"number {k}")
    made = nodes.data.ImageFolder.run(folder="pets", broken_pictures="stop")
    assert len(made.ui.image) == 16 and len(made[1]) == 18


def broken(folder):
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])


def without_caption(folder):
    (folder / "2.txt").unlink()


def emptied(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (broken, r"picture .*2\.png cannot be read .*: replace or remove it"),
        (without_caption, r"1 pictures have no caption, the first is .*2\.png"),
        (emptied, "holds no picture"),
    ],
)
def test_pictures_that_cannot_be_used_are_told(nodes, pictures, harm, told):
    harm(pictures)
    with pytest.raises(DataError, match=told):
        nodes.data.ImageFolder.run(folder="pets", broken_pictures="stop")


def test_a_broken_picture_is_found_among_those_that_are_not_shown(nodes, pictures):
    for k in range(4, 20):
        Image.new("RGB", (8, 8)).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text("a dot")
    (pictures / "9.png").write_bytes(b"no picture")  # the last by name
    with pytest.raises(DataError, match=r"9\.png cannot be read"):
        nodes.data.ImageFolder.run(folder="pets", broken_pictures="stop")


@pytest.mark.parametrize(("name", "told"), [("  ", "folder is empty: give the name"), ("nowhere", "does not exist")])
def test_a_folder_that_is_none_is_told(nodes, pictures, name, told):
    with pytest.raises(DataError, match=told):
        nodes.data.ImageFolder.run(folder=name, broken_pictures="stop")


def test_a_changed_folder_is_looked_at_again(nodes, pictures):
    stamp = nodes.data.ImageFolder.fingerprint_inputs
    before = stamp("pets")
    assert stamp("pets") == before
    (pictures / "0.txt").write_text("another")
    assert stamp("pets") != before
    before = stamp("pets")
    emptied(pictures)
    assert stamp("pets") != before  # that nothing is left is told when it is run, not when it is asked whether to run


def test_pictures_that_cannot_be_used_are_left_out_where_that_is_wanted(nodes, pictures):
    for harm in (broken, lambda folder: (folder / "3.txt").unlink()):
        harm(pictures)
    made = nodes.data.ImageFolder.run(folder="pets", broken_pictures="skip")
    assert made[0].broken_pictures == "skip" and len(made.ui.image) == 2
    assert "left out: 1 pictures without a caption" in made[2]  # the broken one is found when it is encoded
    with pytest.raises(ConfigError, match="broken_pictures is 'no': use one of stop, skip"):
        nodes.data.ImageFolder.run(folder="pets", broken_pictures="no")
