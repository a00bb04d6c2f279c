"""Guidance-only distillation: what is drawn, learnt, left out, shown and written, and what cannot be."""

from contextlib import closing
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from turbodistill.app import cli
from turbodistill.core.card import read_card
from turbodistill.core.denoiser import Guidance, Guided, guided
from turbodistill.core.sampling import sample_dpmpp_2m, sample_euler, trailing_sigmas
from turbodistill.core.student import load_student
from turbodistill.generate.generator import Generator
from turbodistill.generate.sample import sample
from turbodistill.measure.evaluate import make_pictures, student_arm
from turbodistill.trainer.config import Config, ConfigError, check_resumable
from turbodistill.trainer.data.affixes import Affixes
from turbodistill.trainer.data.images import cache_images, load_images
from turbodistill.trainer.data.pictures import read_pictures
from turbodistill.trainer.data.samples import Samples
from turbodistill.trainer.loop import start, steps
from turbodistill.trainer.loop.batch import Group, draw_guidance_batch, generator
from turbodistill.trainer.loop.distill import Step, distill
from turbodistill.trainer.pipeline.load import load_model
from turbodistill.trainer.run import run
from turbodistill.trainer.run.estimate import estimate
from turbodistill.trainer.run.events import Preview, Selected, Warned
from turbodistill.trainer.run.memory import measure_memory

SETTINGS = {"guidance_only": True, "guidance": 3.0, "pair_steps": 9, "pairs": 8}


@pytest.fixture
def begun(kit, host, tmp_path):
    """A fresh state, its pairs and settings, for changes of these."""
    states = []

    def begin(**changes):
        config = kit.config(**SETTINGS | changes)
        samples = kit.pairs(host, config, tmp_path / "pairs")
        states.append(start.begin(host, config, samples))
        return states[-1], samples, config

    yield begin
    for state in states:
        state.release()


# --- Settings ---


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"guidance": 1.0}, "guidance_only is true and guidance is 1: there is nothing to bake in, raise guidance"),
        (
            {"student_steps": 4},
            "guidance_only is true and student_steps is 4: .* Leave student_steps at 1, or guidance",
        ),
        ({"start_timestep": 399}, "start_timestep is 399: .* Leave start_timestep at 999"),
        (
            {"prediction": "x0"},
            "prediction is 'x0': such a student is sampled as its teacher is. Leave prediction at 'inh",
        ),
        ({"first_step_share": 1.0}, "first_step_share is 1.0: .* at 0.6"),
        ({"fresh_noise_share": 0.0}, "fresh_noise_share is 0.0: .* at 0.5"),
    ],
)
def test_what_means_nothing_to_it_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        Config(guidance_only=True, **changes)
    Config(**changes)


def test_a_tick_is_enough():
    config = Config(guidance_only=True)
    assert Config.from_dict(config.to_dict()) == config and config.replace(guidance_only=False) == Config()
    Config(guidance_only=True, adversarial_weight=0.0, regression_weight=0.0)  # weights of what is not used
    with pytest.raises(ConfigError, match="guidance_only was false and is true"):
        check_resumable(Config().to_dict(), config)
    check_resumable({k: v for k, v in Config().to_dict().items() if k != "guidance_only"}, Config())


# --- What is drawn ---


def test_levels_are_uniform_and_spread_over_each_batch(begun):
    state, samples, config = begun(batch_size=8)
    schedule = state.student.schedule
    batches = [
        draw_guidance_batch(config, state.student, Group.of(samples, samples.cond.rows(slice(1))), generator(0, k))
        for k in range(200)
    ]
    timesteps = torch.stack([schedule.timestep(batch.sigma) for batch in batches])
    assert torch.allclose(timesteps, timesteps.round(), atol=1e-2)  # those that the model was trained on
    assert timesteps.min() < 5 and timesteps.max() > 994
    assert ((timesteps / 125).long().sort().values == torch.arange(8)).all()
    deciles = torch.histc(timesteps, 10, 0, 1000) / timesteps.numel()
    assert (deciles - 0.1).abs().max() < 0.01
    again = draw_guidance_batch(config, state.student, Group.of(samples, samples.cond.rows(slice(1))), generator(0, 7))
    assert torch.equal(again.x, batches[7].x)


