"""A run's snapshot in words, bars, curves and pictures."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from turbodistill.page import curves, view
from turbodistill.trainer.config import Config
from turbodistill.trainer.loop.distill import Step
from turbodistill.trainer.loop.health import Health
from turbodistill.trainer.run.events import Begun, Preview, Selected, Warned
from turbodistill.trainer.run.memory import Memory
from turbodistill.trainer.run.monitor import Monitor

AROUND = {"checkpoint": "a<b.safetensors", "width": 64, "height": 64, "result": "", "cancelling": False}


def watch(kind="distill", **settings):
    return Monitor(
        kind, "my-turbo", Config(**settings), lambda latents: [f"data:image/png;{x.mean():.0f}" for x in latents]
    )


def told(seen, **changes):
    return seen.snapshot() | AROUND | changes


def step(update, losses=None, **health):
    measures = {"accuracy": 0.7, "logit_gap": 1.0, "saturation": 1.0, "sharpness": 1.0, "diversity": 1.0} | health
    return Step(update, losses or {"regression": 0.5}, Health(**measures), 2.0, 2.0 * update)


def trained(updates=3, **settings):
    seen = watch(updates=10, **settings)
    seen.follow(Begun(0, Memory(1, 1, 1)), 0.0)
    for update in range(1, updates + 1):
        seen.follow(step(update), 2.0)
    return seen


def latents(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)


def pictured(*updates):
    seen = trained()
    for update in updates:
        seen.follow(Preview(update, latents(1, 2), latents(8, 9), ["a fox", 'an "owl"'], [5, 6]), 0.0)
    return seen


# --- words ---


def test_words_are_the_monitor_s():
    html = view.status(told(trained(), headline="<b>Training</b>", figures="3 of <10>"))
    assert "&lt;b&gt;Training&lt;/b&gt;" in html and "3 of &lt;10&gt;" in html


def test_the_bar_stands_where_it_is():
    assert 'style="width:30.0%"' in view.status(told(trained()))
    assert 'class="bar unknown"' in view.status(told(watch()))
    assert 'class="bar' not in view.status(told(watch(), state="failed"))


def test_everything_of_note_is_said_and_harmless():
    seen = trained()
    for k in range(5):
        seen.follow(Warned(k, f"warning <{k}>"), 0.0)
    html = view.status(told(seen, error="no <b>", result="<lora:x:1>"))
    assert re.findall(r"warning &lt;(\d)&gt;", html) == ["2", "3", "4"] and "Update 4: " in html
    assert "no &lt;b&gt;" in html and "&lt;lora:x:1&gt;" in html and "a&lt;b.safetensors, 64 x 64 pixels" in html
    assert "training takes about" in html
    assert "cannot distil" in view.idle("a model", "this host cannot distil")
    assert "no checkpoint" in view.idle("").lower() and "a&lt;b" in view.idle("a<b")
    assert view.box("") == ""


# --- pictures ---


def test_teacher_stands_beside_student():
    html = view.pictures(told(pictured(0)))
    assert html.count('class="turbodistill-cards"') == 1 and 'type="range"' not in html
    sources = re.findall(r'src="([^"]+)" alt="(\w+)"', html)
    assert sources == [
        ("data:image/png;8", "teacher"), ("data:image/png;1", "student"),
        ("data:image/png;9", "teacher"), ("data:image/png;2", "student"),
    ]  # fmt: skip
    assert 'title="an &quot;owl&quot;\nseed 6"' in html


def test_of_many_previews_the_newest_is_shown_first():
    html = view.pictures(told(pictured(0, 2, 4)))
    grids = re.findall(r'<div class="turbodistill-cards"( hidden)?>', html)
    assert grids == [" hidden", " hidden", ""] and 'max="2" value="2"' in html
    assert 'data-names="update 0 (1 of 3)|update 2 (2 of 3)|update 4 (3 of 3)"' in html


def test_before_a_preview_the_teacher_s_pictures_are_shown():
    seen = watch("pairs")
    assert view.pictures(told(seen)) == ""
    seen.newest(latents(1, 2, 3))
    assert view.pictures(told(seen)).count("<img") == 3


# --- curves ---


def drawn(svg):
    """The drawing's elements; it must be well-formed."""
    return list(ET.fromstring(re.search(r"<svg.*?</svg>", svg, re.DOTALL)[0]).iter())


