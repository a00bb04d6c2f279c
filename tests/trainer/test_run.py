"""What every front end shares: events in order, the choice of the best student, and what its file says."""

import csv

import pytest
import torch
from PIL import Image
from turbodistill.core.card import CardError, read_card
from turbodistill.core.student import Student, load_student, student_bytes
from turbodistill.generate.sample import sample
from turbodistill.trainer.config import LEAST_LR, ConfigError
from turbodistill.trainer.data.samples import Samples
from turbodistill.trainer.loop.distill import Step, distill
from turbodistill.trainer.loop.start import begin
from turbodistill.trainer.run import run, student_file, training
from turbodistill.trainer.run.events import Control, Finished, PairsMade, Preview, Selected, Warned


def test_events_come_in_order_and_nothing_is_printed(kit, host, tmp_path, capfd):
    settings = kit.config(updates=5, preview_every=2, evaluate_every=3)
    events = kit.go(host, settings, tmp_path)
    assert kit.names(events) == [
        *("PairsMade", "PairsMade", "PairsMade", "Begun", "Preview"),
        *("Step", "Step", "Preview", "Step", "Selected", "Step", "Preview", "Step"),
        *("Selected", "Preview", "Finished"),
    ]
    assert [e.update for e in events[3:-1]] == [0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5]
    assert capfd.readouterr() == ("", "")
    preview = events[4]
    assert preview.student.shape == preview.teacher.shape == (len(preview.prompts), *host.latent_shape)
    assert len(preview.seeds) == len(preview.prompts) and set(preview.seeds) <= set(range(12))
    assert kit.updates(tmp_path) == [1, 2, 3, 4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.csv", "pairs", training.STATE, training.BEST]


def test_the_student_file_says_how_it_was_made(kit, host, tmp_path):
    *_, finished = kit.go(host, kit.config(updates=3, student_steps=2, alpha=1.0), tmp_path)
    card = read_card(finished.path)
    assert card == finished.card and finished.score is None
    assert (card.kind, card.rank, card.alpha, card.base_hash) == ("lora", 2, 1.0, host.base_hash)
    assert card.timesteps == (999, 499) and card.training["updates"] == 3
    student, _, warning = load_student(finished.path, host.denoiser)
    assert warning == "" and student.generate(torch.randn(1, 4, 8, 8), host.encode_text(["a"])).isfinite().all()


def test_a_low_start_gives_a_schedule_as_long_as_it_can_be(kit, host, tmp_path):
    *_, finished = kit.go(host, kit.config(start_timestep=1, student_steps=2), tmp_path)
    assert finished.card.timesteps == (1, 0)


def test_the_best_student_is_the_one_with_the_lowest_score(kit, host, tmp_path):
    told = iter([3.0, 1.0, 2.0])
    kept = []

    def score(student, teacher):
        assert student.shape == teacher.shape
        return next(told)

    settings = kit.config(updates=6, evaluate_every=2)
    for event in run.run(host, settings, tmp_path, kit.WORDS, score=score):
        if isinstance(event, Selected):
            kept.append((event.update, event.best, kit.tensors(tmp_path / training.BEST)))
    assert [(u, b) for u, b, _ in kept] == [(2, True), (4, True), (6, False)]
    assert not kit.same(kept[0][2], kept[1][2]) and kit.same(kept[1][2], kept[2][2])
    assert event.score == 1.0 and event.card.training["updates"] == 4
    assert event.card.metrics == {"score on held-out prompts": 1.0}


def test_without_selection_the_last_student_is_kept(kit, host, tmp_path):
    *_, finished = kit.go(host, kit.config(updates=3, evaluate_every=0), tmp_path)
    assert finished.score is None and finished.card.training["updates"] == 3


def test_the_student_acts_with_its_average_within_and_as_before_after(kit, host, tmp_path):
    settings = kit.config(updates=3, ema_decay=0.9)
    samples = kit.pairs(host, settings, tmp_path)
    state = kit.state(host, settings, samples)
    list(distill(state, samples, host.encode_text([""])))
    live, slow = kit.weights(state.student.trained), kit.weights(state.average)
    assert not kit.same(live, slow)
    with pytest.raises(KeyError), state.averaged():
        assert kit.same(kit.weights(state.student.trained), slow)
        raise KeyError
    assert kit.same(kit.weights(state.student.trained), live)
    state.student.release()


@pytest.mark.parametrize(
    "prompts", [[f"p{i % 40}" for i in range(100)], list("abcdefghijklmnopqrst"), ["a", "b"] * 15, ["a"] * 8]
)
def test_no_held_out_pair_is_trained_on(prompts):
    samples = Samples(torch.zeros(len(prompts), 1), None, prompts)
    train, held = run.split(samples)
    assert len(train) and len(held) >= 4  # fewer cannot be scored
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(prompts)))
    if len(set(prompts)) >= 20:
        assert not {prompts[i] for i in train} & {prompts[i] for i in held}


