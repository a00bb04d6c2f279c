"""The training loop: every loss and option makes updates, and nothing of the teacher changes."""

import contextlib
import itertools
import math

import pytest
import torch
from turbodistill.core import losses
from turbodistill.core.schedule import expand
from turbodistill.trainer.config import LEAST_LR
from turbodistill.trainer.loop import batch as drawing
from turbodistill.trainer.loop import distill as loop
from turbodistill.trainer.loop import steps
from turbodistill.trainer.loop.batch import draw_batch, generator
from turbodistill.trainer.loop.distill import Diverged, distill

ALONE = {"adversarial_weight": 0.0, "regression_weight": 0.0}
OPTIONS = {
    "default": {},
    "nonsaturating": {"adversarial": "nonsaturating"},
    "relativistic": {"adversarial": "relativistic"},
    "no r1": {"r1": "none"},
    "exact r1": {"r1": "exact"},
    "r1 weight 0": {"r1_weight": 0.0},
    "exponential": {"distillation_weight": 2.5},
    "sds": {"distillation_weight": 2.5, "distillation": "sds"},
    "nfsd": {"distillation_weight": 2.5, "distillation": "nfsd"},
    "teacher steps": {"distillation_weight": 2.5, "teacher_steps": 2},
    "distillation unguided": {"distillation_weight": 2.5, "distillation_guidance": 1.0},
    "distillation alone": {"distillation_weight": 1.0, **ALONE},
    "matching": {"distillation_weight": 0.5, "distillation": "matching"},
    "matching of a full copy": {
        "distillation_weight": 0.5,
        "distillation": "matching",
        "rank": 0,
        "fake_score_rank": 2,
    },
    "matching alone": {"distillation_weight": 0.5, "distillation": "matching", **ALONE, "gradient_accumulation": 2},
    "features": {"feature_weight": 1.0},
    "features without a discriminator": {"feature_weight": 1.0, "adversarial_weight": 0.0},
    "features with real positives": {"feature_weight": 1.0, "positives": "real"},
    "no regression": {"regression_weight": 0.0},
    "regression alone": {"adversarial_weight": 0.0},
    "real": {"positives": "real"},
    "both": {"positives": "both", "real_share": 0.5},
    "condition on the image": {"condition_image": True, "student_steps": 2},
    "four steps": {"student_steps": 4, "first_step_share": 0.4},
    "never the first step": {"student_steps": 2, "first_step_share": 0.0},
    "a warm-up that never sees it": {"student_steps": 2, "first_step_share": 0.0, "regression_updates": 1},
    "lower start": {"start_timestep": 399},
    "full copy": {"rank": 0},
    "alpha": {"alpha": 1.0},
    "targets": {"targets": r"blocks\."},
    "output x0": {"prediction": "x0"},
    "three discriminator updates": {"discriminator_updates": 3},
    "three updates of the fake score": {
        "distillation_weight": 0.5,
        "distillation": "matching",
        "fake_score_updates": 3,
        "discriminator_updates": 2,
    },
    "r1 of the data": {"r1": "data"},
    "split by noise level": {
        "distillation_weight": 0.5,
        "distillation_min_timestep": 400,
        "renoise_max_timestep": 400,
    },
    "features from the first update on": {"feature_weight": 1.0, "regression_updates": 2, "updates": 4},
    "gradient_accumulation": {"gradient_accumulation": 2},
    "one tap": {"taps": "blocks.1"},
    "taps found": {"taps": ""},
    "regression_updates": {"regression_updates": 1},
    "no clipping": {"max_grad_norm": 0.0},
    "no average": {"ema_decay": 0.0},
    "renoise": {"renoise_mean": 1.0, "renoise_std": 0.5},
    "bfloat16": {"precision": "bfloat16"},
    "auto": {"precision": "auto"},
    "batch of one": {"batch_size": 1},
    "lr_decay": {"lr_decay": 1.0},
    "fresh noise": {"fresh_noise_share": 1.0},
    "no fresh noise": {"fresh_noise_share": 0.0},
}


