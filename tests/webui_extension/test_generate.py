"""Pictures as one types: the student's own, the latest prompt wins, and the weights come back."""

import html
import re
import threading

import pytest
import torch
from turbodistill.core.card import CardError
from turbodistill.core.sampling import seeded_noise
from turbodistill.core.student import load_student
from turbodistill.generate import generator as generator_module
from turbodistill.page import job
from turbodistill.page.request import Request
from turbodistill.trainer.data.prompts import drawn

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'turbodistill[ui]'")
from turbodistill.page import generate  # noqa: E402 - it needs gradio

pytestmark = pytest.mark.gradio


@pytest.fixture(scope="module")
def students(toy, tmp_path_factory):
    """Two students of the toy, by name."""
    folder = tmp_path_factory.mktemp("students")
    backend = toy.ToyBackend(folder)
    for seed, name in enumerate(("first", "second")):
        settings = toy.QUICK | {"seed": seed, "lr": 0.05}
        begun = job.Job(backend, Request(name=name, prompts=toy.PROMPTS, settings=settings))
        begun.begin()
        begun.wait(60)
        assert begun.snapshot()["state"] == "done"
    return {path.stem: path for path in backend.told}


@pytest.fixture
def made(toy, tmp_path):
    """A toy backend with a generator on its model."""
    backend = toy.ToyBackend(tmp_path)
    return backend, generator_module.Generator(backend.host)


def show(generator, students, prompt="fox", count=2, steps=1, seed=3, student="first"):
    return generate.pictures(generator, students, prompt, count, steps, seed, student)


def urls(html):
    return re.findall(r'src="([^"]+)"', html)


def test_pictures_are_those_of_the_student(toy, made, students):
    backend, generator = made
    pace, html = show(generator, students, steps=2.0)
    student, *_ = load_student(students["first"], toy.kit.conv_host().denoiser)
    noise = seeded_noise([3, 4], backend.host.latent_shape)
    with student.merged():
        latents = student.generate(noise, backend.host.encode_text(["fox", "fox"]), 2)
    for url, picture in zip(urls(html), backend.host.decode(latents), strict=True):
        assert (toy.pixels(url).int() - (picture * 255).round().int()).abs().max() <= 1
    told = re.search(r"<b>([\d.]+) ms</b> a picture, <b>(\d+)</b> pictures a second \(2 pictures in (\d+) ms", pace)
    each, rate, whole = map(float, told.groups())
    assert each * 2 == pytest.approx(whole, abs=0.6) and rate == pytest.approx(1000 / each, rel=0.1, abs=0.6)


def test_what_does_not_fit_is_told_beside_the_pictures(toy, made, students, tmp_path):
    _, generator = made
    assert "turbodistill-box" not in show(generator, students)[0]
    pace, html = show(generator, students, steps=4)
    assert "steps is 4: first.safetensors was made for 1 step." in pace and len(urls(html)) == 2
    other = generator_module.Generator(toy.kit.conv_host(seed=1))
    pace, html = show(other, students)
    assert "the loaded model is another" in pace and len(urls(html)) == 2


def test_each_input_counts(made, students):
    _, generator = made
    first = urls(show(generator, students)[1])
    assert len(set(first)) == 2 and urls(show(generator, students)[1]) == first
    assert urls(show(generator, students, seed=4)[1])[0] == first[1]  # a picture is its seed's
    for changed in ({"prompt": "owl"}, {"steps": 2}, {"student": "second"}, {"count": 3}):
        assert urls(show(generator, students, **changed)[1]) != first
    assert urls(show(generator, students)[1]) == first


def test_the_model_s_own_weights_come_back(toy, made, students):
    backend, generator = made
    show(generator, students)
    backbone = backend.host.denoiser.backbone
    assert not toy.kit.same(toy.kit.weights(backbone), backend.before[1])  # folded, so that a pass costs no more
    hooks = [len(m._forward_hooks) for m in backbone.modules()]
    assert sum(hooks) > 0
    with generator.bare() as host:
        assert host is backend.host and toy.kit.same(toy.kit.weights(backbone), backend.before[1])
        assert not any(m._forward_hooks for m in backbone.modules())


def test_of_prompts_that_wait_the_latest_wins(made, students):
    backend, generator = made
    show(generator, students)
    backend.gate.clear()
    backend.entered.clear()
    answers = {}

    def ask(prompt):
        answers[prompt] = generator.make(students["first"], prompt, [0], 1)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in ("a", "an", "an o", "an owl")]
    threads[0].start()
    assert backend.entered.wait(60)
    before = generator._latest
    for k, thread in enumerate(threads[1:], 1):
        thread.start()
        while generator._latest != before + k:
            pass
    backend.gate.set()
    for thread in threads:
        thread.join()
    assert [prompt for prompt, made in answers.items() if made] in (["a", "an owl"], ["an owl", "a"])
    answers = generate.pictures(generator, students, "owl", 1, 1, 0, "first")
    assert len(urls(answers[1])) == 1


def test_a_prompt_that_was_overtaken_changes_nothing_on_the_page(made, students, monkeypatch):
    _, generator = made
    monkeypatch.setattr(generator, "make", lambda *_: None)
    assert show(generator, students) == [gradio.update(), gradio.update()]


