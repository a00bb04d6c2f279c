"""Measuring a student against its teacher, and the report that shows it."""

import base64
import json
import re
import zipfile

import pytest
import torch
from PIL import Image
from turbodistill.app import demo
from turbodistill.app.interrupt import interruptible
from turbodistill.core.denoiser import Guidance
from turbodistill.core.sampling import sample_euler, seeded_noise, trailing_sigmas
from turbodistill.core.student import Student
from turbodistill.measure import bench, evaluate, report
from turbodistill.measure.evaluate import Evaluator, Floor, Score, Timing, load_reference
from turbodistill.measure.metrics import Interval
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.pictures import read_pictures
from turbodistill.trainer.run import training

PROMPTS = [f"thing {i}" for i in range(40)]


@pytest.fixture(scope="module")
def reference(reference_zip):
    return evaluate.load_reference(reference_zip)


@pytest.fixture(scope="module")
def judge(reference):
    pytest.importorskip("efficientnet_lite_pytorch", reason="the feature network is in the extra 'demo'")
    return Evaluator(reference)


def test_a_reference_set_is_read_and_split(reference):
    assert reference.images.shape == (24, 3, 32, 32) and 0.9 < reference.images.max() <= 1
    assert len(reference.split("train").captions) == 16
    assert torch.equal(reference.split("heldout").images, reference.images[16:])
    part = reference.take([17, 2])
    assert part.captions == ["thing 17, rough", "thing 2, flat"] and part.splits == ["heldout", "train"]
    assert torch.equal(part.images[1], reference.images[2])


def test_a_broken_reference_set_is_told(tmp_path):
    path = tmp_path / "set.zip"
    with pytest.raises(DataError, match=r"set\.zip does not exist: check the name"):
        evaluate.load_reference(path)
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"set\.zip cannot be read"):
        evaluate.load_reference(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.jsonl", '{"file_name": "missing.png"}')
    with pytest.raises(DataError, match=r"set.zip cannot be read .*missing.png"):
        evaluate.load_reference(path)


def test_picture_k_is_made_from_its_own_seed(host):
    arm = evaluate.teacher_arm(host, 3, Guidance(2.0))
    batches = list(evaluate.make_pictures(host, arm, PROMPTS, seed=4))
    assert [len(b) for b in batches] == [32, 8]
    noise = seeded_noise([400_035], host.latent_shape)
    sigmas = trailing_sigmas(host.denoiser.schedule, 3)
    uncond = host.encode_text([""])

    def model(x, sigma):
        with torch.no_grad():
            a, b = (host.denoiser(x, sigma, c) for c in (uncond, host.encode_text(["thing 35"])))
        return a + 2.0 * (b - a)

    expected = host.decode(sample_euler(model, noise * sigmas[0], sigmas))
    assert torch.allclose(batches[1][3:4], expected, atol=1e-4)


def test_the_arms_passes_are_counted_as_rows(host):
    student = Student(host.denoiser, 2)
    arms = {
        6: evaluate.teacher_arm(host, 3, Guidance(2.0)),  # guidance takes two rows a step
        3: evaluate.teacher_arm(host, 3, Guidance()),
        1: evaluate.student_arm(student),
        2: evaluate.student_arm(student, 2),
    }
    for passes, arm in arms.items():
        timing = evaluate.measure_time(host, arm, "a fox", repeats=2)
        assert timing.passes == passes and timing.seconds > 0
    student.release()
    assert not any(m._forward_pre_hooks for m in host.denoiser.backbone.modules())


def test_real_pictures_score_best_and_noise_worst(judge, reference):
    alike = reference.images[:8].reshape(2, 4, 3, 32, 32)
    held = reference.split("heldout")
    real = judge.score(held.images, held.styles, alike, held.images, alike)
    noise = judge.score(torch.rand(8, 3, 32, 32), held.styles, alike * 0.05 + 0.5, held.images, alike)
    assert real.kid.value < 0 < noise.kid.value and real.fd == pytest.approx(0, abs=0.1) and noise.fd > 1
    assert (real.precision, real.recall, real.diversity) == (1.0, 1.0, 1.0)
    assert real.style == judge.floor().style > noise.style
    assert noise.precision < 0.5 and noise.diversity < 1
    assert real.sharpness == pytest.approx(1.0) and noise.sharpness > 1 and real.to_teacher == 0 < noise.to_teacher


def test_the_score_for_choosing_is_lower_for_what_is_nearer(judge, host, reference):
    score = judge.kid_score(host)
    real = host.encode_images(reference.images)
    assert score(real, real) < score(torch.randn_like(real), real)


def test_the_floor_is_what_real_pictures_score(judge):
    floor = judge.floor()
    assert floor.kid.low <= floor.kid.value <= floor.kid.high and floor.style > 0.8


def test_pictures_that_are_none_are_told_and_not_scored(host, reference_zip):
    broken = evaluate.Arm(lambda noise, cond: noise * float("nan"))
    with pytest.raises(DataError, match="student, seed 1: its pictures are no pictures, their numbers are NaN"):
        bench.Bench(host, reference_zip, 8).pictures(broken, ["a fox"], 1, "student, seed 1")


def test_choosing_and_scoring_see_different_pictures(host, reference, judge):
    """The best student is chosen by the training pictures; what is reported is measured on the held-out ones."""
    torch.manual_seed(0)
    swapped = evaluate.Reference(
        torch.cat([reference.images[:16], torch.rand(8, 3, 32, 32)]),
        reference.captions,
        reference.styles,
        reference.splits,
    )
    other = Evaluator(swapped)
    latents = host.encode_images(reference.images[:8])
    chosen = [j.kid_score(host)(latents, latents) for j in (judge, other)]
    assert chosen[1] == pytest.approx(chosen[0], rel=1e-4)
    alike = reference.images[:8].reshape(2, 4, 3, 32, 32)
    pictures, styles = reference.images[:8], reference.styles[:8]
    scores = [j.score(pictures, styles, alike, pictures, alike).kid.value for j in (judge, other)]
    assert scores[1] > scores[0]


def test_a_reference_set_without_held_out_pictures_is_told(tmp_path, reference_zip):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(reference_zip) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content.replace(b"heldout", b"train") if name == "metadata.jsonl" else content)
    with pytest.raises(DataError, match="0 pictures of split 'heldout'"):
        evaluate.load_reference(path)