def check_updates(kit, host, state, samples):
    """Run to the end, and hold what every run must hold."""
    teacher = host.denoiser.backbone
    before, flags = kit.weights(teacher), [p.requires_grad for p in teacher.parameters()]
    student = kit.weights(state.student.trained)
    heads = [p.detach().clone() for p in state.critics[0].discriminator.parameters()]
    steps = list(distill(state, samples, host.encode_text([""]), kit.reals(host)))

    assert [s.update for s in steps] == list(range(1, state.config.updates + 1))
    assert all(s.losses and all(math.isfinite(v) for v in s.losses.values()) for s in steps)
    assert all(math.isfinite(v) for s in steps for v in s.health.numbers.values())
    assert not kit.same(kit.weights(state.student.trained), student)
    assert not kit.same(kit.weights(state.average), student)
    assert kit.same(kit.weights(teacher), before)
    assert [p.requires_grad for p in teacher.parameters()] == flags
    assert all(p.grad is None for p in teacher.parameters())
    still = all(torch.equal(a, b) for a, b in zip(state.critics[0].discriminator.parameters(), heads, strict=True))
    assert still == (state.config.adversarial_weight == 0)
    state.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    return steps


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_makes_updates_and_leaves_the_teacher(kit, host, tmp_path, changes):
    state, samples = kit.started(host, tmp_path, **changes)
    check_updates(kit, host, state, samples)


@pytest.mark.parametrize("changes", [{}, {"rank": 0, "r1": "exact"}, {"student_steps": 4, "condition_image": True}])
def test_a_diffusers_unet_is_distilled_with_the_taps_found_in_it(kit, tmp_path, changes):
    host = kit.unet_host()
    host.denoiser.backbone.requires_grad_(False)
    state, samples = kit.started(host, tmp_path, taps="", **changes)
    assert any(t.startswith("mid_block") for t in state.critics[0].features.taps)
    check_updates(kit, host, state, samples)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, {"regression", "adversarial", "discriminator", "r1"}),
        ({"r1": "none", "distillation_weight": 1.0}, {"regression", "adversarial", "discriminator", "distillation"}),
        ({"adversarial_weight": 0.0, "feature_weight": 1.0}, {"regression", "features"}),
        ({"regression_updates": 9}, {"regression"}),
        ({"regression_updates": 9, "feature_weight": 1.0}, {"regression", "features"}),
        ({"r1": "data"}, {"regression", "adversarial", "discriminator", "r1"}),
    ],
)
def test_a_step_names_the_losses_that_made_it(kit, host, tmp_path, changes, names):
    state, samples = kit.started(host, tmp_path, **changes)
    assert all(set(step.losses) == names for step in distill(state, samples, host.encode_text([""])))


def test_the_discriminator_learns_first_on_the_pairs_own_noise(kit, host, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        drawing, "draw_batch", lambda *args, **more: drawn.append(args[-1]) or draw_batch(*args, **more)
    )
    settings = {
        "regression_updates": 3,
        "discriminator_warmup": 2,
        "updates": 4,
        "fresh_noise_share": 0.5,
        "discriminator_updates": 2,
    }
    state, samples = kit.started(host, tmp_path, **settings)
    heads = [[p.detach().clone() for p in state.critics[0].discriminator.parameters()]]
    names = []
    for step in distill(state, samples, host.encode_text([""])):
        names.append(set(step.losses))
        heads.append([p.detach().clone() for p in state.critics[0].discriminator.parameters()])
    learnt = {"discriminator", "r1"}
    assert names == [{"regression"}, {"regression"} | learnt, {"regression"} | learnt, {"adversarial"} | names[1]]
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(heads)]
    assert moved == [False, True, True, True]
    assert drawn == [0.0] * 5 + [0.5] * 2
    state.release()


def test_a_lead_leaves_the_warm_up_s_student_as_it_was(kit, host, tmp_path):
    told = []
    for lead in (0, 3):
        state, samples = kit.started(host, tmp_path, regression_updates=3, discriminator_warmup=lead, updates=3)
        list(distill(state, samples, host.encode_text([""])))
        told.append(kit.weights(state.student.trained))
        state.release()
    assert kit.same(*told)


