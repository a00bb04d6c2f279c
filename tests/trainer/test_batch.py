"""What one update trains on: whose noise, which levels, which pictures."""

import torch
from turbodistill.core.schedule import expand
from turbodistill.trainer.loop.batch import Reals, draw_batch, generator
from turbodistill.trainer.world import World


class Second(World):
    """The second of two processes, of which nothing is sent."""

    rank, size = 1, 2


def test_pure_noise_is_the_pairs_own(kit, host, tmp_path):
    """Or the regression would ask one answer of another noise."""
    state, samples = kit.started(host, tmp_path, student_steps=2)
    batch = draw_batch(state.config, state.student, samples, None, generator(0, 0))
    assert batch.first.any() and not batch.first.all()
    by_picture = {latents.numpy().tobytes(): i for i, latents in enumerate(samples.latents[:])}
    rows = torch.tensor([by_picture[t.numpy().tobytes()] for t in batch.target])
    noise = batch.x / expand(batch.sigma, batch.x)
    assert torch.allclose(noise[batch.first], samples.noise(rows)[batch.first], atol=1e-6)


def test_a_share_of_pure_noise_is_fresh(kit, host, tmp_path):
    state, samples = kit.started(host, tmp_path, student_steps=2, batch_size=200)
    batch = draw_batch(state.config, state.student, samples, None, generator(0, 0), fresh=0.25)
    paired = torch.zeros(200, dtype=torch.bool).index_fill(0, batch.paired.rows, True)
    assert not (paired & ~batch.first).any()
    assert 0.6 < paired.sum() / batch.first.sum() < 0.9
    noise = batch.x / expand(batch.sigma, batch.x)
    known = {n.mul(1e3).round().int().numpy().tobytes() for n in samples.noise(torch.arange(len(samples)))}
    own = torch.tensor([n.mul(1e3).round().int().numpy().tobytes() in known for n in noise])
    assert own[paired].float().mean() > 0.9 and not own[~paired].any()


def test_positives_are_mixed_by_their_share_with_their_own_text(kit, host, tmp_path):
    state, samples = kit.started(host, tmp_path, positives="both", real_share=0.25, batch_size=400)
    pictures = kit.reals(host)
    beside = Reals.beside(samples, pictures)
    batch = draw_batch(state.config, state.student, samples, beside, generator(0, 0))
    of_teacher = (batch.positive == batch.target).flatten(1).all(1)
    assert 0.15 < 1 - of_teacher.float().mean() < 0.35
    assert torch.equal(batch.positive_cond.context[of_teacher], batch.cond.context[of_teacher])
    assert (batch.positive_cond.context[~of_teacher] == pictures.cond.context[0]).all()


def test_a_pair_is_judged_beside_the_picture_of_its_own_prompt(kit, host, tmp_path):
    state, samples = kit.started(host, tmp_path, positives="real", batch_size=400)
    pictures = kit.reals(host)
    pictures.prompts[2], pictures.prompts[4] = samples.prompts[0], samples.prompts[7]
    beside = Reals.beside(samples, pictures)
    batch = draw_batch(state.config, state.student, samples, beside, generator(0, 0))

    def shown(pair):
        """The rows of the pictures that were drawn beside a pair."""
        drawn = batch.positive[(batch.target == samples.latents[:][pair]).flatten(1).all(1)]
        return {int((pictures.latents == p).flatten(1).all(1).nonzero()) for p in drawn}

    assert shown(0) == {2} and shown(7) == {4}
    assert len(shown(3)) > 3  # of no picture's prompt: any of them


def test_distillation_keeps_above_its_lowest_timestep_and_the_discriminator_below_its_highest(kit, host, tmp_path):
    changes = {"distillation_min_timestep": 600, "renoise_max_timestep": 300, "batch_size": 400}
    state, samples = kit.started(host, tmp_path, **changes)
    batch = draw_batch(state.config, state.student, samples, None, generator(0, 0))
    schedule = state.student.schedule
    of_teacher, of_discriminator = (schedule.timestep(s) for s in (batch.distill_sigma, batch.renoise))
    assert 599 <= of_teacher.min() < 605 and 970 < of_teacher.max() < 980
    assert 299 <= of_discriminator.max() <= 301 and of_discriminator.min() < 150


def test_each_row_has_noise_of_its_own_in_any_number_of_processes(kit, host, tmp_path):
    state, samples = kit.started(host, tmp_path, batch_size=6)
    whole = draw_batch(state.config, state.student, samples, None, generator(0, 0))
    second = draw_batch(state.config, state.student, samples, None, generator(0, 0), world=Second())
    rows = [whole.noise_of(i, (2, 3)) for i in range(6)]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    assert all(torch.equal(second.noise_of(i, (2, 3)), rows[3 + i]) for i in range(3))
