"""Frames between pictures and prompts: the ends are the given ones, and what is between belongs together."""

import math
import tracemalloc

import pytest
import torch
from turbodistill.core.interpolate import blended, mixed
from turbodistill.core.sampling import seeded_noise
from turbodistill.generate.frames import ASIDE, Motion, interpolate, morph, strength_at
from turbodistill.generate.stream import Shot


@pytest.fixture
def pictures(made):
    _, _, stream = made
    return list(torch.rand(3, 3, *stream.host.resolution[::-1], generator=torch.Generator().manual_seed(0)))


def test_given_pictures_come_out_to_the_pixel_and_in_order(made, pictures):
    _, _, stream = made
    frames = list(interpolate(stream, iter(pictures), 4))
    assert len(frames) == 2 * 5 + 1
    assert all(torch.equal(frames[5 * k], picture) for k, picture in enumerate(pictures))
    assert len({f.numpy().tobytes() for f in frames}) == len(frames)


def test_a_frame_is_the_student_s_of_the_way_between(made, pictures):
    host, _, stream = made
    motion = Motion(strength=0.5, turn=0.3, seed=4)
    frames = list(interpolate(stream, pictures[:2], 3, ("fox", "owl"), motion))
    ends = [host.encode_images(p[None])[0] for p in pictures[:2]]
    shot = Shot(
        "fox", 4 + ASIDE, 1, strength_at(motion, 0.25), None, "owl", 0.25, 0.3 * 0.25, latents=blended(*ends, 0.25)
    )
    assert torch.allclose(frames[1], stream.make([shot]).pictures[0], atol=1e-6)


def test_strength_is_least_at_the_ends_and_flat_in_the_middle():
    motion = Motion(strength=0.6)
    found = [strength_at(motion, share / 100) for share in range(1, 100)]
    assert max(found) == pytest.approx(0.6) and found == pytest.approx(found[::-1])
    assert found[0] < 0.3 and found[:50] == sorted(found[:50]) and found[30] > 0.5


def test_neighbours_are_nearer_than_frames_of_noise_of_their_own(made, pictures):
    _, _, stream = made
    shared = torch.stack(list(interpolate(stream, pictures[:2], 8, ("fox",), Motion(0.6, 0.1))))
    ends = [stream.encode(p) for p in pictures[:2]]
    apart = torch.stack(
        [
            stream.make(
                [Shot("fox", 10 * i, 1, strength_at(Motion(0.6), i / 9), latents=blended(*ends, i / 9))]
            ).pictures[0]
            for i in range(1, 9)
        ]
    )

    def flicker(x):
        return float((x[2:] - 2 * x[1:-1] + x[:-2]).abs().mean())

    assert flicker(shared[1:-1]) < 0.5 * flicker(apart)


def test_prompts_are_morphed_from_the_same_noise(made):
    host, student, stream = made
    frames = list(morph(stream, ["fox", "owl", "cat"], 3, Motion(turn=0.0, seed=2)))
    noise = seeded_noise([2], host.latent_shape)
    fox, owl, cat = (host.encode_text([text]) for text in ("fox", "owl", "cat"))
    assert len(frames) == 9
    for k, cond in {0: fox, 2: mixed(fox, owl, 0.5), 4: owl, 7: mixed(owl, cat, 0.75), 8: cat}.items():
        assert torch.allclose(frames[k], host.decode(student.generate(noise, cond, 1))[0], atol=1e-5)


def test_blended_latents_keep_their_spread_and_the_line_does_not():
    a, b = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    a, b = 2 * a + 1, b - 1
    middle = blended(a, b, 0.5)
    assert middle.std((-2, -1)).mean() == pytest.approx(1.5, abs=0.05)
    assert (a / 2 + b / 2).std((-2, -1)).mean() < 1.2
    assert torch.allclose(blended(a, b, 0.0), a, atol=1e-5) and torch.allclose(blended(a, b, 1.0), b, atol=1e-5)


def test_a_long_film_takes_the_memory_of_a_short_one(made):
    _, _, stream = made
    shape = 3, *stream.host.resolution[::-1]

    def peak(count):
        given = (torch.full(shape, (k % 7) / 7) for k in range(count))
        tracemalloc.start()
        frames = sum(1 for _ in interpolate(stream, given, 2))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return frames, most

    (few, small), (many, large) = peak(6), peak(60)
    assert (few, many) == (16, 178) and large < small + 2e5


@pytest.mark.parametrize(
    ("between", "motion", "words"),
    [
        (0, Motion(), "between is 0: give 1 to 1000"),
        (1001, Motion(), "between is 1001"),
        (1, Motion(strength=0.0), "strength is 0: give 0.01 to 1"),
        (1, Motion(strength=math.nan), "strength is nan"),
        (1, Motion(turn=4.0), "turn is 4: give 0 to 3.14"),
    ],
)
def test_numbers_out_of_bounds_are_told_before_anything_is_made(made, pictures, between, motion, words):
    _, _, stream = made
    with pytest.raises(ValueError, match=words):
        next(interpolate(stream, pictures, between, motion=motion))
    with pytest.raises(ValueError, match=words):
        next(morph(stream, ["a", "b"], between, motion))


def test_too_few_pictures_and_other_sizes_are_told(made, pictures):
    _, _, stream = made
    for few in ([], pictures[:1]):
        with pytest.raises(ValueError, match="fewer than two pictures"):
            list(interpolate(stream, few, 1))
    with pytest.raises(ValueError, match="picture 2 is 5 x 7 pixels: give"):
        list(interpolate(stream, [pictures[0], torch.zeros(3, 7, 5)], 1))
    with pytest.raises(ValueError, match="there are 1 prompts"):
        list(morph(stream, ["a"], 1))