def test_the_student_s_score_learns_what_it_makes_and_is_off_for_all_else(kit, host, tmp_path):
    changes = {
        "distillation_weight": 0.5,
        "distillation": "matching",
        "lr": LEAST_LR,
        "lr_fake_score": 0.01,
        "updates": 40,
    }
    state, samples = kit.started(host, tmp_path, **ALONE, **changes)
    cond, uncond = samples.cond.rows(slice(4)), host.encode_text([""])
    x, sigma = torch.randn(4, *host.latent_shape), torch.full((4,), 2.0)
    before = host.denoiser(x, sigma, cond)
    assert torch.equal(state.fake_score.denoiser(x, sigma, cond), before)
    steps = list(distill(state, samples, uncond))
    first, last = ([s.losses["fake_score"] for s in part] for part in (steps[:10], steps[-10:]))
    assert sum(last) < sum(first)
    assert torch.equal(host.denoiser(x, sigma, cond), before)
    assert not torch.equal(state.fake_score.denoiser(x, sigma, cond), before)
    state.release()


def test_matching_rises_after_the_warm_up_as_the_adversarial_term_does(kit, host, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "distillation_loss", lambda state, output, *_: 1.0 + 0.0 * output.sum())
    changes = {
        "distillation_weight": 0.5,
        "distillation": "matching",
        "regression_updates": 2,
        "adversarial_ramp": 2,
        "updates": 5,
    }
    state, samples = kit.started(host, tmp_path, **changes)
    told = [s.losses.get("distillation") for s in distill(state, samples, host.encode_text([""]))]
    assert told == [None, None, 0.25, 0.5, 0.5]


def test_the_distillation_term_noises_the_students_output(kit, host, tmp_path, monkeypatch):
    """ADD, section 3.3: x_hat is diffused and denoised by the teacher, not the pair's picture."""
    state, samples = kit.started(host, tmp_path, distillation_weight=1.0)
    batch = draw_batch(state.config, state.student, samples, None, generator(0, 0))
    seen = {}
    inner = losses.teacher_target

    def watched(teacher, x, sigma, cond, uncond, guidance, steps):
        assert teacher is host.denoiser
        seen["x"], seen["sigma"], seen["target"] = x, sigma, inner(teacher, x, sigma, cond, uncond, guidance, steps)
        return seen["target"]

    monkeypatch.setattr(losses, "teacher_target", watched)
    output = torch.randn_like(batch.target).requires_grad_(True)
    loss = steps.distillation_loss(state, output, batch, host.encode_text([""]))
    sigma = expand(batch.distill_sigma, output)
    assert torch.equal(seen["x"], output.detach() + sigma * batch.distill_noise)
    # The gradient is that of c(t) |x_hat - target|^2 with a constant target: none flows through the teacher.
    alpha = (1 + batch.distill_sigma**2).rsqrt()
    expected = 2 * expand(alpha, output) * (output - seen["target"]).detach() / output.numel()
    assert torch.allclose(torch.autograd.grad(loss, output)[0], expected, atol=1e-6)


def test_the_gradient_reaches_the_student_and_stops_at_teacher_and_discriminator(kit, host, tmp_path):
    state, samples = kit.started(host, tmp_path, distillation_weight=1.0, feature_weight=1.0)
    with state.student.training():
        batch = draw_batch(state.config, state.student, samples, None, generator(0, 0))
        parts = steps.student_losses(state, batch, host.encode_text([""]), steps.Phase.of(state)).losses
        for name, part in parts.items():
            state.optimizer.zero_grad()
            part.backward(retain_graph=True)
            gradients = [b.up.grad for b in state.student.lora.branches]
            assert any(g is not None and g.abs().max() > 0 for g in gradients), name
        assert all(p.grad is None for p in state.critics[0].discriminator.parameters())
        assert all(p.grad is None for p in host.denoiser.backbone.parameters())


