"""txt2img's settings as the tab's: what they come to, what is said, and where the button is."""

import pytest

pytestmark = pytest.mark.gradio
gr = pytest.importorskip("gradio")
from turbodistill.page import tab  # noqa: E402
from turbodistill.page.take_over import READ, nearest, take_over  # noqa: E402
from turbodistill.trainer.config import Config  # noqa: E402

USUAL = {"steps": 28, "sampling": "DPM++ 2M", "cfg_scale": 6.5, "width": 832, "height": 1216, "neg_prompt": " bad "}


def test_the_usual_settings_are_taken_as_they_are():
    taken = take_over(USUAL)
    assert taken.values == {
        "pair_steps": 28, "pair_sampler": "dpmpp_2m", "guidance": 6.5, "width": 832, "height": 1216,
        "negative_prompt": "bad",
    }  # fmt: skip
    assert taken.said == [] and taken.in_words() == (
        "Taken over: pair steps 28, pair sampler dpmpp_2m, guidance 6.5, width 832, height 1216, the negative prompt."
    )


@pytest.mark.parametrize(
    ("sampler", "ours", "same"),
    [
        ("DPM++ 2M", "dpmpp_2m", True),
        ("DPM++ 2M Karras", "dpmpp_2m", True),
        ("DPM++ 2M SDE", "dpmpp_2m", False),
        ("Euler", "euler", True),
        ("Euler a", "euler", False),
        ("DPM++ SDE", "euler", False),
        ("UniPC", "euler", False),
        ("", "euler", False),
    ],
)
def test_the_nearest_sampler_is_taken_and_told_where_it_is_another(sampler, ours, same):
    assert nearest(sampler) == (ours, same)
    said = take_over(USUAL | {"sampling": sampler}).said
    assert said == ([] if same else [f"The nearest to the sampler {sampler or 'chosen'} is {ours}."])


@pytest.mark.parametrize(
    ("given", "taken", "told"),
    [
        ({"cfg_scale": 45.0}, {"guidance": 30.0}, "guidance 45 is out of bounds: it is 30 here."),
        ({"cfg_scale": 0.5}, {"guidance": 1.0}, "guidance 0.5 is out of bounds: it is 1 here."),
        ({"steps": 0}, {"pair_steps": 1}, "pair steps 0 is out of bounds: it is 1 here."),
        ({"width": 9000}, {"width": 4096}, "width 9000 is out of bounds: it is 4096 here."),
        ({"height": 517}, {"height": 512}, "height 517 is no multiple of 8: it is 512 here."),
        ({"neg_prompt": "x" * 5000}, {"negative_prompt": "x" * 4000}, "The negative prompt is cut to 4000 letters."),
        ({"cfg_scale": 1}, {"negative_prompt": ""}, "At CFG Scale 1 the negative prompt does nothing: it is left out."),
    ],
)
def test_what_is_out_of_bounds_is_clipped_and_told(given, taken, told):
    found = take_over(USUAL | given)
    assert taken.items() <= found.values.items() and told in found.said
    Config(**{k: v for k, v in found.values.items() if k not in ("width", "height")})  # it can be trained with


@pytest.mark.parametrize("value", [None, "", "many", float("nan"), float("inf"), [], {}])
def test_a_field_that_holds_no_number_leaves_ours_as_it_is(value):
    found = take_over(USUAL | {"cfg_scale": value, "width": value})
    assert not {"guidance", "width"} & found.values.keys() and found.values["pair_steps"] == 28
    assert "guidance is no number there: it stays as it is." in found.said


@pytest.mark.parametrize("sampler", ["ADD 1-step", "ADD few-step"])
def test_a_student_s_settings_are_not_taken(sampler):
    found = take_over(USUAL | {"sampling": sampler, "steps": 1, "cfg_scale": 1})
    assert found.values == {} and found.in_words().startswith("Nothing is taken over: txt2img is set for a student")


def by_id(blocks, name):
    return [each for each in blocks.blocks.values() if getattr(each, "elem_id", None) == name]


def test_the_button_is_there_where_there_is_such_a_page_alone(toy, tmp_path):
    backend = toy.ToyBackend(tmp_path)
    assert by_id(tab.build(backend), "turbodistill-take") == []
    with gr.Blocks() as page:
        backend.page_fields = {name: gr.Textbox(elem_id=f"txt2img_{name}") for name in READ}
        tab.build(backend)
    assert len(by_id(page, "turbodistill-take")) == 1


def test_it_fills_the_form_in_and_leaves_the_rest_alone():
    said, *values = tab.taken_over([USUAL[name] for name in READ])
    form = dict(zip((*tab.OF_RUN, *tab.SETTINGS), values, strict=True))
    changed = {name: update["value"] for name, update in form.items() if "value" in update}
    assert changed == take_over(USUAL).values and 'class="turbodistill-box good"' in said
    said, *values = tab.taken_over([(USUAL | {"sampling": "ADD 1-step"})[name] for name in READ])
    assert "bad" in said and not any("value" in update for update in values)
