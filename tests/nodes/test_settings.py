"""The settings of a distillation as widgets: every one once, with the trainer's own defaults and bounds."""

import dataclasses
import json

import pytest
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.groups import PLAIN_ONLY

FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.name not in PLAIN_ONLY}
# Begun with otherwise in ComfyUI, where a large model on one card is the rule.
OTHER = {"TurboDistillDistill": {"batch_size": 4, "gradient_checkpointing": True}}
KINDS = {bool: "BOOLEAN", int: "INT", float: "FLOAT", str: "STRING"}
NOT_SETTINGS = {("TurboDistillTeacherPairs", "width")}  # of the pictures; Advanced Settings has the heads'


@pytest.fixture(scope="module")
def widgets(nodes):
    """Pairs of node id and widget, of the nodes that ask for settings."""
    asking = (nodes.data.ImageFolder, nodes.data.TeacherPairs, nodes.distill.Distill, nodes.distill.AdvancedSettings)
    schemas = [node.define_schema() for node in asking]
    inputs = [
        (schema.node_id, i) for schema in schemas for i in schema.inputs if i.io_type in (*KINDS.values(), "COMBO")
    ]
    return [(node, i) for node, i in inputs if i.id in FIELDS and (node, i.id) not in NOT_SETTINGS]


def test_every_setting_is_asked_for_exactly_once(widgets):
    assert sorted(i.id for _, i in widgets) == sorted(FIELDS)


def test_defaults_and_help_are_the_trainer_s(widgets):
    for node, i in widgets:
        field = FIELDS[i.id]
        assert i.default == OTHER.get(node, {}).get(i.id, field.default) and type(i.default) is type(field.default)
        assert i.tooltip == field.metadata["help"]


def test_what_a_widget_allows_is_what_the_trainer_takes(widgets):
    for _, i in widgets:
        about = FIELDS[i.id].metadata
        if about["choices"]:
            assert i.io_type == "COMBO" and tuple(i.options) == about["choices"]
            continue
        assert i.io_type == KINDS[type(i.default)], i.id
        if i.io_type in ("INT", "FLOAT"):
            assert about["low"] is None or i.min == about["low"], i.id
            assert about["high"] is None or i.max == about["high"], i.id
            assert i.min <= i.default <= i.max


@pytest.mark.parametrize("name", FIELDS)
def test_both_ends_of_a_widget_are_settings_that_can_be(nodes, name):
    i = nodes.settings.widget(name)
    ends = i.options if i.io_type == "COMBO" else [i.min, i.max] if i.io_type in ("INT", "FLOAT") else [i.default]
    # Steps are no more than timesteps; some loss must have a weight.
    beside = {"start_timestep": {"student_steps": 1}, "regression_weight": {"feature_weight": 1.0}}.get(name, {})
    beside |= {"lr": 1.0} if name == "optimizer" else {}  # prodigy's
    for value in ends:
        assert getattr(Config(**{name: value} | beside), name) == value


def test_a_step_does_not_round_a_default_away(widgets):
    # The page rounds what is typed to a multiple of the step.
    for _, i in widgets:
        if i.io_type == "FLOAT":
            assert i.default == pytest.approx(round(i.default / i.step) * i.step, rel=1e-9), i.id
            assert i.step < i.max - i.min


def test_the_page_draws_no_other_seed_after_a_run(widgets):
    """It does by itself for a `seed`: every run would have pairs of its own."""
    assert {i.control_after_generate for _, i in widgets if i.io_type == "INT"} == {False}


def test_what_a_first_training_needs_not_is_folded_away(nodes):
    """Where the page knows `advanced`; what is folded may stay as it is."""
    asking = (nodes.data.TeacherPairs, nodes.distill.Distill)
    inputs = [i for node in asking for i in node.define_schema().inputs]
    folded = [i.id for i in inputs if getattr(i, "extra_dict", None)]
    assert sorted(folded) == sorted(nodes.settings.FOLDED)
    assert all(i.extra_dict == {"advanced": True} for i in inputs if i.id in folded)
    assert not {"width", "height", "pairs", "guidance", "name", "rank", "updates", "batch_size"} & set(folded)


def test_advanced_settings_are_what_was_chosen(nodes):
    node = nodes.distill.AdvancedSettings
    given = {i.id: i.default for i in node.define_schema().inputs} | {"lr": 1e-3, "adversarial": "relativistic"}
    settings = node.run(**given)[0]
    assert settings == given and Config(**settings).lr == 1e-3
    assert json.dumps(settings)  # plain values


def test_settings_that_cannot_be_are_told_on_the_node_that_has_them(nodes):
    node = nodes.distill.AdvancedSettings
    given = {i.id: i.default for i in node.define_schema().inputs}
    with pytest.raises(ConfigError, match="student_steps is 8: start_timestep 2 allows at most 3"):
        node.run(**given | {"student_steps": 8, "start_timestep": 2})
