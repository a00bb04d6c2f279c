"""The accordion over a stand-in of the host, with a real gradio; the door; what is refused."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytestmark = pytest.mark.gradio
gr = pytest.importorskip("gradio")
from fastapi import HTTPException  # noqa: E402 - comes with gradio

ROOT = Path(__file__).parents[2]
PARTS = ("prompt", "sampling", "steps", "cfg_scale")
HIRES = {"enable_hr": True, "hr_second_pass_steps": 0}


@pytest.fixture
def host(webui, toys, tmp_path):
    """A host with a toy loaded."""
    with webui.installed(webui.Model(toys.conv()), tmp_path) as made:
        yield made


def drawn(host, order="before"):
    """The panel in a page whose own components come before it or after it; and the page."""
    panel = host.get("host_panel").Panel()
    with gr.Blocks() as page:
        if order == "after":
            panel.ui(False)
        for name in PARTS:
            panel.after_component(gr.Textbox(elem_id=f"txt2img_{name}"), elem_id=f"txt2img_{name}")
            panel.after_component(gr.Textbox(), elem_id=f"img2img_{name}")
        if order == "before":
            panel.ui(False)
    return panel, page


@pytest.mark.parametrize("order", ["before", "after"])
def test_its_buttons_find_what_they_set_wherever_it_stands(host, order):
    panel, page = drawn(host, order)
    assert set(panel.parts) == set(PARTS)
    assert len(page.get_config_file()["dependencies"]) == 4


def test_the_api_draws_it_again_and_nothing_is_connected_twice(host):
    panel, page = drawn(host)
    with gr.Blocks() as other:
        (choice,) = panel.ui(False)
    assert choice.value == "detect"
    assert len(other.get_config_file()["dependencies"]) == 0 and len(page.get_config_file()["dependencies"]) == 4


def test_it_brings_the_rule_that_hides_its_button(host):
    """Whoever hides the tab has it from nowhere else."""
    _, page = drawn(host)
    assert any(".turbodistill-hidden {" in str(getattr(each, "value", "")) for each in page.blocks.values())


def p_of(**given):
    plain = {"sampler_name": "ADD 1-step", "steps": 20, "extra_generation_params": {}}
    comments = []
    return SimpleNamespace(**plain | {"comments": comments, "comment": comments.append} | given)


@pytest.mark.parametrize(
    ("given", "steps", "second"),
    [
        ({}, 1, None),
        ({"sampler_name": "ADD few-step"}, 8, None),
        ({"sampler_name": "Euler"}, 20, None),
        (HIRES, 1, 0),
        ({**HIRES, "hr_sampler_name": "Euler"}, 1, 20),
        (
            {"enable_hr": True, "hr_second_pass_steps": 9, "sampler_name": "Euler", "hr_sampler_name": "ADD 1-step"},
            20,
            1,
        ),
        ({"enable_hr": True, "hr_second_pass_steps": 20, "sampler_name": "Euler"}, 20, 20),
    ],
)
def test_steps_become_the_passes_that_are_made(host, given, steps, second):
    p = p_of(**given)
    host.get("host_panel").Panel().process(p, "detect")
    assert (p.steps, getattr(p, "hr_second_pass_steps", None)) == (steps, second)
    assert len(p.comments) == (steps < 20)


def test_a_choice_is_written_into_the_picture_and_comes_back_when_pasted(host):
    panel, _ = drawn(host)
    p = p_of()
    panel.process(p, "DMD2")
    assert p.extra_generation_params == {"ADD chosen": "DMD2"} and p.turbodistill_choice == "DMD2"
    ((_, pasted),) = panel.infotext_fields
    assert pasted(p.extra_generation_params) == "DMD2" and pasted({"Sampler": "Euler"}) == "detect"


@pytest.mark.parametrize("choice", ["detect", None, ""])
def test_detect_is_not_written(host, choice):
    p = p_of()
    host.get("host_panel").Panel().process(p, choice)
    assert p.extra_generation_params == {} and p.turbodistill_choice == "detect"


def test_another_sampler_s_picture_says_nothing_of_ours(host):
    p = p_of(sampler_name="Euler")
    host.get("host_panel").Panel().process(p, "DMD2")
    assert p.extra_generation_params == {}


def test_nothing_is_written_into_a_table_that_another_cell_of_a_plot_has(host):
    table = {"ADD chosen": "LCM", "ADD model": "LCM", "ADD timesteps": "1", "Hires ADD timesteps": "1", "Style": "x"}
    before = dict(table)
    for given, choice, written in (
        ({}, "DMD2", {"Style": "x", "ADD chosen": "DMD2"}),
        ({"sampler_name": "Euler"}, "DMD2", {"Style": "x"}),
    ):
        p = p_of(extra_generation_params=table, **given)
        host.get("host_panel").Panel().process(p, choice)
        assert p.extra_generation_params == written and table == before


def test_what_was_said_reaches_the_answer_of_the_host_s_api(host):
    panel, p, table = host.get("host_panel").Panel(), p_of(steps=20), {"Style": "x"}
    panel.process(p, "detect")
    made = SimpleNamespace(extra_generation_params=table)
    panel.postprocess(p, made)
    assert made.extra_generation_params == table | {"ADD remarks": ["ADD 1-step makes one pass: of 20 steps, 1."]}
    assert table == {"Style": "x"}  # which is the pictures'
    p.steps = 1
    panel.process(p, "detect")  # the next picture of the same settings
    made = SimpleNamespace(extra_generation_params=table)
    panel.postprocess(p, made)
    assert made.extra_generation_params == table


def test_the_plot_s_axis_counts_more_than_the_panel_and_is_there_once(host):
    plot = ModuleType("xyz_grid")
    plot.axis_options = []
    plot.AxisOption = lambda label, kind, apply, choices: SimpleNamespace(label=label, apply=apply, choices=choices)
    plot.apply_field = lambda name: lambda p, value, _: setattr(p, name, value)
    host.scripts.scripts_data.append(SimpleNamespace(module=plot))
    panel = host.get("host_panel")
    panel.add_axis()
    panel.add_axis()
    (option,) = plot.axis_options
    assert option.choices() == panel.offered() and option.choices()[0] == "detect"
    p = p_of()
    option.apply(p, "LCM", [])
    panel.Panel().process(p, "DMD2")
    assert p.turbodistill_choice == "LCM"


def test_set_and_undo(host):
    panel = host.get("host_panel")
    *settings, before, words = panel.on_set("LCM", None, "a fox", "Euler", 20, 7.0)
    assert settings == ["a fox", "ADD few-step", 4, 1.0] and words.startswith("As chosen: LCM")
    assert panel.on_undo(before, *settings)[:5] == ["a fox", "Euler", 20, 7.0, None]


# --- the door ---


def load_door():
    """Runs the door as the hosts do: under a name of its own, not kept in sys.modules."""
    spec = importlib.util.spec_from_file_location("turbodistill.py", ROOT / "scripts" / "turbodistill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_door_shows_one_script_and_starts_anew_each_time(host, monkeypatch):
    started = []
    stand_in = ModuleType("turbodistill.webui_extension.host_start")
    stand_in.start = lambda: started.append(1)
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    for times in (1, 2):
        names = vars(load_door()).values()
        shown = [each for each in names if isinstance(each, type) and issubclass(each, host.scripts.Script)]
        assert [each.__name__ for each in shown] == ["Panel"] and len(started) == times


def test_sd_next_is_refused_in_a_sentence(webui, toys, tmp_path, capsys):
    other = ModuleType("modules.sd_samplers")
    other.list_samplers = lambda: None
    with webui.installed(webui.Model(toys.conv()), tmp_path, sd_samplers=other):
        door = load_door()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("TurboDistill does not work in SD.Next")
    assert not hasattr(door, "Panel")


def test_an_unknown_webui_is_refused_in_a_sentence(webui, toys, tmp_path, capsys):
    with webui.installed(webui.Model(toys.conv()), tmp_path, sd_samplers_kdiffusion=None):
        load_door()
    assert capsys.readouterr().out.startswith("TurboDistill does not know this WebUI")


def test_without_the_host_s_lora_extension_there_are_no_loras(host, monkeypatch):
    monkeypatch.delitem(sys.modules, "networks")
    ours = host.get("host")
    ours.refresh_loras()
    assert ours.lora_files() == {} and ours.lora_metadata() == {}


def test_who_would_wait_for_our_lock_is_told_why(host):
    ours, progress, opts = host.get("host"), sys.modules["modules.progress"], host.shared.opts
    before = progress.ProgressResponse
    with ours.held(lambda: "A distillation runs"):
        assert ours.lock.locked()
        told = progress.ProgressResponse(queued=True, textinfo="In queue: 1/1")
        assert told.textinfo == "A distillation runs" and isinstance(told, before)
        assert progress.ProgressResponse(queued=False, textinfo="Waiting...").textinfo == "Waiting..."
        with pytest.raises(HTTPException) as error:
            opts.set("sd_vae", "other", is_api=True)
        assert (error.value.status_code, error.value.detail) == (409, "sd_vae stays as it is. A distillation runs")
        with pytest.warns(UserWarning, match="sd_vae stays as it is"):  # outside of a page's event
            assert opts.set("sd_vae", "other") is False
        assert opts.set("sd_vae", "other", run_callbacks=False) and opts.set("grid_save", True, is_api=True)
    assert not ours.lock.locked() and progress.ProgressResponse is before
    assert opts.set("sd_vae", "another", is_api=True) and opts.data == {"sd_vae": "another", "grid_save": True}


def test_folders(host, tmp_path):
    ours = host.get("host")
    assert ours.output_folder() == tmp_path / "outputs" / "turbodistill" and ours.lora_folder() == tmp_path / "Lora"
    setattr(host.shared.opts, ours.FOLDER, str(tmp_path / "elsewhere"))
    assert ours.output_folder() == tmp_path / "elsewhere"
    setattr(host.shared.opts, ours.FOLDER, "~no-such-user/runs")
    assert str(ours.output_folder()) == "~no-such-user/runs"
