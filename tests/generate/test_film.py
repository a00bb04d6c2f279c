"""Moving pictures as files."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from turbodistill.generate.film import FORMATS, FilmError, write_film


def frames(count, width=32, height=24, seconds=0.05):
    """A square that moves to the right."""
    for k in range(count):
        pixels = np.full((height, width, 3), 230, np.uint8)
        pixels[8:16, k % (width - 8) : k % (width - 8) + 8] = (200, 30, 30)
        yield pixels, seconds


def read(kind, file):
    """All frames of a film, (height, width, 3), and the seconds of all together."""
    if kind == "mp4":
        av = pytest.importorskip("av", reason="needs av: pip install 'turbodistill[video]'")
        with av.open(file) as film:
            found = [(f.to_ndarray(format="rgb24"), float(f.time)) for f in film.decode(video=0)]
        return [f for f, _ in found], found[-1][1] * len(found) / (len(found) - 1)
    image, found, total = Image.open(file), [], 0.0
    for k in range(image.n_frames):
        image.seek(k)
        found.append(np.array(image.convert("RGB")))
        total += image.info["duration"] / 1000
    return found, total


@pytest.mark.parametrize("kind", FORMATS)
def test_every_frame_is_in_it_for_its_time(kind):
    if kind == "mp4":
        pytest.importorskip("av", reason="needs av: pip install 'turbodistill[video]'")
    file = io.BytesIO()
    assert write_film(file, kind, frames(12)) == 12
    file.seek(0)
    found, seconds = read(kind, file)
    assert len(found) == 12 and seconds == pytest.approx(0.6, rel=0.1)
    for made, (wanted, _) in zip(found, frames(12), strict=True):
        assert np.abs(made.astype(int) - wanted).mean() < 6


def test_odd_sides_of_an_mp4_are_filled_up():
    pytest.importorskip("av", reason="needs av: pip install 'turbodistill[video]'")
    file = io.BytesIO()
    write_film(file, "mp4", frames(3, 33, 25))
    file.seek(0)
    assert read("mp4", file)[0][0].shape == (26, 34, 3)


def test_an_mp4_takes_the_memory_of_a_frame():
    pytest.importorskip("av", reason="needs av: pip install 'turbodistill[video]'")
    tracemalloc.start()
    write_film(io.BytesIO(), "mp4", frames(100, 256, 256))
    _, few = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    write_film(io.BytesIO(), "mp4", frames(800, 256, 256))
    _, many = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert many < few + 5e6  # one frame has .2 MB


@pytest.mark.parametrize("kind", FORMATS)
def test_no_frames_and_frames_of_two_sizes_are_told(kind):
    if kind == "mp4":
        pytest.importorskip("av", reason="needs av: pip install 'turbodistill[video]'")
    with pytest.raises(FilmError, match="there are no frames"):
        write_film(io.BytesIO(), kind, [])
    with pytest.raises(FilmError, match="a frame is 16 x 24 pixels and the first 32 x 24"):
        write_film(io.BytesIO(), kind, [*frames(2), *frames(1, 16, 24)])


def test_what_is_no_format_is_told():
    with pytest.raises(FilmError, match="format is 'avi': give one of gif, webp, mp4"):
        write_film(io.BytesIO(), "avi", frames(2))


def test_mp4_without_its_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(FilmError, match=r"pip install 'turbodistill\[video\]'"):
        write_film(io.BytesIO(), "mp4", frames(2))