def test_the_regression_is_of_pairs_alone_and_all_noise_is_theirs_until_the_discriminator_judges(kit, host, tmp_path):
    state, samples = kit.started(host, tmp_path, updates=4, regression_updates=2, fresh_noise_share=1.0)
    names = [set(step.losses) for step in distill(state, samples, host.encode_text([""]))]
    assert names == [{"regression"}] * 2 + [{"adversarial", "discriminator", "r1"}] * 2


def test_without_a_discriminator_all_noise_is_the_pairs(kit, host, tmp_path):
    state, samples = kit.started(host, tmp_path, updates=3, fresh_noise_share=1.0, adversarial_weight=0.0)
    assert [set(step.losses) for step in distill(state, samples, host.encode_text([""]))] == [{"regression"}] * 3


def test_accumulation_has_the_gradient_of_the_mean(kit, host, tmp_path):
    """Without anything drawn, two batches accumulated do what one batch does."""
    ends = []
    for accumulate in (1, 2):
        settings = kit.config(gradient_accumulation=accumulate, adversarial_weight=0.0, batch_size=1, updates=3)
        samples = kit.pairs(host, settings, tmp_path).select(torch.tensor([5]))
        state = kit.state(host, settings, samples)
        list(distill(state, samples, host.encode_text([""])))
        ends.append(kit.weights(state.student.trained))
        state.student.release()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))


def test_extra_discriminator_updates_accumulate_as_the_student_s_do(kit, host, tmp_path, monkeypatch):
    seen, inner = [], loop.discriminator_step

    def watched(state, batch, student, share):
        seen.append((share, batch.seed))
        return inner(state, batch, student, share)

    monkeypatch.setattr(loop, "discriminator_step", watched)
    state, samples = kit.started(host, tmp_path, gradient_accumulation=4, discriminator_updates=3, updates=1)
    list(distill(state, samples, host.encode_text([""])))
    assert [share for share, _ in seen] == [0.25] * 12
    assert len({seed for _, seed in seen}) == 12  # each batch is another
    state.release()


def test_a_fake_score_has_its_own_number_of_updates(kit, host, tmp_path, monkeypatch):
    """On the pictures that the discriminator sees, where both have more than the student (DMD2)."""
    seen = {"discriminator_step": [], "fake_score_step": []}

    def watched(inner, calls):
        def step(state, batch, student, share):
            calls.append((batch.seed, state.fake_score.denoiser.lora.branches[0].up.detach().clone()))
            return inner(state, batch, student, share)

        return step

    for name, calls in seen.items():
        monkeypatch.setattr(loop, name, watched(getattr(loop, name), calls))
    changes = {"distillation_weight": 0.5, "distillation": "matching", "fake_score_updates": 4, "lr_fake_score": 0.01}
    state, samples = kit.started(host, tmp_path, **changes, discriminator_updates=2, gradient_accumulation=2, updates=1)
    list(distill(state, samples, host.encode_text([""])))
    discriminator, score = ([seed for seed, _ in calls] for calls in seen.values())
    assert len(discriminator) == 2 * 2 and len(score) == len(set(score)) == 4 * 2
    assert discriminator == score[:2] + score[-2:]  # the first extra update is of both, the student's too
    weights = [up for _, up in seen["fake_score_step"]]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert moved == [False, True, False, True, False, True, False]
    state.release()


def test_closing_between_updates_restores_the_flags(kit, host, tmp_path):
    state, samples = kit.started(host, tmp_path, updates=5)
    teacher = host.denoiser.backbone
    teacher.requires_grad_(True)
    steps = distill(state, samples, host.encode_text([""]))
    next(steps)
    assert not any(p.requires_grad for p in teacher.parameters())
    steps.close()
    assert all(p.requires_grad for p in teacher.parameters()) and state.update == 1


def test_minutes_end_the_training(kit, host, tmp_path):
    state, samples = kit.started(host, tmp_path, updates=1000, minutes=1e-6)
    assert len(list(distill(state, samples, host.encode_text([""])))) == 1


def test_nothing_is_printed(kit, host, tmp_path, capfd):
    state, samples = kit.started(host, tmp_path)
    list(distill(state, samples, host.encode_text([""])))
    assert capfd.readouterr() == ("", "")


