"""A teacher whose score is known distils: one step of the student covers the modes, one of the teacher none.

Eight Gaussians on a ring, two numbers a "picture" (B, 2, 1, 1): from pure noise the teacher's one
step is the middle of the ring, where there is nothing, as a diffusion model's is a blur.
"""

import pytest
import torch
from turbodistill.core.denoiser import Cond, Guidance, Guided
from turbodistill.core.sampling import sample_dpmpp_2m, sample_euler, seeded_noise, trailing_sigmas
from turbodistill.core.student import Student
from turbodistill.trainer.config import Config
from turbodistill.trainer.data.samples import Samples
from turbodistill.trainer.loop import distill
from turbodistill.trainer.loop.state import State

STD = 0.1
SHAPE = (2, 1, 1)


def nothing(batch):
    return Cond(torch.zeros(batch, 1, 2))


def coverage(points, means):
    """How many modes have at least half their share of the points, and the share of points in some mode."""
    distance = torch.cdist(points.flatten(1), means)
    inside = distance.min(1).values < 4 * STD
    counts = torch.bincount(distance.argmin(1)[inside], minlength=len(means))
    return int((counts > len(points) / len(means) / 2).sum()), float(inside.float().mean())


@torch.no_grad()
def by_teacher(teacher, noise, steps):
    sigmas = trailing_sigmas(teacher.schedule, steps)
    return sample_dpmpp_2m(Guided(teacher, nothing(len(noise))), noise * sigmas[0], sigmas)


@pytest.fixture(scope="module")
def taught(toys):
    """The teacher, its modes, and pairs of noise and sample."""
    means = toys.ring()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = toys.mixture(means, STD)
    seeds = torch.arange(1024)
    latents = by_teacher(teacher, seeded_noise(seeds.tolist(), SHAPE), 32)
    return teacher, means, Samples(latents, nothing(1024), [""] * 1024, seeds)


def held_out():
    return torch.randn(1000, *SHAPE, generator=torch.Generator().manual_seed(9))


def test_the_teacher_needs_its_many_steps(taught):
    teacher, means, pairs = taught
    assert coverage(pairs.latents, means)[0] == 8
    assert coverage(by_teacher(teacher, held_out(), 1), means) == (0, 0.0)


SETTINGS = {
    "regression": {"rank": 0, "updates": 300, "regression_updates": 300},
    "LoRA": {"rank": 16, "updates": 600, "regression_updates": 600},
    "adversarial": {"rank": 0, "updates": 300, "regression_updates": 200, "regression_weight": 0.5},
    "ADD": {
        "rank": 0,
        "updates": 400,
        "regression_updates": 100,
        "distillation_weight": 0.5,
        "distillation_guidance": 1.0,
    },
    "matching": {
        **{
            "rank": 0,
            "updates": 400,
            "regression_updates": 200,
            "adversarial_ramp": 50,
            "adversarial_weight": 0.0,
            "regression_weight": 0.5,
        },
        **{"distillation": "matching", "distillation_weight": 0.5, "distillation_guidance": 1.0, "fake_score_rank": 8},
    },
}
TERMS = {
    "regression": {"regression"},
    "LoRA": {"regression"},
    "adversarial": {"regression", "adversarial", "discriminator", "r1"},
    "ADD": {"regression", "adversarial", "distillation"},
    "matching": {"regression", "distillation", "fake_score"},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SETTINGS)
def test_one_step_of_the_student_covers_the_modes(taught, recipe):
    teacher, means, pairs = taught
    settings = SETTINGS[recipe]
    config = Config(
        batch_size=128, lr=3e-3, head_channels=16, taps="inner,hidden", precision="float32", ema_decay=0.98, **settings
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Student(teacher, rank=config.rank, prediction="inherit")
    state = State.create(student, config, pairs)
    before = teacher(held_out(), torch.full((1000,), 3.0), nothing(1000))
    steps = list(distill.distill(state, pairs, nothing(1)))
    modes, share = coverage(student.generate(held_out(), nothing(1000)), means)
    state.release()
    assert len(steps) == config.updates
    assert steps[-1].losses.keys() >= TERMS[recipe]  # the recipe did use what it is named after
    assert modes == 8 and share > 0.6
    # Nothing of it touched the teacher.
    assert torch.equal(teacher(held_out(), torch.full((1000,), 3.0), nothing(1000)), before)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_guidance_alone_is_learnt_to_the_weight(toys, prediction):
    """Of an affine teacher W c + b the guided one is s W c + (1 - s) W u + b, and nothing else changes."""
    teacher, scale, draws = toys.affine(prediction), 3.0, torch.Generator().manual_seed(1)
    cond = Cond(torch.randn(256, 1, toys.TEXT, generator=draws))
    negative = Cond(torch.randn(1, 1, toys.TEXT, generator=draws))
    pairs = Samples(torch.randn(256, *SHAPE, generator=draws), cond, [""] * 256, torch.arange(256))
    config = Config(
        guidance_only=True, guidance=scale, pair_steps=16, rank=0, updates=800, batch_size=64, lr=2e-2, lr_decay=0.5,
        ema_decay=0.9, precision="float32",
    )  # fmt: skip
    student = Student(teacher, rank=0, guidance_steps=config.pair_steps)
    state = State.create(student, config, pairs)
    steps = list(distill.distill(state, pairs, negative))
    assert not state.critics and {name for step in steps for name in step.losses} == {"guidance"}

    old, new = teacher.backbone, student.backbone
    assert torch.allclose(new.text.weight, scale * old.text.weight, atol=2e-2)
    assert torch.allclose(new.point.weight, old.point.weight, atol=2e-2)
    shift = (1 - scale) * old.text.weight @ negative.context[0, 0]
    assert torch.allclose(new.point.bias + new.text.bias, old.point.bias + old.text.bias + shift, atol=2e-2)

    noise, some = torch.randn(8, *SHAPE, generator=draws), cond.rows(slice(8))
    sigmas = trailing_sigmas(teacher.schedule, 16)
    x = teacher.schedule.add_noise(torch.zeros_like(noise), noise, sigmas[:1])
    with torch.no_grad():
        expected, unguided = (
            sample_euler(Guided(teacher, some, negative, Guidance(s)), x, sigmas) for s in (scale, 1.0)
        )
    found = student.generate(noise, some)  # in its own 16 steps
    assert (found - expected).norm() < 0.05 * (unguided - expected).norm()
