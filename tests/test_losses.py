"""Losses by hand and by other means."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Conv2d
from turbodistill.core import losses
from turbodistill.core.denoiser import Guidance, Guided, guided
from turbodistill.core.discriminator import Head
from turbodistill.core.losses import ADVERSARIAL, WEIGHTS
from turbodistill.core.sampling import sample_euler
from turbodistill.core.schedule import DiscreteSchedule, FlowSchedule, expand

# --- Adversarial ---


@pytest.mark.parametrize(
    ("name", "discriminator", "student"),
    [
        ("hinge", F.relu(1 - torch.tensor(0.5)) + F.relu(1 + torch.tensor(-0.25)), torch.tensor(0.25)),
        (
            "nonsaturating",
            F.softplus(torch.tensor(-0.5)) + F.softplus(torch.tensor(-0.25)),
            F.softplus(torch.tensor(0.25)),
        ),
        ("relativistic", F.softplus(torch.tensor(-0.75)), F.softplus(torch.tensor(0.75))),
    ],
)
def test_adversarial_losses_by_hand(name, discriminator, student):
    real, fake = (
        [torch.full((2, 9), 0.5), torch.full((2, 4), 0.5)],
        [torch.full((2, 9), -0.25), torch.full((2, 4), -0.25)],
    )
    of_discriminator, of_student = ADVERSARIAL[name]
    assert torch.allclose(of_discriminator(real, fake), discriminator)
    assert torch.allclose(of_student(fake, real), student)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_discriminator_parts_and_the_student_follows(name):
    real, fake = ([torch.zeros(2, 4, requires_grad=True)] for _ in range(2))
    of_discriminator, of_student = ADVERSARIAL[name]
    on_real, on_fake = torch.autograd.grad(of_discriminator(real, fake), [real[0], fake[0]])
    assert (on_real < 0).all() and (on_fake > 0).all()  # descending raises real, lowers fake
    assert (torch.autograd.grad(of_student(fake, real), fake)[0] < 0).all()  # the student raises its own


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_each_head_counts_the_same_whatever_its_size(name):
    small, large = torch.full((2, 1), -1.5), torch.full((2, 400), 0.5)
    of_discriminator, of_student = ADVERSARIAL[name]
    one = of_discriminator([small, small.clone()], [large[:, :1], large[:, :1]])
    assert torch.allclose(of_discriminator([small.expand(2, 400)] * 2, [large] * 2), one)
    mixed = of_student([small, large], [small, large])
    apart = (of_student([small], [small]) + of_student([large], [large])) / 2
    assert torch.allclose(mixed, apart)


def test_hinge_has_a_gradient_at_batch_one():
    # Positions on either side of the margin: a mean over the picture first would have none.
    real, fake = (
        torch.tensor([[2.5, 0.5, 1.5]], requires_grad=True),
        torch.tensor([[-3.0, 0.2, -1.5]], requires_grad=True),
    )
    on_real, on_fake = torch.autograd.grad(losses.hinge_discriminator([real], [fake]), [real, fake])
    assert torch.allclose(on_real, torch.tensor([[0, -1 / 3, 0]]))
    assert torch.allclose(on_fake, torch.tensor([[0, 1 / 3, 0]]))


def test_the_relativistic_student_needs_real_logits():
    with pytest.raises(ValueError, match="give them"):
        losses.relativistic_student([torch.zeros(1, 1)])


# --- R1 ---


def drawn(logits, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randint(2, x.shape, generator=draws) * 2 - 1 for x in logits]


def test_exact_r1_by_hand():
    # D_n(F) = a . F_n^2 at each position, whose gradient is 2 a F_n there and 0 elsewhere.
    weights, maps = torch.tensor([1.0, -2.0, 0.5]), torch.randn(4, 3, 2, 2, requires_grad=True)
    logits = (weights[:, None, None] * maps.square()).sum(1).flatten(1)
    expected = (2 * weights[:, None, None] * maps.detach()).square().sum(1).mean()
    assert torch.allclose(losses.exact_r1([logits], [maps], drawn([logits])), expected)
    both = [maps, torch.randn(4, 2, 5, 5, requires_grad=True)]
    two = [logits, 0 * both[1].sum(1).flatten(1)]
    flat = losses.exact_r1(two, both, drawn(two))
    assert torch.allclose(flat, expected / 2)  # each head counts the same


def test_exact_r1_trains_the_head():
    head, maps = Conv2d(3, 1, 1), torch.randn(2, 3, 2, 2, requires_grad=True)
    logits = [head(maps).flatten(1)]
    penalty = losses.exact_r1(logits, [maps], drawn(logits))
    assert torch.allclose(penalty, head.weight.square().sum())
    penalty.backward()
    assert torch.allclose(head.weight.grad, 2 * head.weight)


def test_exact_r1_of_positions_that_see_each_other_s_neighbours():
    """Against every position's own gradient, one by one."""
    torch.manual_seed(0)
    head, maps = Head(3, 4, 8), torch.randn(1, 3, 5, 5)
    head.eval()
    told = torch.randn(1, 4)
    slopes = torch.autograd.functional.jacobian(lambda x: head(x, told)[0], maps)
    expected = slopes.square().sum((1, 2, 3, 4)).mean().item()
    maps.requires_grad_(True)
    logits = [head(maps, told)]

    def estimate(seed):
        return losses.exact_r1([head(maps, told)], [maps], drawn(logits, seed)).item()

    found = [estimate(k) for k in range(300)]
    assert torch.tensor(found).mean().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("side", [8, 16, 32, 64, 128])