def test_noise_is_fresh_and_on_the_teacher_s_pictures(begun):
    state, samples, config = begun(batch_size=64, pairs=8)
    group = Group.of(samples, samples.cond.rows(slice(1)))
    batch = draw_guidance_batch(config, state.student, group, generator(0, 1))
    rows = (batch.cond.context[:, None] == samples.cond.rows(slice(8)).context).all((2, 3)).float().argmax(1)
    assert len(rows.unique()) > 4
    noise = state.student.schedule.noise_in(batch.x, samples.latents[rows], batch.sigma)
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    assert (noise - samples.noise(rows)).abs().mean() > 0.5
    assert batch.teacher_cond.context is batch.cond.context


@pytest.mark.parametrize(("positives", "low", "high"), [("both", 0.1, 0.4), ("real", 1.0, 1.0)])
def test_pictures_of_one_s_own_are_noised_too(begun, host, positives, low, high):
    state, samples, config = begun(batch_size=64, positives=positives, real_share=0.25)
    own = Samples(torch.full((3, *host.latent_shape), 50.0), host.encode_text(["photo"] * 3), ["photo"] * 3)
    group = Group.of(samples, host.encode_text([""]), own)
    batch = draw_guidance_batch(config, state.student, group, generator(0, 1))
    photo = (batch.cond.context - own.cond.context[0]).abs().amax((1, 2)) < 1e-2
    assert low <= photo.float().mean() <= high
    few = batch.sigma < 1
    assert (batch.x.mean((1, 2, 3)) > 25)[few].equal(photo[few])


def test_the_teacher_has_the_affixes_that_are_baked_in_of_pictures_too(host, tmp_path, begun):
    state, samples, config = begun(batch_size=16, bake_affixes=True, prompt_suffix="photo", positives="real")
    for text in ("moss", "rust"):
        Image.new("RGB", (32, 32), "green" if text == "moss" else "brown").save(tmp_path / f"{text}.png")
        (tmp_path / f"{text}.txt").write_text(text)
    found = read_pictures(tmp_path)
    for _ in cache_images(host, found, tmp_path / "images", affixes=Affixes.of(config)):
        pass
    own = load_images(tmp_path / "images", found.usable)
    batch = draw_guidance_batch(config, state.student, Group.of(samples, samples.cond, own), generator(0, 1))
    seen = set()
    for mine, theirs in zip(batch.cond.context, batch.teacher_cond.context, strict=True):
        for text in ("moss", "rust"):
            bare, full = host.encode_text([text, f"{text}, photo"]).context
            if (mine - bare).abs().max() < 1e-2 and (theirs - full).abs().max() < 1e-2:
                seen.add(text)
                break
        else:
            raise AssertionError("a row has other texts")
    assert seen == {"moss", "rust"}


# --- What is learnt ---