def lines(svg):
    """Points of each curve."""
    found = [e.get("points") for e in drawn(svg) if e.tag == "polyline"]
    return [[tuple(map(float, p.split(","))) for p in points.split()] for points in found]


def run(values, scores=(), **health):
    seen = watch(updates=len(values))
    for update, value in enumerate(values, 1):
        measures = {k: v[update - 1] for k, v in health.items()}
        seen.follow(step(update, {"regression": value, "discriminator": 1.0}, **measures), 1.0)
    for update, score in scores:
        seen.follow(Selected(update, score, True), 0.0)
    return seen.snapshot()


def test_nothing_is_drawn_before_the_first_update():
    assert curves.charts(told(watch())) == ""


def test_losses_are_logarithmic():
    regression, discriminator = lines(curves.losses(run([10.0, 1.0, 0.1])))
    heights = [y for _, y in regression]
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=0.2) and heights[0] < heights[2]
    assert [x for x, _ in regression] == [x for x, _ in discriminator] and regression[0][0] < regression[2][0]
    assert {e.text for e in drawn(curves.losses(run([10.0, 1.0, 0.1]))) if e.tag == "text"} >= {"10", "1", "0.1"}


def test_losses_below_zero_are_drawn_in_order():
    svg = curves.losses(run([-10.0, -0.1, 0.0, 0.1, 10.0]))
    heights = [y for _, y in lines(svg)[0]]
    assert heights == sorted(heights, reverse=True) and len(set(heights)) == 5
    assert {e.text for e in drawn(svg) if e.tag == "text"} >= {"-1", "0", "1"}


def test_what_is_missing_leaves_no_point():
    seen = watch(updates=4)
    for update in range(1, 5):
        losses = {"regression": 1.0} | ({"discriminator": 2.0} if update > 2 else {})
        seen.follow(step(update, losses), 1.0)
    regression, discriminator = lines(curves.losses(seen.snapshot()))
    assert len(regression) == 4 and len(discriminator) == 2
    accuracy, *_ = lines(curves.health(seen.snapshot()))
    assert len(accuracy) == 2  # before the discriminator it means nothing


def test_scores_are_marked():
    svg = curves.losses(run([1.0, 1.0, 1.0], scores=[(2, 4.0)]))
    assert "held-out score" in svg and any(e.tag == "circle" for e in drawn(svg))


def test_health_lies_in_its_band():
    told = run([1.0, 1.0, 1.0], saturation=[0.8, 1.025, 1.25], sharpness=[0.1, 100.0, 1.0])
    svg = curves.health(told)
    (band,) = [e for e in drawn(svg) if e.tag == "rect"]
    top, bottom = float(band.get("y")), float(band.get("y")) + float(band.get("height"))
    named = dict(zip([n for n in curves.HEALTH if not n.startswith("pixel_")], lines(svg), strict=True))
    saturation, sharpness = ([y for _, y in named[name]] for name in ("saturation", "sharpness"))
    assert saturation == pytest.approx([bottom, (top + bottom) / 2, top], abs=0.2)
    assert sharpness[0] > bottom and curves.TOP <= sharpness[1] < top and top < sharpness[2] < bottom
    assert "saturation <b>1.25 (healthy 0.8 to 1.25)</b>" in svg


def test_one_update_is_a_point():
    for svg in (curves.losses(run([1.0])), curves.health(run([1.0]))):
        assert any(e.tag == "circle" for e in drawn(svg))


def test_names_are_harmless():
    seen = watch(updates=1)
    seen.follow(step(1, {"<script>": 1.0}), 1.0)
    assert "<script>" not in curves.losses(seen.snapshot())