def test_a_state_goes_on_bit_for_bit(kit, host, tmp_path):
    options = {
        "updates": 6,
        "r1": "approximate",
        "discriminator_updates": 2,
        "student_steps": 2,
        "regression_updates": 1,
    }
    whole, samples = kit.started(host, tmp_path, **options)
    list(distill(whole, samples, host.encode_text([""])))
    half = kit.state(host, whole.config, samples)
    steps = distill(half, samples, host.encode_text([""]))
    for _ in range(3):
        next(steps)
    steps.close()
    torch.rand(7)  # whatever else draws in between does not matter
    other = kit.state(host, whole.config, samples)
    other.load_state_dict(half.state_dict())
    list(distill(other, samples, host.encode_text([""])))
    assert kit.same(kit.weights(other.student.trained), kit.weights(whole.student.trained))
    assert kit.same(kit.weights(other.average), kit.weights(whole.average))
    assert kit.same(kit.weights(other.critics[0].discriminator), kit.weights(whole.critics[0].discriminator))


@pytest.mark.parametrize("what", ["regression", "hinge"])
def test_a_loss_that_is_no_number_is_told_and_never_applied(kit, host, tmp_path, monkeypatch, what):
    state, samples = kit.started(host, tmp_path, updates=5)
    count = []

    def broken(inner):
        def loss(*args):
            count.append(1)
            return inner(*args) * (math.nan if len(count) == 3 else 1)

        return loss

    if what == "regression":
        monkeypatch.setattr(losses, "regression", broken(losses.regression))
    else:
        judge, student = losses.ADVERSARIAL["hinge"]
        monkeypatch.setitem(losses.ADVERSARIAL, "hinge", (broken(judge), student))
    steps = distill(state, samples, host.encode_text([""]))
    next(steps), next(steps)
    before = kit.weights(state.student.trained), kit.weights(state.critics[0].discriminator)
    with pytest.raises(Diverged, match=r"update 3: .* is not finite. Lower lr"):
        next(steps)
    assert kit.same(kit.weights(state.student.trained), before[0])
    learned = {k: v for k, v in kit.weights(state.critics[0].discriminator).items() if v.is_floating_point()}
    assert all(v.isfinite().all() for v in learned.values())
    assert state.update == 2


def test_a_student_that_must_improve_does(kit, host, tmp_path):
    """The regression falls well below that of the teacher in one step."""
    state, samples = kit.started(host, tmp_path, rank=0, adversarial_weight=0.0, updates=60, batch_size=12, lr=3e-3)
    told = [s.losses["regression"] for s in distill(state, samples, host.encode_text([""]))]
    assert sum(told[-5:]) < 0.5 * sum(told[:5])


@pytest.mark.parametrize(
    ("settings", "update", "spent", "factor"),
    [
        ({"lr_decay": 0.3, "updates": 100}, 0, 0.0, 1.0),
        ({"lr_decay": 0.3, "updates": 100}, 70, 0.0, 1.0),
        ({"lr_decay": 0.3, "updates": 100}, 85, 0.0, 0.5),
        ({"lr_decay": 0.3, "updates": 100, "minutes": 2.0}, 10, 102.0, 0.5),  # the clock is further on
        ({"lr_decay": 0.3, "updates": 100}, 10, 102.0, 1.0),
        ({"lr_decay": 1.0, "updates": 4}, 3, 0.0, 0.25),
        ({"lr_decay": 0.0, "updates": 4}, 3, 0.0, 1.0),
    ],
)
def test_the_learning_rates_fall_to_zero_at_the_end(host, kit, tmp_path, settings, update, spent, factor):
    config = kit.config(**settings)
    samples = kit.pairs(host, config, tmp_path)
    state = kit.state(host, config, samples)
    state.update, state.spent = update, spent
    assert loop.learning_rate_scale(state) == pytest.approx(factor)
    with contextlib.closing(distill(state, samples, host.encode_text([""]))) as steps:
        next(steps)
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(factor * state.config.lr)
    assert state.critics[0].optimizer.param_groups[0]["lr"] == pytest.approx(factor * state.config.lr_discriminator)