def test_the_target_is_the_guided_teacher_or_outside_of_the_interval_the_plain_one(begun, host):
    state, samples, config = begun(
        batch_size=8, negative_prompt="blurry", guidance_rescale=0.5, guidance_start=0.2, guidance_end=0.7
    )
    uncond = host.encode_text(["blurry"])
    batch = draw_guidance_batch(config, state.student, Group.of(samples, uncond), generator(0, 1))
    with state.student.training():
        step, target = steps.guidance_step(state, batch, uncond, 1.0)
    teacher, schedule = host.denoiser, host.denoiser.schedule
    done = 1 - schedule.timestep(batch.sigma) / 999
    acts = [0.2 <= d < 0.7 for d in done.tolist()]
    assert 2 <= sum(acts) <= 6
    for i, guides in enumerate(acts):
        row = slice(i, i + 1)
        given = batch.x[row], batch.sigma[row], batch.cond.rows(row)
        expected = guided(teacher, *given, uncond, Guidance(3.0, 0.5)) if guides else teacher(*given)
        assert torch.allclose(target[row], expected, atol=1e-4)
    # The student is the teacher yet: its error is what guidance changes, in velocities, and none where there is none.
    student, wanted = (schedule.from_x0("v", batch.x, x0.detach(), batch.sigma) for x0 in (step.output, target))
    error = student - wanted
    assert float(step.losses["guidance"].detach()) == pytest.approx(float(error.square().mean()), rel=1e-3)
    assert error.square().mean((1, 2, 3)).gt(1e-9).tolist() == acts
    assert all(p.grad is None for p in teacher.backbone.parameters())
    assert any(p.grad.abs().sum() > 0 for p in state.student.trained.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 0},
        {"gradient_accumulation": 3},
        {"precision": "bfloat16"},
        {"pixel_backbone": "nowhere", "taps": "none such"},  # of a discriminator, which there is not
        {"distillation": "matching", "distillation_weight": 1.0, "discriminator_updates": 3, "regression_updates": 1},
    ],
)
def test_it_learns_alone_and_leaves_the_teacher(kit, host, begun, changes):
    state, samples, _ = begun(updates=3, **changes)
    before, student = kit.weights(host.denoiser.backbone), kit.weights(state.student.trained)
    events = list(distill(state, samples, host.encode_text([""])))
    assert [set(step.losses) for step in events] == [{"guidance"}] * 3
    assert not state.critics and state.fake_score is None
    assert kit.same(kit.weights(host.denoiser.backbone), before)
    assert not kit.same(kit.weights(state.student.trained), student)
    assert all(0 < step.health.saturation < 2 and step.health.accuracy == 0 for step in events)


def test_its_loss_falls(begun, host):
    state, samples, _ = begun(updates=60, batch_size=16, rank=4, lr=1e-2)
    losses = [step.losses["guidance"] for step in distill(state, samples, host.encode_text([""]))]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_the_estimate_counts_no_discriminator(begun):
    state, samples, _ = begun(rank=4, adversarial_weight=1.0, feature_weight=1.0)
    found = measure_memory(state, samples, (64, 64))
    assert found.trained == 4 * sum(p.numel() * 4 for p in state.student.trained.parameters())
    plain, _, _ = begun(rank=4, guidance_only=False, adversarial_weight=0.0)
    assert found.activations == measure_memory(plain, samples, (64, 64)).activations


def test_before_anything_is_made_the_estimate_says_so_too(kit, host):
    alone, usual = (estimate(host, kit.config(**SETTINGS | more), kit.WORDS) for more in ({}, {"guidance_only": False}))
    assert alone.memory.trained < usual.memory.trained and alone.memory.activations < usual.memory.activations
    assert (alone.pairs, alone.on_disk) == (usual.pairs, usual.on_disk)


# --- A run ---


def test_a_run_makes_a_student_that_is_sampled_as_its_teacher(kit, host, tmp_path):
    config = kit.config(
        **SETTINGS
        | {"negative_prompt": "blurry", "updates": 4, "evaluate_every": 2, "preview_every": 2, "save_every": 1}
    )
    events = kit.go(host, config, tmp_path)
    assert not any(isinstance(e, Warned) for e in events)
    assert [e.update for e in events if isinstance(e, Selected)] == [2, 4]
    assert kit.updates(tmp_path) == [1, 2, 3, 4]
    assert kit.saved(tmp_path)["discriminator"] is None and kit.saved(tmp_path)["discriminator_optimizer"] is None
    card = read_card(events[-1].path)
    assert card.guidance_only and card.method == "guidance distillation"
    assert card.timesteps == (999, 888, 777, 666, 555, 443, 332, 221, 110)
    assert (card.guidance, card.negative_prompt, card.prediction) == (3.0, "blurry", "eps")
    assert set(card.training) == {"updates", "minutes", "pairs", "batch_size", "seed"}


