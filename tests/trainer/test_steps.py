"""The trainer's terms where a mistake would be silent."""

from dataclasses import replace

import pytest
import torch
from turbodistill.core import losses
from turbodistill.core.denoiser import Guidance, Guided
from turbodistill.core.losses import ADVERSARIAL, WEIGHTS
from turbodistill.core.schedule import expand
from turbodistill.core.student import Student
from turbodistill.trainer.config import Config
from turbodistill.trainer.data.samples import Samples
from turbodistill.trainer.loop import steps
from turbodistill.trainer.loop.batch import draw_batch
from turbodistill.trainer.loop.state import State

FULL = steps.Phase(discriminator=True, adversarial=True, ramp=1.0, fresh_noise_share=0.0)


class Watched:
    """Features that note pictures and levels."""

    def __init__(self, features, calls, conditional):
        self.features, self.calls, self.conditional, self.varies = features, calls, conditional, False

    def __call__(self, x, sigma, cond, view=None):
        self.calls.append((x, sigma))
        return self.features(x, sigma, cond)


def seen(state, output, batch):
    """The positives and the student's pictures as the discriminator sees them."""
    (critic,) = state.critics
    return steps.real_inputs(state, critic, batch), steps.head_inputs(state, critic, output, batch.cond, batch)


def toy_state(toys, teacher=None, rank=0, **settings):
    teacher = teacher or toys.conv()
    config = Config(rank=rank, batch_size=4, head_channels=8, taps="conv_in,down", precision="float32", **settings)
    pairs = Samples(toys.picture(8), toys.cond(8), list("abcdefgh"), torch.arange(8))
    student = Student(teacher, rank=rank)
    return State.create(student, config, pairs), pairs


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_distillation_noises_the_student_s_output_and_not_the_real_picture(toys, weighting):
    state, pairs = toy_state(toys, distillation=weighting, distillation_weight=2.5)
    batch = draw_batch(state.config, state.student, pairs, None, torch.Generator().manual_seed(0))
    output = toys.picture(4).requires_grad_()
    # Its answer depends on the condition, which is all that NFSD moves by.
    recorder = toys.Recorder(lambda x, _, cond: x / 2 + expand(cond.context.mean((1, 2)), x), state.student.schedule)
    state.student.teacher = recorder
    loss = steps.distillation_loss(state, output, batch, toys.cond(1, 0.0))
    noisy = state.student.schedule.add_noise(output.detach(), batch.distill_noise, batch.distill_sigma)
    x, sigma, _ = recorder.calls[0]
    assert torch.equal(x[:4], noisy) and torch.equal(sigma[:4], batch.distill_sigma)
    assert not x.requires_grad  # the target is the teacher's: no gradient goes through it
    loss.backward()
    assert output.grad.abs().sum() > 0


def test_distillation_asks_the_teacher_with_guidance(toys):
    # "Teacher without CFG" is a mistake that no loss curve shows.
    state, pairs = toy_state(toys, distillation_weight=2.5, distillation_guidance=4.0)
    batch = draw_batch(state.config, state.student, pairs, None, torch.Generator().manual_seed(0))
    output, uncond = toys.picture(4), toys.cond(1, 0.0)
    teacher, sigma = state.student.teacher, batch.distill_sigma
    noisy = state.student.schedule.add_noise(output, batch.distill_noise, sigma)
    target = Guided(teacher, batch.cond, uncond, Guidance(4.0))(noisy, sigma)
    expected = losses.distillation(output, target, losses.exponential_weight(state.student.schedule, sigma))
    assert torch.allclose(steps.distillation_loss(state, output, batch, uncond), expected, rtol=1e-4)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("term", ["adversarial", "distillation", "regression", "feature"])
def test_every_term_reaches_the_student_and_nothing_else(toys, term, rank):
    # A generator under no_grad, or a detached output, would leave the student untrained in silence.
    weights = {f"{t}_weight": float(t == term) for t in ("adversarial", "distillation", "regression", "feature")}
    state, pairs = toy_state(toys, rank=rank, **weights)
    if rank:
        toys.nudge(state.student.lora)
    batch = draw_batch(state.config, state.student, pairs, None, torch.Generator().manual_seed(0))
    with state.student.training():
        made = steps.student_losses(state, batch, toys.cond(1, 0.0), FULL)
        assert list(made.losses) == [{"feature": "features"}.get(term, term)] and made.output.requires_grad
        sum(made.losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in state.student.trained.parameters())
    assert all(p.grad is None for p in state.student.teacher.backbone.parameters())
    assert all(p.grad is None for p in state.critics[0].discriminator.parameters())


