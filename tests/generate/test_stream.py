"""Frames of the newest input: the student's own pictures, and nothing computed twice."""

import math
from dataclasses import replace

import pytest
import torch
from turbodistill.core.interpolate import mixed, turned
from turbodistill.core.sampling import seeded_noise
from turbodistill.generate.stream import Changes, Kept, Shot, check_shot, still
from turbodistill.trainer.checkpoint.errors import ModelError


class Counted:
    """A host's method that counts its calls."""

    def __init__(self, monkeypatch, host, name):
        self.calls, inner = 0, getattr(host, name)

        def counts(*given):
            self.calls += 1
            return inner(*given)

        monkeypatch.setattr(host, name, counts)


def test_a_frame_is_the_student_s_picture(made):
    host, student, stream = made
    for steps in (1, 2):
        frames = stream.make([Shot("fox", seed=3, steps=steps)])
        latents = student.generate(seeded_noise([3], host.latent_shape), host.encode_text(["fox"]), steps)
        assert torch.allclose(frames.pictures, host.decode(latents), atol=1e-6)
    assert frames.seconds == pytest.approx(sum(frames.stages.values())) and frames.stages["denoise"] > 0


def test_frames_made_together_are_those_made_alone(made):
    _, _, stream = made
    picture = torch.rand(3, *stream.host.resolution[::-1])
    shots = [
        Shot("fox", 1), Shot("owl", 2), Shot("fox", 3, steps=2), Shot("fox", 4, strength=0.4, picture=picture),
        Shot("owl", 5, strength=0.4, picture=1 - picture), Shot("a cat", 6, strength=0.7, picture=picture),
        Shot("a", 7, angle=1.0, towards="b", mix=0.3),
    ]  # fmt: skip
    together = stream.make(shots).pictures
    for shot, picture in zip(shots, together, strict=True):
        assert torch.allclose(stream.make([shot]).pictures[0], picture, atol=1e-5)
    assert len({p.numpy().tobytes() for p in together}) == len(shots)


def test_text_noise_and_picture_are_computed_once(made, monkeypatch):
    host, _, stream = made
    texts, pictures = (Counted(monkeypatch, host, name) for name in ("encode_text", "encode_images"))
    picture = torch.rand(3, *host.resolution[::-1])
    for k in range(5):
        stream.make([Shot("fox", seed=1, strength=0.5, picture=picture.clone(), angle=0.1 * k)])
    assert (texts.calls, pictures.calls) == (1, 1)
    stream.make([Shot("owl", picture=1 - picture, strength=0.5)])
    assert (texts.calls, pictures.calls) == (2, 2)


def test_strength_leads_from_the_picture_to_the_student_s(made):
    host, _, stream = made
    picture = torch.rand(3, *host.resolution[::-1])
    own = host.decode(host.encode_images(picture[None]))[0]
    apart = [
        float((stream.make([Shot("fox", strength=s, picture=picture)]).pictures[0] - own).abs().mean())
        for s in (0.01, 0.3, 1.0)
    ]
    assert apart[0] < 0.05 < apart[-1] and apart == sorted(apart)


def test_prompts_are_mixed_and_noise_is_turned(made):
    host, student, stream = made
    found = stream.make([Shot("fox", seed=1, towards="owl", mix=0.25, angle=0.5)]).pictures
    cond = mixed(host.encode_text(["fox"]), host.encode_text(["owl"]), 0.25)
    noise = turned(seeded_noise([1], host.latent_shape), seeded_noise([2], host.latent_shape), 0.5)
    assert torch.allclose(found, host.decode(student.generate(noise, cond, 1)), atol=1e-6)


def test_what_cannot_be_is_told(made):
    host, _, stream = made
    with pytest.raises(ModelError, match=r"steps is 5: .* at most 2 steps"):
        stream.make([Shot("fox", steps=5)])
    for wrong, words in (
        ({"strength": 0.0}, "strength is 0: give 0.01 to 1"),
        ({"mix": 1.5}, "mix is 1.5"),
        ({"strength": math.nan}, "strength is nan"),
        ({"angle": math.inf}, "angle is inf"),
        ({"picture": torch.zeros(3, 5, 7)}, "a picture is 7 x 5 pixels: give"),
    ):
        with pytest.raises(ValueError, match=words):
            check_shot(Shot("fox", **wrong), host.resolution)


def test_only_the_newest_are_kept():
    kept, made = Kept(2), []
    for key in (1, 2, 1, 3, 1, 2):
        kept.of(key, lambda key=key: made.append(key) or key)
    assert made == [1, 2, 3, 2]


def test_a_still_video_needs_no_frame_and_a_short_stroke_does():
    changes, picture = Changes(), torch.full((3, 64, 64), 0.5)
    shot = Shot("fox", picture=picture)
    noisy = picture + 0.002 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    stroke = picture.clone()
    stroke[:, 10:13, 20:26] = 0.0
    assert changes.needs(shot) and not changes.needs(shot) and not changes.needs(replace(shot, picture=noisy))
    assert changes.needs(replace(shot, picture=stroke)) and not changes.needs(replace(shot, picture=stroke))
    assert changes.needs(replace(shot, prompt="owl", picture=stroke))
    assert not still(picture, torch.full((3, 32, 32), 0.5))


def test_slow_changes_add_up_to_a_frame():
    """Each is compared with the last that was drawn, not with the last that came."""
    changes = Changes()
    drawn = [changes.needs(Shot("fox", picture=torch.full((3, 16, 16), 0.1 + 0.001 * k))) for k in range(20)]
    assert 3 <= sum(drawn) <= 8
