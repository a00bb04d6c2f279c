"""`turbodistill frames`: films of pictures, videos and prompts, and mistakes in one line."""

import numpy as np
import pytest
from PIL import Image
from turbodistill.app import cli
from turbodistill.generate.film import write_film

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'turbodistill[demo]'")


def run(*arguments, code=0):
    assert cli.main(["frames", *map(str, arguments)]) == code


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("red", "blue", "green")]
    for path in paths:
        Image.new("RGB", (80, 60), path.stem).save(path)
    return paths


def test_pictures_become_a_film_whose_ends_are_theirs(pictures, tmp_path, capsys):
    run(*pictures[:2], "--between", 3, "--out", tmp_path / "film.webp", "--prompt", "owl", "--fps", 10)
    assert "film.webp: 5 frames" in capsys.readouterr().out
    film = Image.open(tmp_path / "film.webp")
    assert film.n_frames == 5 and film.size == (64, 64)
    run(*pictures, "--between", 2, "--out", tmp_path / "folder")
    files = sorted((tmp_path / "folder").iterdir())
    assert [f.name for f in files] == [f"{k:06d}.png" for k in range(1, 8)]
    for number, colour in ((0, (255, 0, 0)), (3, (0, 0, 255)), (6, (0, 128, 0))):
        assert (np.array(Image.open(files[number])) == colour).all()


def test_prompts_become_a_film(tmp_path, capsys):
    run("--prompt", "owl", "--prompt", "fox face", "--between", 2, "--out", tmp_path / "morph.gif", "--seed", 3)
    assert "4 frames" in capsys.readouterr().out and Image.open(tmp_path / "morph.gif").n_frames == 4


def test_a_video_has_so_many_times_its_frames(tmp_path, capsys):
    av = pytest.importorskip("av", reason="needs av: pip install 'turbodistill[video]'")
    frames = [(np.full((48, 64, 3), 40 * k, np.uint8), 0.1) for k in range(4)]
    with (tmp_path / "in.mp4").open("wb") as file:
        write_film(file, "mp4", frames)
    run("--video", tmp_path / "in.mp4", "--times", 3, "--out", tmp_path / "out.mp4")
    assert "10 frames" in capsys.readouterr().out
    with av.open(str(tmp_path / "out.mp4")) as film:
        assert len(list(film.decode(video=0))) == 10
        assert float(film.streams.video[0].average_rate) == pytest.approx(30, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is nothing to make frames between"),
        (["red.png"], "red.png is one picture"),
        (["red.png", "none.png"], "none.png"),
        (["red.png", "broken.png"], "broken.png"),
        (["red.png", "blue.png", "--video", "red.png"], "--video and pictures are given"),
        (["red.png", "blue.png", "--times", "2"], "--times is of a video"),
        (["--video", "broken.mp4", "--between", "2"], "a video takes --times"),
        (["--video", "broken.mp4"], "broken.mp4 cannot be read as a video"),
        (["red.png", "blue.png", "--prompt", "a", "--prompt", "b", "--prompt", "c"], "3 prompts and 2 pictures"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(pictures, tmp_path, monkeypatch, capsys, arguments, words):
    if "broken.mp4 cannot" in words:
        pytest.importorskip("av", reason="needs av: pip install 'turbodistill[video]'")
    monkeypatch.chdir(tmp_path)
    for name in ("broken.png", "broken.mp4"):
        (tmp_path / name).write_bytes(b"nothing")
    run(*arguments, "--out", "film.webp", code=1)
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1] and "Traceback" not in " ".join(said)
    assert not list(tmp_path.glob("film*"))


def test_other_endings_are_told(pictures, tmp_path, capsys):
    run(*pictures, "--out", tmp_path / "film.avi", code=1)
    assert "give a name that ends with .mp4, .webp or .gif" in capsys.readouterr().err