@pytest.mark.parametrize("penalty", ["none", "exact", "approximate", "data"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_discriminator_s_loss_trains_it_alone(toys, name, penalty):
    state, pairs = toy_state(toys, adversarial=name, r1=penalty)
    batch = draw_batch(state.config, state.student, pairs, None, torch.Generator().manual_seed(0))
    with state.student.training():
        made = steps.student_losses(state, batch, toys.cond(1, 0.0), FULL)
        (found,) = made.seen
        parts, _ = steps.discriminator_losses(state, state.critics[0], found.real, found.fake, batch)
        assert ("r1" in parts) == (penalty != "none") and all(v > 0 for v in parts.values())
        sum(parts.values()).backward()
    assert any(p.grad.abs().sum() > 0 for p in state.critics[0].discriminator.parameters() if p.grad is not None)
    assert all(p.grad is None for p in state.student.trained.parameters())
    assert all(p.grad is None for p in state.student.teacher.backbone.parameters())


def test_r1_of_the_data_moves_the_picture_and_nothing_else(toys):
    """APT, arXiv 2501.08316, eq. 4: the same noise and level, of a picture and of one that is moved a little."""
    state, pairs = toy_state(toys, r1="data", r1_weight=3.0, r1_noise=0.05)
    batch = draw_batch(state.config, state.student, pairs, None, torch.Generator().manual_seed(0))
    (critic,), calls = state.critics, []
    real, fake = seen(state, toys.picture(4), batch)
    critic.discriminator.eval()  # its spectral norms stay as they are
    before = steps.logits(critic, real)
    critic.features = Watched(critic.features, calls, True)
    parts, _ = steps.discriminator_losses(state, critic, real, fake, batch)
    ((x, sigma),) = calls
    clean = state.student.schedule.add_noise(batch.positive, batch.noise, batch.renoise)
    moved = (x - clean) / 0.05
    assert torch.equal(sigma, batch.renoise) and 0.8 < moved.std() < 1.2
    assert torch.allclose(moved, torch.stack([batch.noise_of(i, x.shape[1:]) for i in range(4)]), atol=1e-3)
    maps = critic.discriminator.standardise(critic.features.features(x, sigma, batch.positive_cond))
    after = steps.logits(critic, replace(real, maps=maps))
    expected = torch.stack([(a - b).square().mean() for a, b in zip(before, after, strict=True)]).mean()
    assert torch.allclose(parts["r1"], 3.0 / 0.05**2 * expected, rtol=1e-2)


@pytest.mark.parametrize("conditional", [True, False], ids=["latents", "pictures"])
def test_a_real_picture_with_another_s_text_counts_as_wrong(toys, conditional):
    state, pairs = toy_state(toys, mismatch_weight=0.5, adversarial="nonsaturating", r1="none")
    batch = draw_batch(state.config, state.student, pairs, None, torch.Generator().manual_seed(0))
    state.critics[0].features.conditional = conditional
    real, fake = seen(state, toys.picture(4), batch)
    turned = batch.positive_cond.rows(torch.tensor([3, 0, 1, 2]))
    # Features of noisy latents are of the text as well: they are taken with the other's.
    wrong = replace(real, text=turned.summary)
    if conditional:
        wrong = steps.head_inputs(state, state.critics[0], batch.positive, turned, batch)
    parts, (on_real, _) = steps.discriminator_losses(state, state.critics[0], real, fake, batch)
    logits = steps.logits(state.critics[0], wrong)
    # Each judgement moves the heads' spectral norms a little.
    expected = 0.5 * losses.nonsaturating_discriminator(on_real, logits)
    assert parts["mismatch"].item() == pytest.approx(expected.item(), rel=1e-3)
    parts["mismatch"].backward()
    assert all(p.grad is not None for p in state.critics[0].discriminator.condition.parameters())


@pytest.mark.parametrize("conditional", [True, False])
def test_the_image_condition_is_as_noisy_as_the_teacher_is_told(toys, conditional):
    state, pairs = toy_state(toys, condition_image=True, student_steps=2)
    batch = draw_batch(state.config, state.student, pairs, None, torch.Generator().manual_seed(3))
    calls, features = [], state.critics[0].features
    state.critics[0].features = Watched(features, calls, conditional)
    told = steps.image_condition(state, state.critics[0], batch)
    ((picture, sigma),) = calls
    assert torch.equal(sigma, state.student.schedule.sigma(torch.full((4,), 20.0)))
    noise = expand(sigma, batch.target) * batch.noise if conditional else torch.zeros_like(batch.target)
    assert torch.allclose(picture, batch.target + noise) and told.shape == (4, 8)
    assert (told[batch.first] == 0).all() and batch.first.any() and (told[~batch.first] != 0).any()


def test_an_error_leaves_no_frozen_discriminator(toys, monkeypatch):
    state, pairs = toy_state(toys)
    batch = draw_batch(state.config, state.student, pairs, None, torch.Generator().manual_seed(3))
    real, fake = seen(state, batch.target, batch)

    def broken(*_):
        assert not any(p.requires_grad for p in state.critics[0].discriminator.parameters())
        raise KeyError("cancelled")

    monkeypatch.setattr(steps, "logits", broken)
    with pytest.raises(KeyError, match="cancelled"):
        steps.adversarial_loss(state, state.critics[0], real, fake)
    assert all(p.requires_grad for p in state.critics[0].discriminator.parameters())


def test_a_batch_of_one_text_has_no_other(toys):
    state, _ = toy_state(toys, mismatch_weight=0.5)
    alike = Samples(toys.picture(8), toys.cond(1).repeat(8), [""] * 8, torch.arange(8))
    batch = draw_batch(state.config, state.student, alike, None, torch.Generator().manual_seed(0))
    judged = seen(state, toys.picture(4), batch)
    parts, _ = steps.discriminator_losses(state, state.critics[0], *judged, batch)
    assert "mismatch" not in parts
