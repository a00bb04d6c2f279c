"""Any value of any widget, as an API prompt or a link gives it, ends in a node's output or in words."""

import asyncio
import math

import pytest
import torch
import turbodistill
from turbodistill.core.card import read_card

NUMBERS = [-(2**63), -64, -1, 0, 1, 2, 7, 8, 9, 63, 64, 1000, 4096, 10**6, 2**31, 2**63, 2**64, 10**30, 10**400]
REALS = [-1.0, -0.0, 0.0, 1e-320, 0.5, 1.0, 1.5, 30.0, 1e6, 1e308, math.inf, -math.inf, math.nan]


@pytest.fixture(scope="module")
def found(nodes):
    """Node id -> class, as ComfyUI asks our door for them."""
    extension = asyncio.run(turbodistill.comfy_entrypoint())
    return {
        cls.define_schema().node_id.removeprefix("TurboDistill"): cls for cls in asyncio.run(extension.get_node_list())
    }


def odd(fuzz, draws, widget):
    """A value of the type that the host makes of whatever it is given."""
    return {
        "INT": lambda: draws.choice(NUMBERS),
        "FLOAT": lambda: draws.choice(REALS),
        "BOOLEAN": lambda: draws.random() < 0.5,
        "COMBO": lambda: draws.choice([*widget.options, *fuzz.ODD]),
        "STRING": lambda: draws.choice([*fuzz.ODD, widget.default, "a fox", "input.txt", "my-turbo"]),
    }[widget.io_type]()


WIDGETS = ("INT", "FLOAT", "BOOLEAN", "COMBO", "STRING")


def widgets_of(cls):
    return [each for each in cls.define_schema().inputs if each.io_type in WIDGETS]


def values(fuzz, draws, cls):
    """Each widget's first value, a few of them odd."""
    given = {w.id: w.options[0] if w.io_type == "COMBO" and w.default is None else w.default for w in widgets_of(cls)}
    for widget in draws.sample(widgets_of(cls), min(draws.randint(1, 3), len(widgets_of(cls)))):
        given[widget.id] = odd(fuzz, draws, widget)
    return given


def test_nodes(fuzz, found, nodes, graph, places, comfyui, student_of, toys, saved, monkeypatch):
    (places.input / "input.txt").write_text("a fox\nan owl")
    (places.input / "nothing").mkdir()
    monkeypatch.chdir(places.input)
    monkeypatch.setenv("HOME", str(places.input))
    made, began = set(), []

    def pairs_made(loaded, config, prompts, folder, warn):
        began.append(loaded.resolution)
        yield config.pairs, torch.zeros(1, *loaded.latent_shape)

    def trains(loaded, config, folder, prompts, *_, **more):
        began.append(folder)
        raise ValueError("a training would begin here")
        yield

    latent = {"samples": torch.zeros(1, 4, 2, 2)}
    monkeypatch.setattr(nodes.data, "make_pairs", pairs_made)
    monkeypatch.setattr(nodes.distill.run, "run", trains)
    monkeypatch.setattr(nodes.patcher, "sample", lambda *given, **more: latent)
    monkeypatch.setattr(nodes.load.embedded, "load", lambda: (graph.model, graph.clip, graph.vae))
    settings = {"pairs": 12, "pair_steps": 2, "pair_sampler": "euler", "guidance": 2.0, "seed": 0}
    pairs = graph.pairs(**settings)
    student = saved(student_of(toys.row("eps")))
    trained = nodes.distill.Trained(student, read_card(student), graph.model)
    linked = {
        "model": graph.model, "clip": graph.clip, "vae": graph.vae, "prompts": ["a fox"], "teacher": graph.model,
        "student": graph.model, "positive": [], "negative": [], "latent_image": latent, "pairs": pairs,
    }  # fmt: skip

    def node(draws):
        name = draws.choice(sorted(found))
        cls = found[name]
        given = values(fuzz, draws, cls)
        needed = {each.id for each in cls.define_schema().inputs if not each.optional} - set(given)
        given |= {k: trained if (name, k) == ("SaveStudent", "student") else linked[k] for k in needed}
        if "fingerprint_inputs" in vars(cls):
            cls.fingerprint_inputs(**given)
        if "validate_inputs" in vars(cls):
            assert cls.validate_inputs(given["student"]) is not None
        cls.run(prompt={}, unique_id="9", **given)
        made.add(name)

    assert fuzz.endures(node, fuzz.TRIES // 10, (ValueError, OSError))
    assert len(made) > 5
    sizes = [each for each in began if isinstance(each, tuple)]
    assert sizes and all(16 <= side <= 4096 for size in sizes for side in size)
    runs = [each for each in began if not isinstance(each, tuple)]
    assert runs and {run.parent for run in runs} == {places.output / "turbodistill" / "runs"}
    everywhere = [p for p in places.output.parent.rglob("*.safetensors") if p != student]
    assert all(p.is_relative_to(places.output) or p.is_relative_to(places.loras.parent) for p in everywhere)