def test_both_penalties_are_the_same_at_every_resolution(side):
    torch.manual_seed(0)
    heads = [Head(c, 4, 16).double().eval() for c in (3, 5)]
    batch, s = max(2, 64 * 64 // side**2), 1e-3
    maps = [torch.randn(batch, c, side, side, dtype=torch.double) for c in (3, 5)]
    told = torch.ones(batch, 4, dtype=torch.double)

    def logits(inputs):
        return [head(x, told) for head, x in zip(heads, inputs, strict=True)]

    moved = logits([x + s * torch.randn_like(x) for x in maps])
    approximate = losses.approximate_r1(logits(maps), moved).item() / s**2
    for x in maps:
        x.requires_grad_(True)
    exact = losses.exact_r1(logits(maps), maps, drawn(logits(maps))).item()
    assert exact == pytest.approx(approximate, rel=0.1)
    assert exact == pytest.approx(0.06, rel=0.2)  # the edges' share alone differs


def test_approximate_r1_approaches_the_slope():
    # || D(x) - D(x + s e) ||^2 / s^2 has the mean | w |^2 for a linear head.
    head, maps, s = Conv2d(3, 1, 1), torch.randn(64, 3, 16, 16), 0.1
    logits, moved = head(maps).flatten(1), head(maps + s * torch.randn_like(maps)).flatten(1)
    penalty = losses.approximate_r1([logits], [moved])
    assert penalty.item() / s**2 == pytest.approx(head.weight.square().sum().item(), rel=0.1)
    penalty.backward()
    assert (head.weight.grad * head.weight).sum() > 0  # descending flattens the head
    assert losses.approximate_r1([logits], [logits]).item() == 0


# --- Distillation ---


def test_weights_are_add_s():
    schedule = DiscreteSchedule()
    sigma = schedule.sigma(torch.tensor([50, 500, 999]))
    alpha = schedule.alphas_cumprod[[50, 500, 999]].sqrt().float()
    s = (1 - alpha**2).sqrt()
    assert torch.allclose(WEIGHTS["exponential"](schedule, sigma), alpha, atol=1e-5)
    assert torch.allclose(WEIGHTS["nfsd"](schedule, sigma), alpha, atol=1e-5)
    assert torch.allclose(WEIGHTS["sds"](schedule, sigma), alpha / (2 * s) * s**2, atol=1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("schedule", [DiscreteSchedule(), FlowSchedule(shift=3.0)])
def test_weights_are_finite_at_every_level(name, schedule):
    weight = WEIGHTS[name](schedule, schedule.sigma(torch.arange(schedule.timesteps)))
    assert torch.isfinite(weight).all() and (weight >= 0).all()


def test_matching_moves_the_picture_from_its_own_score_to_the_teacher_s(toys):
    x, x0, sigma, cond = toys.picture(), toys.picture(), torch.tensor([3.0, 0.5]), toys.cond()
    teacher = toys.Recorder(lambda x, s, c: x0 + 2.0)
    score = toys.Recorder(lambda x, s, c: x0 + 5.0)
    target = losses.matching_target(teacher, score, x, x0, sigma, cond, None, 1.0)
    # The scores differ by 3, the teacher is 2 away from the picture.
    assert torch.allclose(target, x0 - 3.0 / 2.0, atol=1e-5)
    same = losses.matching_target(teacher, teacher, x, x0, sigma, cond, None, 1.0)
    assert torch.equal(same, x0)


def test_matching_guides_the_teacher_and_not_the_score(toys):
    x, x0, sigma, cond, uncond = (
        toys.picture(),
        toys.picture(),
        torch.tensor([3.0, 0.5]),
        toys.cond(),
        toys.cond(1, 0.0),
    )
    teacher, score = toys.conv(), toys.conv(seed=1)
    found = losses.matching_target(teacher, score, x, x0, sigma, cond, uncond, 4.0)
    real, fake = guided(teacher, x, sigma, cond, uncond, Guidance(4.0)), score(x, sigma, cond)
    scale = torch.stack([(a - b).abs().mean() for a, b in zip(x0, real, strict=True)]).view(-1, 1, 1, 1)
    assert torch.allclose(found, x0 + (real - fake) / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_denoising_is_the_error_of_what_the_backbone_puts_out(toys, prediction):
    toy, x0, noise, cond = toys.conv(prediction), toys.picture(), toys.picture(), toys.cond()
    sigma = toy.schedule.sigma(torch.tensor([800.0, 300.0]))
    alpha, s = (v.view(-1, 1, 1, 1) for v in toy.schedule.alpha_sigma(sigma))
    wanted = {"eps": noise, "v": alpha * noise - s * x0, "flow": noise - x0}[prediction]
    output = toy.output(toy.schedule.add_noise(x0, noise, sigma), sigma, cond)
    assert torch.allclose(losses.denoising(toy, x0, noise, sigma, cond), (output - wanted).square().mean(), rtol=1e-3)


def test_distillation_weighs_each_row_and_pulls_to_the_target():
    output, target = torch.randn(3, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 4, 4, requires_grad=True)
    weight = torch.tensor([0.0, 1.0, 3.0])
    loss = losses.distillation(output, target, weight)
    each = (output - target).square().flatten(1).mean(1)
    assert torch.allclose(loss, (weight * each).sum() / 3)
    loss.backward()
    assert target.grad is None
    expected = 2 * weight[:, None, None, None] * (output - target) / (3 * 32)
    assert torch.allclose(output.grad, expected, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_the_teacher_s_target_in_one_step_is_its_guided_x0(toys, prediction, guidance):
    teacher, cond, uncond = toys.conv(prediction), toys.cond(), toys.cond(1, 0.0)
    x, sigma = toys.picture(), teacher.schedule.sigma(torch.tensor([300, 900]))
    target = losses.teacher_target(teacher, x, sigma, cond, uncond, guidance)
    assert not target.requires_grad
    assert torch.allclose(target, Guided(teacher, cond, uncond, Guidance(guidance))(x, sigma), atol=1e-4)


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_the_teacher_s_target_in_n_steps_is_euler_s(toys, prediction, steps):
    teacher, cond, uncond = toys.conv(prediction), toys.cond(), toys.cond(1, 0.0)
    schedule, x = teacher.schedule, toys.picture()
    start = torch.tensor([400.0, 900.0])  # rows at levels of their own
    target = losses.teacher_target(teacher, x, schedule.sigma(start), cond, uncond, 3.0, steps)
    for k, t in enumerate(start):
        sigmas = torch.cat([schedule.sigma(t * torch.linspace(1, 0, steps + 1)[:-1]), torch.zeros(1)])
        one = sample_euler(Guided(teacher, cond.rows([k]), uncond, Guidance(3.0)), x[k : k + 1], sigmas)
        assert torch.allclose(target[k : k + 1], one, atol=1e-2)


def test_the_nfsd_target_leaves_the_noise_residue_out(toys):
    teacher, cond, uncond, s = toys.conv(), toys.cond(), toys.cond(1, 0.0), 5.0
    schedule, x0 = teacher.schedule, toys.picture()
    negative = toys.cond(1, 1.0)
    sigma = schedule.sigma(torch.tensor([100, 700]))  # the small rule, and the large
    x = schedule.add_noise(x0, toys.picture(), sigma)
    eps = {n: teacher.output(x, sigma, c) for n, c in [("c", cond), ("u", uncond.repeat(2)), ("n", negative.repeat(2))]}
    domain = {False: torch.zeros_like(x), True: eps["u"] - eps["n"]}
    for given in (False, True):
        target = losses.nfsd_target(teacher, x, x0, sigma, cond, uncond, s, negative if given else None)
        correction = torch.stack([eps["u"][0], domain[given][1]])
        expected = x0 - expand(sigma, x) * (correction + s * (eps["c"] - eps["u"]))
        assert torch.allclose(target, expected, atol=2e-3)


def test_nfsd_rests_where_the_condition_says_nothing(toys):
    # Above timestep 200, without a direction, nothing moves: SDS would pull by its own noise.
    teacher, cond = toys.conv(), toys.cond(1)
    x0, sigma = toys.picture(1), teacher.schedule.sigma(torch.tensor([700]))
    x = teacher.schedule.add_noise(x0, toys.picture(1), sigma)
    assert torch.allclose(losses.nfsd_target(teacher, x, x0, sigma, cond, cond, 7.0), x0, atol=1e-3)


# --- Regression and features ---


@pytest.mark.parametrize(("schedule", "velocity"), [(DiscreteSchedule(), "v"), (FlowSchedule(shift=3.0), "flow")])
def test_an_error_of_x0_weighs_as_much_as_that_of_the_velocity(schedule, velocity):
    """In variance-preserving models that is 1 + SNR, half to one time the truncated SNR of Salimans and Ho."""
    sigma = schedule.sigma(torch.tensor([0, 20, 500, 999]))
    x, found, wanted = torch.randn(3, 4, 2, 8, 8)
    weight = losses.velocity_weight(schedule, sigma)
    of_velocity = F.mse_loss(*(schedule.from_x0(velocity, x, x0, sigma) for x0 in (found, wanted)))
    assert torch.allclose(losses.distillation(found, wanted, weight), of_velocity, rtol=1e-3)
    if velocity == "v":
        alpha, s = schedule.alpha_sigma(sigma)
        snr = (alpha / s) ** 2
        assert torch.allclose(weight, 1 + snr, rtol=1e-5)
        assert ((weight >= snr.clamp(min=1)) & (weight <= 2 * snr.clamp(min=1) * (1 + 1e-5))).all()


def test_regression_is_huber_and_has_no_gradient_to_the_target():
    output = torch.tensor([0.25, 2.0]).reshape(2, 1, 1, 1).requires_grad_()
    target = torch.zeros(2, 1, 1, 1, requires_grad=True)
    loss = losses.regression(output, target)
    assert loss.item() == pytest.approx((0.5 * 0.25**2 + 0.5 * (2.0 - 0.25)) / 2)
    loss.backward()
    assert target.grad is None and output.grad.flatten().tolist() == pytest.approx([0.125, 0.25])


def test_feature_matching_is_the_mean_distance_of_the_maps():
    fake, real = (
        [torch.zeros(2, 3, 4, 4, requires_grad=True), torch.zeros(2, 5, 1, 1)],
        [torch.ones(2, 3, 4, 4), torch.full((2, 5, 1, 1), 3.0)],
    )
    loss = losses.feature_matching(fake, [r.requires_grad_() for r in real])
    assert loss.item() == pytest.approx(2.0)
    loss.backward()
    assert fake[0].grad.abs().sum() > 0 and all(r.grad is None for r in real)
