"""The training tab's form and what it shows, with whichever gradio is there."""

import copy
import dataclasses
import html
import inspect

import fastapi
import pytest
from fastapi.testclient import TestClient
from turbodistill.page import fields, job, runs, tab
from turbodistill.page.events import asking
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.groups import PLAIN_ONLY

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'turbodistill[ui]'")
pytestmark = pytest.mark.gradio

FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.name not in PLAIN_ONLY}
NOTHING = gradio.update()


def components(blocks):
    return list(blocks.blocks.values())


def by_id(blocks, name):
    return next(c for c in components(blocks) if getattr(c, "elem_id", None) == name)


def form(toy, **changes):
    """Values of the form's inputs, quick ones; `changes` win."""
    of_run = {"name": "my-turbo", "source": tab.TEXT, "text": toy.PROMPTS, "file": "", "images": "", "width": 0}
    values = of_run | {"height": 0} | {"settings": Config(**toy.QUICK).to_dict()} | changes
    settings = values.pop("settings")
    return [*(values[name] for name in tab.OF_RUN), *(settings[name] for name in tab.SETTINGS)]


@pytest.fixture(scope="module")
def page(toy, tmp_path_factory):
    """The tab, built once for the tests that only look at its parts."""
    return tab.build(toy.ToyBackend(tmp_path_factory.mktemp("page")))


# --- fields ---


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_asked_for_as_the_trainer_has_it(toy, page, name):
    (made,) = [c for c in components(page) if getattr(c, "elem_id", None) == f"turbodistill-{name}"]
    about, default = FIELDS[name].metadata, FIELDS[name].default
    assert made.value == toy.QUICK.get(name, default)
    assert made.info.lower() == about["help"].lower() and made.label.lower() == name.replace("_", " ")
    if about["choices"]:
        assert [c[-1] if isinstance(c, (tuple, list)) else c for c in made.choices] == list(about["choices"])
    elif "offers" in about:
        offered = [c[-1] if isinstance(c, (tuple, list)) else c for c in made.choices]
        assert offered == about["offers"] and made.allow_custom_value
    elif isinstance(default, bool):
        assert isinstance(made, gradio.Checkbox)
    elif isinstance(default, (int, float)):
        # Its bounds are ours to check: gradio's answer has no words, and its precision cuts what is typed.
        assert isinstance(made, gradio.Number) and made.minimum is made.maximum is made.precision is None


def test_the_advanced_ones_lie_in_their_groups(page):
    titles = [c.label for c in components(page) if isinstance(c, gradio.Accordion)]
    groups = ["Student", "Data", "Training", "Losses", "Discriminator", "Output"]
    assert titles == ["Advanced settings", *groups, "Earlier runs"]
    assert sorted(tab.SETTINGS) == sorted(FIELDS)


def test_prompts_have_rows_of_their_own():
    rows = fields.rows(["pairs", "guidance", "seed", "negative_prompt", "prompt_prefix", "bake_affixes", "lr"])
    assert rows == [
        ["pairs", "guidance"],
        ["seed"],
        ["negative_prompt"],
        ["prompt_prefix"],
        ["bake_affixes", "lr"],
    ]


def test_values_come_back_as_the_trainer_wants_them():
    names = ("rank", "lr", "taps", "gradient_checkpointing", "adversarial")
    told = fields.settings(names, (8.0, 1, None, None, "hinge"))
    assert told == {"rank": 8, "lr": 1.0, "taps": "", "gradient_checkpointing": False, "adversarial": "hinge"}
    assert [type(v) for v in told.values()] == [int, float, str, bool, str]
    with pytest.raises(ConfigError, match="rank is empty: give a number"):
        fields.settings(names, (None, 1, "", False, "hinge"))


# --- requests ---


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"name": "my-turbo", "prompt_file": "", "built_in": "", "width": 0}),
        ({"name": " x ", "width": 64.0}, {"name": "x", "width": 64}),
        ({"source": tab.FILE, "file": " a.txt "}, {"prompts": "", "prompt_file": "a.txt"}),
        ({"source": tab.BUILT_IN + "words"}, {"prompts": "", "built_in": "words"}),
        ({"source": tab.CAPTIONS, "images": "pictures"}, {"prompts": "", "images": "pictures"}),
        ({"text": None, "height": None, "images": None}, {"prompts": "", "height": 0, "images": ""}),
    ],
)
def test_the_form_becomes_a_request(toy, changes, expected):
    asked = tab.request("distill", form(toy, **changes))
    assert {name: getattr(asked, name) for name in expected} == expected
    assert asked.config() == Config(**toy.QUICK).replace(positives="both" if asked.images else "teacher")