def test_while_a_distillation_runs_that_is_said(toy, backend, made, students):
    _, generator = made
    backend.gate.clear()
    job.start(backend, Request(prompts=toy.PROMPTS, settings=toy.QUICK))
    pace, html = show(generator, students)
    assert "generation waits until it has ended" in pace and html == ""  # no pictures of another prompt


def test_a_model_that_is_in_use_is_not_waited_for_long(made, students, monkeypatch):
    _, generator = made
    monkeypatch.setattr(generator_module, "PATIENCE", 0.05)
    with generator.bare():
        assert "the model is in use" in show(generator, students)[0]
    assert len(urls(show(generator, students)[1])) == 2


def test_what_is_no_student_is_told(made, students, tmp_path):
    _, generator = made
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no student")
    with pytest.raises(CardError):
        generator.make(broken, "fox", [0], 1)
    assert "broken.safetensors" in show(generator, students | {"broken": broken}, student="broken")[0]
    assert "no student is chosen" in show(generator, students, student=None)[0]
    assert len(urls(show(generator, students)[1])) == 2


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ({"count": 99}, "pictures is 99: give 1 to 16"),
        ({"count": 2.5}, "pictures is 2.5: give a whole number"),
        ({"count": None}, "pictures is empty: give a whole number"),
        ({"steps": 5}, "steps is 5: give 1 to 4"),
        ({"seed": -1}, "seed is -1: give 0 to "),
        ({"seed": 2**63 - 1}, "seed is 9223372036854775807: of 2 pictures the last would have one above"),
        ({"seed": 0.5}, "seed is 0.5: give a whole number"),
        ({"prompt": "a {red fox"}, "has a brace without its other one"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_the_page(made, students, typed, told):
    said, shown = show(made[1], students, **typed)
    assert told in html.unescape(said) and shown == ""


@pytest.mark.parametrize("typed", [{"count": 2.5}, {"prompt": "a {red fox"}], ids=["number", "prompt"])
def test_pictures_of_what_was_typed_before_do_not_take_the_place_of_what_is_told(made, students, typed):
    backend, generator = made
    show(generator, students)
    backend.gate.clear()
    backend.entered.clear()
    came = []
    before = threading.Thread(target=lambda: came.extend(show(generator, students, prompt="owl")))
    before.start()
    assert backend.entered.wait(60)
    assert "turbodistill-box bad" in show(generator, students, **typed)[0]
    backend.gate.set()
    before.join()
    assert came == [gradio.update(), gradio.update()]
    assert len(urls(show(generator, students)[1])) == 2


def test_the_largest_seed_of_the_command_line_is_the_page_s(made, students):
    assert len(urls(show(made[1], students, seed=2**63 - 1, count=1)[1])) == 1


def test_of_choices_each_picture_draws_one_by_its_seed(made, students):
    _, generator = made
    several = urls(show(generator, students, prompt="{fox|owl}", count=8, seed=0)[1])
    alone = {word: urls(show(generator, students, prompt=word, count=8, seed=0)[1]) for word in ("fox", "owl")}
    words = [next(word for word in alone if alone[word][k] == url) for k, url in enumerate(several)]
    assert set(words) == {"fox", "owl"} and words == drawn(["{fox|owl}"] * 8, range(8))


def test_the_page_follows_a_distillation_to_its_new_student(toy, backend, made, students):
    _, generator = made
    inputs = ("fox", 2, 1, 3, "first")
    known = {"first": students["first"]}
    before, *_ = generate.follow(generator, known, {"students": ["first"], "job": None}, *inputs)
    now, _, *shown = generate.follow(generator, known, before, *inputs)
    assert now == before and shown == [gradio.update()] * 3
    backend.gate.clear()
    job.start(backend, Request(prompts=toy.PROMPTS, settings=toy.QUICK))
    now, _, listed, pace, _ = generate.follow(generator, known, now, *inputs)
    assert listed == gradio.update() and "A distillation runs" in pace
    job.current().cancel()
    backend.gate.set()
    job.current().wait(60)
    now, _, listed, _, html = generate.follow(generator, known, now, *inputs)
    assert listed == gradio.update() and len(urls(html)) == 2  # it was cancelled: the same student draws again
    _, _, _, _, html = generate.follow(generator, known, before, *inputs)
    assert len(urls(html)) == 2  # so it does where nobody looked while that ran
    _, _, listed, *drawn = generate.follow(generator, {"second": students["second"], **known}, now, *inputs)
    assert (listed["choices"], listed["value"]) == (["second", "first"], "second") and drawn == [gradio.update()] * 2


def test_nothing_is_typed(made, students):
    _, generator = made
    assert len(urls(show(generator, students, prompt=None, seed=None)[1])) == 2


def test_the_page_has_its_inputs(made, students):
    _, generator = made
    with gradio.Blocks(analytics_enabled=False) as blocks:
        generate.add_components(generator, lambda: students, "a fox", blocks)
    made = {getattr(c, "elem_id", None): c for c in blocks.blocks.values()}
    assert {f"turbodistill-{name}" for name in ("prompt", "count", "steps", "seed", "student")} <= made.keys()
    assert made["turbodistill-student"].value == "first"
    # Numbers come as they were typed: gradio's own answers have no words.
    for name, typed in (("count", 99), ("count", 2.5), ("steps", 0), ("seed", -1), ("seed", 0.5)):
        assert made[f"turbodistill-{name}"].preprocess(typed) == typed
    assert torch.is_grad_enabled()