@pytest.mark.parametrize(("name", "sampler"), [("euler", sample_euler), ("dpmpp_2m", sample_dpmpp_2m)])
def test_previews_are_made_as_the_pairs_were(kit, host, tmp_path, name, sampler):
    """Before the first update the student is the teacher without guidance."""
    config = kit.config(**SETTINGS | {"pair_sampler": name, "precision": "float32"})
    first = next(e for e in kit.go(host, config, tmp_path) if isinstance(e, Preview))
    sigmas = trailing_sigmas(host.denoiser.schedule, 9)
    noise = torch.stack(
        [torch.randn(host.latent_shape, generator=torch.Generator().manual_seed(s)) for s in first.seeds]
    )
    model = Guided(host.denoiser, host.encode_text(first.prompts))
    with torch.no_grad():
        expected = sampler(model, noise * sigmas[0], sigmas)
    assert torch.allclose(first.student, expected, rtol=2e-2, atol=2e-2)  # conditions are stored in half precision


class Own:
    """A host's own sampler, which takes two steps."""

    sigmas = torch.tensor([14.6146, 2.0, 0.0])
    recipe: ClassVar = {"sampler": "its own", "steps": "2 of its own"}

    def __init__(self):
        self.seeds = []

    def __call__(self, model, noise, seeds):
        self.seeds.append(seeds)
        return sample_euler(model, noise * self.sigmas[0], self.sigmas)


def test_where_the_host_samples_by_itself_so_are_previews_and_the_choice(kit, host, tmp_path):
    host.sampling = own = Own()
    events = kit.go(host, kit.config(**SETTINGS | {"evaluate_every": 1}), tmp_path)
    first = next(e for e in events if isinstance(e, Preview))
    with torch.no_grad():
        model = Guided(host.denoiser, host.encode_text(first.prompts))
        expected = sample_euler(model, seeded(host, *first.seeds) * own.sigmas[0], own.sigmas)
    assert torch.allclose(first.student, expected, rtol=2e-2, atol=2e-2)
    held = [seeds for seeds in own.seeds if set(seeds) <= set(first.seeds)]
    assert len(held) >= 4  # of the first preview, two choices and the last preview
    assert read_card(events[-1].path).timesteps == (999, 499)


def test_a_run_that_was_closed_goes_on_to_the_same_student(kit, host, tmp_path):
    config = kit.config(**SETTINGS | {"updates": 6, "save_every": 2, "gradient_accumulation": 2})
    whole = kit.go(host, config, tmp_path / "whole")
    with closing(run.run(host, config, tmp_path / "cut", kit.WORDS)) as events:
        for event in events:
            if isinstance(event, Step) and event.update == 3:
                break
    cut = kit.go(host, config, tmp_path / "cut")
    assert [e.update for e in cut if isinstance(e, Step)] == [4, 5, 6]
    assert kit.same(kit.tensors(cut[-1].path), kit.tensors(whole[-1].path))


def test_pairs_are_those_of_any_student(kit, host, tmp_path):
    config = kit.config(**SETTINGS)
    kit.pairs(host, config.replace(guidance_only=False), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    kit.pairs(host, config, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_it_begins_from_the_teacher_or_from_its_like(kit, host, tmp_path):
    few = kit.go(host, kit.config(), tmp_path / "few")[-1].path
    with pytest.raises(
        ConfigError, match=r"few.student.safetensors makes pictures in few steps, and one of guidance_on"
    ):
        start.check(host, kit.config(**SETTINGS | {"init_student": str(few)}))
    alike = kit.go(host, kit.config(**SETTINGS), tmp_path / "alike")[-1].path
    config = kit.config(**SETTINGS | {"init_student": str(alike)})
    samples = kit.pairs(host, config, tmp_path / "pairs")
    state = start.begin(host, config, samples)
    assert state.extra["earlier"]["updates"] == 2 and state.student.guidance_steps == 9
    state.release()
    start.check(host, kit.config(init_student=str(alike)))  # a student of one step may begin so


# --- Sampling ---


@pytest.fixture
def student_file(kit, host, tmp_path):
    return kit.go(host, kit.config(**SETTINGS | {"updates": 3}), tmp_path / "run")[-1].path


@torch.no_grad()
def by_euler(host, student, cond, noise, count):
    sigmas = trailing_sigmas(host.denoiser.schedule, count)
    return sample_euler(Guided(student, cond), noise * sigmas[0], sigmas)


def seeded(host, *seeds):
    draws = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.randn(host.latent_shape, generator=draw) for draw in draws])