def test_a_run_fills_the_form_with_what_was_asked(toy, backend):
    asked = tab.request("distill", form(toy, name="first", settings=Config(**toy.QUICK, lr=3e-4).to_dict()))
    job.start(backend, asked).wait(60)
    (line,) = tab._lines(backend)
    assert line == "first: done, update 4 of 4"
    said, *updates = tab.filled(backend, line)
    values = [update["value"] for update in updates]
    again = tab.request("distill", values)
    assert said == "" and again.name == "first" and again.prompts == toy.PROMPTS and again.config() == asked.config()
    said, *updates = tab.filled(backend, None)
    assert "no run is chosen" in said and updates == [NOTHING] * len(values)


# --- what is shown ---


def test_before_the_first_run_the_checkpoint_is_named(backend):
    shown, status, *rest = tab.refresh(backend, {})
    assert "Loaded: toy.safetensors" in status and "data-stamp" in status and rest[:-1] == [NOTHING] * 5
    assert tab.refresh(backend, shown)[-1] == NOTHING


def test_what_is_shown_already_is_not_sent_again(toy, backend):
    job.start(backend, tab.request("distill", form(toy))).wait(60)
    shown, status, charts, pictures, *buttons, listed = tab.refresh(backend, {})
    assert "my-turbo: done" in status and "<svg" in charts and "<img" in pictures
    assert [b["interactive"] for b in buttons] == [False] * 3 and listed["choices"] == ["my-turbo: done, update 4 of 4"]
    again, status, *rest = tab.refresh(backend, shown)
    assert again == shown and "my-turbo: done" in status and rest == [NOTHING] * 6
    # A page keeps what it was told as gradio's state: nothing in it may refuse to be copied or compared.
    assert copy.deepcopy(shown) == shown


def test_buttons_are_there_when_they_do_something(toy, backend):
    backend.gate.clear()
    now = job.start(backend, tab.request("distill", form(toy)))
    assert backend.entered.wait(60)
    assert [b["interactive"] for b in tab.refresh(backend, {})[4:7]] == [False, False, True]  # pairs are made
    now.cancel()
    told = tab.refresh(backend, {})
    assert [b["interactive"] for b in told[4:7]] == [False] * 3 and "Cancelling" in told[1]
    backend.gate.set()
    now.wait(60)
    assert "cancelled" in tab.refresh(backend, {})[1]
    assert [r.state for r in runs.listed(backend.runs_folder())] == ["cancelled"]


def test_it_says_that_generation_waits(page):
    words = " ".join(str(c.value) for c in components(page) if isinstance(c, gradio.HTML))
    assert "generation waits until it has ended" in words


def test_mistakes_are_said_where_the_button_is():
    def fail():
        raise job.Busy("a <distillation> runs already")

    assert "a &lt;distillation&gt; runs already" in tab._say(fail) and tab._say(lambda: None) == ""


# --- events ---


def dependencies(blocks):
    """The page's events: (targets, inputs, outputs, js), in whichever gradio."""
    if isinstance(getattr(blocks, "fns", None), dict):  # from 4.40 on
        return [(f.targets, f.inputs, f.outputs, f.js) for f in blocks.fns.values()]
    return [(d["targets"], d["inputs"], d["outputs"], d["js"]) for d in blocks.dependencies]


def test_every_button_has_its_event(page):
    targets = {t[0] if isinstance(t, (tuple, list)) else t for found, *_ in dependencies(page) for t in found}
    buttons = [c for c in components(page) if isinstance(c, gradio.Button)]
    assert len(buttons) == 9 and {b._id for b in buttons} <= targets
    scripts = [js for _, _, _, js in dependencies(page) if js]
    assert scripts == [asking("turbodistill-ask", "turbodistill-live")]