def test_a_merged_student_is_timed_and_the_teacher_comes_back(host, kit):
    student = Student(host.denoiser, 2)
    torch.nn.init.normal_(student.lora.branches[0].up)
    before = [p.clone() for p in host.denoiser.backbone.parameters()]
    plain = student.generate(seeded_noise([0], host.latent_shape), host.encode_text(["a"]))
    arm = evaluate.student_arm(student)
    with arm.ready():
        merged = arm.make(seeded_noise([0], host.latent_shape), host.encode_text(["a"]))
        changed = [not torch.equal(a, b) for a, b in zip(before, host.denoiser.backbone.parameters(), strict=True)]
    assert any(changed) and torch.allclose(plain, merged, atol=1e-4)
    student.release()
    assert all(torch.equal(a, b) for a, b in zip(before, host.denoiser.backbone.parameters(), strict=True))


FLOOR = Floor(Interval(0.1, 0.0, 0.2), 0.9)
SCORE = Score(Interval(1.5, 1.0, 2.0), 30.0, 0.9, 0.8, 0.95, 1.1, 0.7, 3.0)


def test_the_table_and_json_hold_every_arm():
    text = evaluate.table({"teacher": SCORE, "student": SCORE}, FLOOR)
    lines = text.splitlines()
    assert len(lines) == 4 and lines[1].startswith("teacher ") and "1.5 [1.0, 2.0]" in lines[2]
    told = json.loads(evaluate.to_json({"a": SCORE}, FLOOR, {"a": Timing(0.5, 1)}))
    assert told["scores"]["a"]["kid"]["value"] == 1.5 and told["timings"]["a"] == {"seconds": 0.5, "passes": 1}


def test_the_grid_shows_each_picture_in_its_place():
    red, blue = torch.zeros(3, 16, 16), torch.zeros(3, 16, 16)
    red[0], blue[2] = 1, 1
    sheet = report.grid([report.Column("a", "1", [red, blue]), report.Column("b", "2", [blue, red])], ["one", "two"])
    assert sheet.size == (210 + 2 * 44, 54 + 2 * 44)
    middles = [[sheet.getpixel((210 + 16 + 44 * k, 54 + 16 + 44 * row)) for k in range(2)] for row in range(2)]
    assert middles == [[(255, 0, 0), (0, 0, 255)], [(0, 0, 255), (255, 0, 0)]]


def test_long_prompts_are_wrapped():
    assert report._wrap("a red fox in the snow", 10) == ["a red fox", "in the", "snow"]