@pytest.mark.parametrize("count", [4, 7])
def test_of_very_few_pairs_all_are_trained_on_and_scored(kit, host, tmp_path, count):
    settings = kit.config(pairs=count, evaluate_every=1)
    assert isinstance(kit.go(host, settings, tmp_path)[-1].score, float)


def test_pairs_can_be_shared_between_runs(kit, host, tmp_path):
    kit.go(host, kit.config(), tmp_path / "a", pairs_folder=tmp_path / "pairs")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pairs").iterdir()}
    kit.go(host, kit.config(adversarial_weight=0.0), tmp_path / "b", pairs_folder=tmp_path / "pairs")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pairs").iterdir()} == before
    assert not (tmp_path / "b" / "pairs").exists()


def test_real_pictures_are_encoded_and_trained_with(kit, host, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((40, 40), 60).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("noise")
    events = kit.go(host, kit.config(positives="both"), tmp_path / "out", images=folder)
    assert [(e.what, e.done, e.total) for e in events if isinstance(e, PairsMade)] == [
        *(("teacher pairs", done, 12) for done in (4, 8, 12)),
        ("pictures", 3, 3),
    ]
    assert isinstance(events[-1], Finished)


def test_other_pictures_of_ones_own_do_not_go_on_with_a_training(kit, host, tmp_path):
    def folder(name, *captions):
        made = tmp_path / name
        made.mkdir()
        for i, caption in enumerate(captions):
            Image.new("RGB", (40, 40), "red").save(made / f"{i}.png")
            (made / f"{i}.txt").write_text(caption)
        return made

    settings, out = kit.config(positives="both"), tmp_path / "out"
    kit.go(host, settings, out, images=folder("first", "fox", "owl"))
    kit.go(host, settings, out, images=folder("moved", "fox", "owl"))
    before = {path: path.read_bytes() for path in (out / "images").iterdir()}
    for other, told in (
        (folder("captions", "fox", "cat"), r"other pictures or captions\)"),
        (folder("more", "fox", "owl", "cat"), r"other pictures or captions and their number was 2 and is 3\)"),
    ):
        with pytest.raises(ConfigError, match=rf"holds a training with other pictures of your own \({told}: change"):
            kit.go(host, settings, out, images=other)
    assert {path: path.read_bytes() for path in (out / "images").iterdir()} == before


def test_the_history_gains_the_columns_of_losses_that_come_later(kit, host, tmp_path):
    kit.go(host, kit.config(updates=4, regression_updates=2), tmp_path)
    with (tmp_path / training.HISTORY).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["adversarial"] == "" and float(rows[3]["adversarial"])
    assert {"update", "seconds", "accuracy", "regression", "discriminator", "r1"} <= set(rows[0])


def test_a_run_out_of_health_warns_in_words(kit, host, tmp_path):
    events = kit.go(host, kit.config(updates=100, adversarial_weight=0.0, lr=LEAST_LR), tmp_path)
    warned = [e for e in events if isinstance(e, Warned)]
    assert warned and all(e.update == 100 and "healthy" in e.text for e in warned)


@pytest.mark.parametrize("changes", [{}, {"rank": 0}, {"prediction": "x0"}], ids=["lora", "full", "x0"])
def test_a_student_file_gives_the_same_pictures(kit, host, tmp_path, changes):
    settings = kit.config(updates=3, **changes)
    samples = kit.pairs(host, settings, tmp_path)
    state = kit.state(host, settings, samples)
    list(distill(state, samples, host.encode_text([""])))
    card = student_file.make_card(host, state, {})
    path = tmp_path / "student.safetensors"
    path.write_bytes(student_bytes(state.student, card, torch.float32))
    again, told, warning = load_student(path, host.denoiser)
    noise, cond = torch.randn(3, 4, 8, 8), host.encode_text(["a", "b", "c"])
    for steps in (1, 3):
        ours, theirs = (s.generate(noise, cond, steps) for s in (state.student, again))
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert told == card and warning == "" and told.kind == ("full" if "rank" in changes else "lora")
    # Over another model it is told, not refused: fine-tunes of one base take each other's students.
    other = kit.conv_host(seed=1)
    assert "the loaded model is another" in load_student(path, other.denoiser)[2]
    state.student.release()
    again.release()


def test_a_student_of_another_architecture_is_refused_and_leaves_no_hook(kit, host, tmp_path):
    *_, finished = kit.go(host, kit.config(), tmp_path)
    unet = kit.unet_host().denoiser
    with pytest.raises(CardError, match=r"student\.safetensors does not fit this model"):
        load_student(finished.path, unet)
    assert not any(m._forward_hooks for m in unet.backbone.modules())
    unet.prediction = "v"
    with pytest.raises(CardError, match="predicts eps, the loaded one predicts v: load toy, its base"):
        load_student(finished.path, unet)


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "LADD"),
        ({"adversarial_weight": 0.0}, "regression to the teacher's pictures"),
        ({"distillation_weight": 1.0}, "LADD, ADD's distillation"),
        ({"distillation_weight": 1.0, "distillation": "matching"}, "LADD, distribution matching"),
        ({"distillation_weight": 1.0, "distillation": "nfsd", "adversarial_weight": 0.0}, "NFSD"),
    ],
)
def test_the_card_says_by_what_it_was_made(kit, host, tmp_path, changes, method):
    *_, finished = kit.go(host, kit.config(updates=1, **changes), tmp_path)
    assert finished.card.method == method