def test_the_page_sends_all_inputs_in_the_order_in_which_they_are_read(page):
    target = by_id(page, "turbodistill-distil")._id
    (inputs,) = [
        given for found, given, *_ in dependencies(page)
        if target in [t[0] if isinstance(t, (tuple, list)) else t for t in found]
    ]  # fmt: skip
    made = [given if hasattr(given, "label") else page.blocks[given] for given in inputs]
    labels = [c.label for c in made]
    assert labels[: len(tab.OF_RUN)] == [
        "Name", "Prompts", "Text", "File", "Picture folder (not needed)", "Width", "Height"
    ]  # fmt: skip
    assert labels[len(tab.OF_RUN) :] == [fields.label(name) for name in tab.SETTINGS]


def test_it_is_drawn_within_another_page(backend):
    inner = tab.build(backend)
    with gradio.Blocks(analytics_enabled=False) as outer, gradio.Tabs(), gradio.TabItem("TurboDistill"):
        inner.render()
    assert by_id(outer, "turbodistill-distil") in components(outer)
    assert len(dependencies(outer)) == len(dependencies(inner))


def test_no_event_is_offered_as_an_api_of_its_own(page):
    config = page.get_config_file()
    shown = [d.get("api_name") for d in config["dependencies"] if d.get("api_visibility", "public") == "public"]
    assert set(shown) <= {False, None}
    assert not any(inspect.isgeneratorfunction(f) for f in (tab.refresh, tab.filled))  # none holds a place in the queue


@pytest.mark.parametrize(
    ("headers", "more", "answered"),
    [
        ({}, {}, True),
        ({"Origin": "http://testserver"}, {}, True),
        ({"Origin": "http://evil.example"}, {}, False),
        ({"Origin": "null"}, {}, False),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:1"}, {}, False),
        # To gradio 3 a body can say what request it is in.
        ({"Origin": "http://evil.example"}, {"request": {"headers": {}, "client": {"host": "127.0.0.1"}}}, False),
    ],
)
def test_no_other_site_s_page_can_press_a_button(backend, foreign, monkeypatch, headers, more, answered):
    """Older FastAPIs take a body without a type for JSON, for which no browser asks whether it may send it."""
    begun = []
    monkeypatch.setattr(job, "start", lambda backend, asked: begun.append(asked.name))
    app = gradio.mount_gradio_app(fastapi.FastAPI(), tab.build(backend), "/")
    client = TestClient(app)
    config = client.get("/config").json()
    prefix = config.get("api_prefix", "")
    (path, body), *_ = foreign.event(config, "turbodistill-distil", {"turbodistill-name": "theirs"}, prefix)
    client.post(path, json=body | more, headers=headers)
    assert begun == ["theirs"] * answered


@pytest.mark.parametrize(
    ("name", "typed", "told"),
    [
        ("rank", 2.5, "rank is 2.5: give a whole number"),
        ("rank", 513.0, "rank is 513: the most is 512"),
        ("lr", 0.0, "lr is 0.0: the least is 1e-09"),
        ("lr", None, "lr is empty: give a number"),
        ("width", 20.5, "width is 20.5: give a whole number"),
        ("width", -8.0, "width is -8: give a multiple of 8"),
    ],
)
def test_a_number_that_cannot_be_is_told_in_the_page(toy, backend, name, typed, told):
    """Through gradio's own reading of the form, before anything starts."""
    page = tab.build(backend)
    changes = {name: typed} if name in tab.OF_RUN else {"settings": Config(**toy.QUICK).to_dict() | {name: typed}}
    ids = [f"turbodistill-{each}" for each in tab.OF_RUN] + [f"turbodistill-{each}" for each in tab.SETTINGS]
    made = {getattr(c, "elem_id", None): c for c in components(page)}
    values = [made[i].preprocess(v) if i in made else v for i, v in zip(ids, form(toy, **changes), strict=True)]
    assert told in html.unescape(tab._say(lambda: job.start(backend, tab.request("distill", values))))
    assert job.current() is None


def test_a_page_that_is_opened_again_shows_what_it_has_begun(toy, backend):
    assert tab.last_asked() == [NOTHING] * (len(tab.OF_RUN) + len(tab.SETTINGS))
    job.start(backend, tab.request("distill", form(toy, name="mine", settings=Config(**toy.QUICK, lr=0.01).to_dict())))
    values = {n: u["value"] for n, u in zip((*tab.OF_RUN, *tab.SETTINGS), tab.last_asked(), strict=True)}
    assert (values["name"], values["text"], values["lr"]) == ("mine", toy.PROMPTS, 0.01)