def test_the_report_is_one_page_that_needs_nothing_else(kit, host, tmp_path):
    pytest.importorskip("matplotlib", reason="the curves are drawn by matplotlib")
    *_, finished = kit.go(host, kit.config(updates=5, regression_updates=2), tmp_path)
    columns = [report.Column(name, "", [torch.rand(3, 32, 32)] * 2) for name in ("teacher", "student")]
    page = report.Report(
        "A <title>",
        columns,
        ["one & two", "three"],
        {"teacher": SCORE, "student": SCORE},
        FLOOR,
        {"teacher": Timing(2.0, 100), "student": Timing(0.05, 1)},
        finished.card,
        tmp_path / training.HISTORY,
        "student",
        "teacher",
    )
    path = report.write(page, tmp_path / "report")
    text = path.read_text()
    assert "A &lt;title&gt;" in text and "<title>A <" not in text
    assert "<b>40x</b>faster than teacher" in text and "<b>1 : 100</b>" in text
    assert "One-step student of toy" in text and "<svg" in text and "adversarial" in text
    # Nothing is loaded from elsewhere: every source is inside, and namespaces are the only addresses.
    assert all(s.startswith("data:") for s in re.findall(r'(?:src|href)="([^"#][^"]*)"', text))
    inside = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", text)[1])
    assert inside == (path.parent / "grid.png").read_bytes()
    with Image.open(path.parent / "grid.png") as picture:
        picture.load()


def test_a_slow_machine_trains_for_less_time_so_that_the_demonstration_ends_in_time():
    fast, slow, slower = (demo.training_minutes(400 * pace, pace, 160) for pace in (0.1, 0.8, 8.0))
    assert fast == demo.LONGEST > slow > slower == demo.SHORTEST
    # What is before, the training itself, and the teacher's pictures, which are most of what comes after.
    assert 0.8 * demo.WHOLE < 400 * 0.8 / 60 + slow + 160 * 0.8 / 60 < demo.WHOLE


@pytest.mark.slow
def test_the_demonstration_ends_with_a_report(kit, host, reference_zip, tmp_path, monkeypatch, capsys):
    """On a toy in the embedded model's place."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="the feature network is in the extra 'demo'")
    settings = tmp_path / "settings.toml"
    settings.write_text(
        "rank = 2\npairs = 16\npair_steps = 2\nbatch_size = 4\nregression_updates = 2\nhead_channels = 8\n"
        "evaluate_every = 0\npreview_every = 0\n"
        'positives = "real"\n'
    )
    monkeypatch.setattr(demo, "load_model", lambda *args: host)
    monkeypatch.setattr(demo, "SETTINGS", settings)
    monkeypatch.setattr(demo, "REFERENCE", reference_zip)
    monkeypatch.setattr(demo, "SHIPPED", tmp_path / "none.safetensors")
    monkeypatch.setattr(bench, "ALIKE_PROMPTS", 2)
    monkeypatch.setattr(demo, "LONGEST", 0.01)
    followed = []

    def follow(events, config, folder, shown):
        followed.append((folder.name, config.adversarial_weight, config.minutes))
        *_, finished = events
        return finished

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, trainings are commands of their own
    try:
        page = demo.demo(tmp_path / "out", None, 16, 0, follow, interruptible)
    finally:
        torch.set_num_threads(threads)
    assert followed[0][0] == "student" and followed[0][1] > 0 and followed[1][:2] == ("regression", 0.0)
    assert [minutes for _, _, minutes in followed] == [0.01, 0.01]
    text = page.read_text()
    assert "teacher, 50 steps" in text and "student, 1 step" in text and "regression only" in text
    # The discriminator's real pictures are those that nothing is measured against.
    reals = load_reference(reference_zip).split("train").captions
    assert [each.text for each in read_pictures(tmp_path / "out" / demo.PICTURES).pictures] == reals
    shown = bench.Bench(host, reference_zip, 16).shown
    assert [caption in reals for caption in shown] == [True] * 4 + [False] * 4
    encoded = {name: (tmp_path / "out" / name / "images").exists() for name in ("student", "regression")}
    assert encoded == {"student": True, "regression": False}
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["timings"]["teacher, 50 steps"]["passes"] == 100
    assert figures["timings"]["student, 1 step"]["passes"] == 1
    assert "regression only" in capsys.readouterr().out
    assert not any(m._forward_hooks for m in host.denoiser.backbone.modules())
    assert demo.UNGUIDED not in figures["scores"]  # it costs as much as all else that is measured