def test_a_student_on_another_model_is_not_sampled_with_this_one(kit, host):
    for rank in (0, 2):
        student = Student(host.denoiser, rank)
        assert next(sample(host, student, ["a fox"])).shape == (3, 32, 32)
        with pytest.raises(ValueError, match=r"on another model than toy.*load_student"):
            next(sample(kit.conv_host(1), student, ["a fox"]))


def test_the_card_names_no_loss_that_was_not_used(kit, host, tmp_path):
    unused = {"adversarial_weight": 0.0, "distillation_weight": 0.0}
    *_, plain = kit.go(host, kit.config(updates=1, **unused), tmp_path / "plain")
    assert plain.card.training["distillation_weight"] == plain.card.training["adversarial_weight"] == 0
    assert not {"distillation", "adversarial", "positives"} & set(plain.card.training)
    assert "exponential" not in plain.card.in_words() and "hinge" not in plain.card.in_words()
    *_, used = kit.go(host, kit.config(updates=1, distillation_weight=2.5), tmp_path / "used")
    assert {"distillation": "exponential", "adversarial": "hinge"}.items() <= used.card.training.items()


@pytest.mark.parametrize(("prediction", "told"), [("inherit", "eps"), ("x0", "x0")])
def test_the_card_s_prediction_is_the_student_s_own(kit, host, tmp_path, prediction, told):
    *_, finished = kit.go(host, kit.config(updates=1, prediction=prediction), tmp_path)
    student, card, _ = load_student(finished.path, host.denoiser)
    student.release()
    assert student.prediction == card.prediction == told and card.base_prediction == "eps"


def test_the_card_counts_the_updates_and_minutes_of_every_stage(kit, host, tmp_path):
    def train(name, updates, spent, **changes):
        settings = kit.config(updates=updates, **changes)
        samples = kit.pairs(host, settings, tmp_path / name)
        state = begin(host, settings, samples)
        state.update, state.spent = updates, spent
        path = tmp_path / f"{name}.safetensors"
        student_file.write_student(host, state, path, {})
        saved = state.state_dict()
        state.release()
        return path, saved

    first, _ = train("first", 100, 600.0)
    second, saved = train("second", 20, 90.0, init_student=str(first))
    third, _ = train("third", 3, 30.0, init_student=str(second))
    told = [read_card(path).training for path in (first, second, third)]
    assert [(t["updates"], t["minutes"]) for t in told] == [(100, 10.0), (120, 11.5), (123, 12.0)]
    # A run that goes on knows it from its state: the first stage's file may have gone.
    assert saved["extra"]["earlier"] == {"updates": 100, "minutes": 10.0}


def test_a_preview_can_be_asked_for(kit, host, tmp_path):
    control, made = Control(), []
    for event in run.run(host, kit.config(updates=5), tmp_path, kit.WORDS, control=control):
        if isinstance(event, Step) and event.update == 2:
            control.preview = True
        if isinstance(event, Preview):
            made.append(event.update)
    assert made == [0, 2, 5] and not control.preview


def test_the_last_preview_is_of_the_student_that_is_kept(kit, host, tmp_path):
    scores = iter([1.0, 2.0])
    settings = kit.config(updates=4, evaluate_every=2, preview_every=2)
    events = kit.go(host, settings, tmp_path, score=lambda s, t: next(scores))
    at_two, at_four, last = [e for e in events if isinstance(e, Preview)][1:]
    assert events[-1].card.training["updates"] == 2
    assert torch.allclose(last.student, at_two.student, atol=1e-2)  # the file is in half precision
    assert not torch.allclose(last.student, at_four.student, atol=1e-2)


def test_pictures_take_no_second_copy_of_the_weights(kit, host, tmp_path):
    """A model that just fits in memory still fits while previews, scores and samples are made."""
    weights = dict(host.denoiser.backbone.named_parameters())
    own, seen = {p.data_ptr() for p in weights.values()}, set()
    hook = host.denoiser.backbone.register_forward_pre_hook(
        lambda *_: seen.update(p.data_ptr() for p in weights.values())
    )
    *_, finished = kit.go(host, kit.config(updates=2, preview_every=1, evaluate_every=1), tmp_path)
    student, _, _ = load_student(finished.path, host.denoiser)
    assert len(list(sample(host, student, kit.WORDS))) == len(kit.WORDS)
    student.release()
    hook.remove()
    assert seen == own