@pytest.mark.parametrize(("given", "made"), [(None, 9), (1, 1), (30, 30)])
def test_python_samples_it_by_euler_in_its_own_number_of_steps_or_any_other(host, student_file, given, made):
    student, _, _ = load_student(student_file, host.denoiser)
    pictures = list(sample(host, student, ["fox", "owl"], seed=5, steps=given))
    latents = by_euler(host, student, host.encode_text(["fox", "owl"]), seeded(host, 5, 6), made)
    assert torch.allclose(torch.stack(pictures), host.decode(latents), atol=1e-4)
    arm = student_arm(student, given)
    (measured,) = make_pictures(host, arm, ["fox", "owl"], 0)
    latents = by_euler(host, student, host.encode_text(["fox", "owl"]), seeded(host, 0, 1), made)
    assert torch.allclose(measured, host.decode(latents), atol=1e-4)
    student.release()


def test_a_few_step_student_takes_one_step_by_itself(kit, host, tmp_path):
    path = kit.go(host, kit.config(student_steps=2), tmp_path)[-1].path
    student, _, _ = load_student(path, host.denoiser)
    own, one = (torch.stack(list(sample(host, student, ["fox"], **steps))) for steps in ({}, {"steps": 1}))
    assert torch.equal(own, one)
    student.release()


@pytest.mark.parametrize(("asked", "made"), [(1, 9), (4, 9), (20, 20)])
def test_the_page_makes_its_own_number_of_steps_instead_of_too_few(host, student_file, asked, made):
    generator = Generator(host)
    found = generator.make(student_file, "fox", [3], asked)
    told = [f"student.safetensors is sampled as its base is: in 9 steps, not {asked}."] if asked != made else []
    assert list(found.remarks) == told
    with generator.bare():
        student, _, _ = load_student(student_file, host.denoiser)
    latents = by_euler(host, student, host.encode_text(["fox"]), seeded(host, 3), made)
    assert torch.allclose(found.pictures, host.decode(latents), atol=1e-4)
    student.release()


@pytest.mark.parametrize(("flags", "made"), [([], 9), (["--steps", "12"], 12), (["--steps", "2"], 2)])
def test_the_command_samples_it_as_its_base(kit, pipeline_folder, tmp_path, capsys, flags, made):
    model = load_model(pipeline_folder)
    path = kit.go(model, kit.config(**SETTINGS), tmp_path / "run")[-1].path
    assert cli.main(["info", str(path)]) == 0
    assert "Sampling: as its base, with any sampler, 9 steps or as many as you like at CFG 1" in capsys.readouterr().out
    given = ["sample", "a fox", "--model", str(pipeline_folder), "--student", str(path), "--seed", "5", *flags]
    assert cli.main([*given, "--out", str(tmp_path / "out")]) == 0
    remarks = capsys.readouterr().err
    assert ("steps is 2: student.safetensors was made for 8 steps or more." in remarks) == (made == 2)
    (file,) = (tmp_path / "out").iterdir()
    with Image.open(file) as picture:
        told = picture.text["parameters"]
        found = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    assert f"Steps: {made}, Sampler: Euler, Schedule type: SGM Uniform, CFG scale: 1, Seed: 5" in told
    assert "ADD" not in told
    student, _, _ = load_student(path, model.denoiser)
    (expected,) = sample(model, student, ["a fox"], seed=5, steps=made)
    student.release()
    assert (found - expected).abs().max() < 0.01
