"""Settings: one place, checked, and what may change when a run goes on."""

import dataclasses
import inspect

import pytest
from turbodistill.trainer.config import RESUMABLE, Config, ConfigError, check_resumable

FIELDS = {f.name: f for f in dataclasses.fields(Config)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_tells_what_it_is(name):
    about = FIELDS[name].metadata
    assert about["help"].strip() == about["help"] != ""
    assert about["group"] in {"student", "data", "training", "losses", "discriminator", "output"}
    assert type(FIELDS[name].default) in (int, float, str, bool)


@pytest.mark.parametrize(("name", "field"), [(n, f) for n, f in FIELDS.items() if f.metadata["low"] is not None])
def test_below_the_least_is_refused(name, field):
    with pytest.raises(ConfigError, match=rf"{name} is -?\d.*: the least is"):
        Config(**{name: type(field.default)(field.metadata["low"] - 1)})


@pytest.mark.parametrize(("name", "field"), [(n, f) for n, f in FIELDS.items() if f.metadata["high"] is not None])
def test_above_the_most_is_refused(name, field):
    above = field.metadata["high"] + 1
    value = "x" * above if isinstance(field.default, str) else type(field.default)(above)
    with pytest.raises(ConfigError, match=rf"{name} (is|has) \d.*: the most is"):
        Config(**{name: value})


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.metadata["choices"]])
def test_another_choice_is_refused_and_the_known_ones_are_named(name):
    with pytest.raises(ConfigError, match=f"{name} is 'other': use one of") as told:
        Config(**{name: "other"})
    assert FIELDS[name].default in str(told.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rank": "8"}, "rank is '8': give a whole number"),
        ({"rank": 8.0}, "rank is 8.0: give a whole number"),
        ({"rank": True}, "rank is true: give a whole number"),
        ({"condition_image": 1}, "condition_image is 1: give true or false"),
        ({"lr": "fast"}, "lr is 'fast': give a number"),
        ({"lr": 0}, "lr is 0.0: the least is 1e-09"),
        ({"lr_discriminator": 0.0}, "lr_discriminator is 0.0: the least is 1e-09"),
        ({"rank": None}, "rank is empty: give a whole number"),
        ({"lr": float("nan")}, "lr is nan: give a finite number"),
        ({"minutes": float("inf")}, "minutes is inf: give a finite number"),
        ({"student_steps": 4, "start_timestep": 2}, "student_steps is 4: start_timestep 2 allows at most 3"),
        ({"regression_weight": 0.0, "adversarial_weight": 0.0}, "every loss has weight 0"),
    ],
)
def test_a_value_that_cannot_be_is_told(values, told):
    with pytest.raises(ConfigError, match=told):
        Config(**values)


def test_a_whole_number_is_taken_for_a_float():
    assert Config(guidance=3).guidance == 3.0 and type(Config(guidance=3).guidance) is float


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("batch", "batch_size"),
        ("ema", "ema_decay"),
        ("checkpointing", "gradient_checkpointing"),
        ("fresh_share", "fresh_noise_share"),
        ("batchsize", "batch_size"),
        ("clip", "max_grad_norm"),
        ("learning_rate", "lr"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=f"there is no setting '{name}': the nearest is '{nearest}'"):
        Config.from_dict({name: 1})
    with pytest.raises(ConfigError, match=f"the nearest is '{nearest}'"):
        Config(**{name: 1})
    with pytest.raises(ConfigError, match=f"the nearest is '{nearest}'"):
        Config().replace(**{name: 1})


@pytest.mark.parametrize("name", ["bogus", "xyzzy_plugh", "", "of"])
def test_what_is_near_no_setting_gets_no_silly_advice(name):
    with pytest.raises(ConfigError, match=f"there is no setting '{name}': .*--help. lists them all$"):
        Config(**{name: 1})


def test_its_signature_still_names_the_settings():
    assert list(inspect.signature(Config).parameters) == [f.name for f in dataclasses.fields(Config)]


def test_toml_gives_what_it_names_and_leaves_the_defaults(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('rank = 8\nlr = 1e-3\nadversarial = "relativistic"\ncondition_image = true\n')
    expected = Config().replace(rank=8, lr=1e-3, adversarial="relativistic", condition_image=True)
    assert Config.from_toml(path) == expected
    assert Config.from_dict(expected.to_dict()) == expected
    path.write_text(expected.to_toml())
    assert Config.from_toml(path) == expected


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"rank = ", "is no TOML"),
        (b"seed = 1 # \xff", "is no UTF-8 text"),
        (b"[student]\nrank = 8", r"\[student\] is a table: write settings as name = value alone, without tables"),
        (b"rank = {low = 8}", "rank is {'low': 8}: give a whole number"),
        (b"lr = nan", "lr is nan"),
        (None, "does not exist: check the name"),
    ],
)
def test_a_bad_settings_file_is_told(tmp_path, content, told):
    path = tmp_path / "settings.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        Config.from_toml(path)


@pytest.mark.parametrize("name", sorted(RESUMABLE))
def test_how_long_how_often_and_with_how_much_memory_may_change_when_a_run_goes_on(name):
    config = Config()
    others = {"precision": "float32", "gradient_checkpointing": True, "init_student": "a.safetensors"}
    others |= {"broken_pictures": "skip", "base_precision": "int8", "offload": True, "compile": True}
    other = others.get(name) or getattr(config, name) + 1
    check_resumable(config.to_dict(), config.replace(**{name: other}))
    assert name in FIELDS


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in RESUMABLE])
def test_everything_else_may_not_and_the_difference_is_named(name):
    saved = Config().to_dict() | {name: "before"}
    with pytest.raises(ConfigError, match=f"cannot go on with other settings: {name} was 'before' and is"):
        check_resumable(saved, Config())
