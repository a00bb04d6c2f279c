"""Families of models, a narrow one of each in the real ComfyUI; and the table of them in docs/comfyui.md.

WRITE_DOCS=1 pytest tests/hosts/comfyui/test_families.py writes what was found into the table.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = [pytest.mark.host, pytest.mark.newest]

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs/comfyui.md"
PAIRS = {"pairs": 8, "pair_steps": 2, "pair_sampler": "euler", "guidance": 2.0, "seed": 0, "at_once": 8}
SHORT = {"rank": 2, "batch_size": 2, "gradient_checkpointing": True}
ADVERSARIAL = {"regression_updates": 1, "adversarial_ramp": 1, "evaluate_every": 0, "preview_every": 0, "save_every": 2}
ADVERSARIAL |= {"head_channels": 8}


def module_at(path):
    """A module by its path: tests are no package."""
    spec = importlib.util.spec_from_file_location(f"turbodistill_comfyui_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


FAMILIES = module_at(HERE / "families.py").FAMILIES
every = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def found(installation):
    """What models.py told."""
    ran = subprocess.run(
        [installation[1], *map(str, (HERE / "models.py", installation[0], HERE.parents[2]))],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def version(installation):
    """ComfyUI's own number."""
    return re.search(r'"(.+)"', (installation[0] / "comfyui_version.py").read_text())[1]


@pytest.fixture
def told(found, name, version):
    """What was found of a family."""
    if found["families"][name] is None:
        pytest.skip(f"{name} needs a newer ComfyUI than {version}")
    return found["families"][name]


@every
def test_its_x0_is_comfyui_s_own_for_texts_of_different_lengths(told):
    assert told["lengths"]["own"] < 1e-4


@every
def test_maps_of_a_batch_are_those_of_its_rows(told):
    assert told["lengths"]["maps"] < 1e-3


@every
def test_every_condition_is_heard(told, name):
    heard = told["conditions"]
    wanted = {"context"} | ({"pooled"} if "pooled" in FAMILIES[name].text else set())
    wanted |= {"encoder_hidden_states_llama3"} if "llama" in FAMILIES[name].text else set()
    assert wanted == heard.keys() - {"guidance"}
    assert min(heard[part] for part in wanted) > 0.01


@every
def test_default_taps_are_maps_of_the_picture(told, name):
    features = told["features"]
    assert features["taps"] == FAMILIES[name].taps.split()
    assert all(shape[0] == 3 and shape[2] * 12 == shape[3] * 8 for shape in features["shapes"])
    assert features["finite"] and features["alone"] and features["moved"] > 0.05
    assert features["to_x"] > 0 and features["to_weights"] == 0
    assert told["place"] == [[1, 2]]  # what becomes of a square is read where the square is


@every
def test_gradients_reach_every_lora_and_the_weights_stay_to_the_bit(told, name):
    lora = told["lora"]
    assert lora["finite"] and all(re.match(FAMILIES[name].unseen, layer) for layer in lora["untaught"])
    assert 0 < lora["targets"]["attention"] < lora["targets"]["transformer"] < lora["targets"]["all"]
    assert lora["branches"] == lora["targets"]["all"] and told["same"]


@every
def test_gradients_are_those_of_differences(told):
    gradient, difference = told["slope"]
    assert gradient == pytest.approx(difference, rel=0.01)


@every
def test_checkpointing_changes_no_gradient(told):
    again = told["gradient_checkpointing"]
    assert again["gradients"] and again["gap"] < 1e-4 and again["left"] == 0
    assert again["changed"] == again["blocks"] >= len(told["features"]["taps"])


@every
def test_comfyui_s_own_loader_takes_every_layer_of_a_student(told):
    export = told["export"]
    assert export["taken"] == export["names"] == told["lora"]["branches"]
    assert export["gap"] < 1e-3 < 0.02 < export["teacher"]


@every
def test_pictures_come_from_its_latents(told):
    batch, colours, height, width = told["pictures"]
    assert (batch, colours) == (3, 3) and height * 12 == width * 8 and told["there_and_back"] < 1e-4


def test_fused_rotary_embedding_has_right_gradients(found, version):
    if not found["rotations"]:
        pytest.skip(f"ComfyUI {version} has no fused rotary embedding")
    assert len(found["rotations"]) == 8 and max(found["rotations"].values()) < 1e-5


def test_a_picture_is_a_frame_to_an_autoencoder_of_videos(found, version):
    if found["video_vae"] is None:
        pytest.skip(f"ComfyUI {version} knows no narrow one")
    decoded, encoded, shape = found["video_vae"]
    assert max(decoded, encoded) < 1e-4 and shape == [2, 16, 8, 12]


# --- In the server ---


@pytest.fixture
def distilled(comfyui, told, new_graph, all_settings):
    """The family and a number of updates -> distils so far; the run's history, its file and a latent in one step."""

    def run(name, updates):
        graph = new_graph()
        parts = graph.add("TestsFamily", name=name)
        shared = {"model": parts, "clip": parts[1], "vae": parts[2]}
        text = "a {red|blue|green} {fox|owl in the dark}"
        prompts = graph.add("TurboDistillPrompts", source="the text below", text=text, file="")
        size = 64 if told["pictures"][2] == 64 else 128
        pairs = graph.add("TurboDistillTeacherPairs", **shared, prompts=prompts, width=size, height=size, **PAIRS)
        settings = graph.add("TurboDistillAdvancedSettings", **all_settings({*PAIRS, *SHORT, "updates"}, ADVERSARIAL))
        called = re.sub(r"\W+", "-", name).lower()
        node = graph.add(
            "TurboDistillDistill", **shared, pairs=pairs, name=called, settings=settings, updates=updates, **SHORT
        )
        positive = graph.add("CLIPTextEncode", clip=parts[1], text="a red fox")
        latent = graph.add("EmptyLatentImage", width=size, height=size, batch_size=1)
        (made,) = comfyui.latents(graph, graph.sample(node, positive, latent))
        history = json.loads(comfyui.get(f"turbodistill/runs/{node.name}"))
        folder = comfyui.base / "output" / "turbodistill" / "runs" / called
        return history, load_file(folder / "student.safetensors"), made

    return run


@every
def test_it_is_distilled_goes_on_and_is_sampled_in_one_step(distilled, told, name, version):
    history, _, _ = distilled(name, 2)
    assert history["state"] == "done" and history["history"]["update"] == [1, 2]
    history, student, latent = distilled(name, 4)
    assert history["state"] == "done" and history["history"]["update"] == [1, 2, 3, 4]
    assert {"regression", "adversarial", "discriminator"} <= history["history"]["losses"].keys()
    learnt = {k for k, v in student.items() if k.endswith("lora_up.weight") and v.any()}
    assert all(v.isfinite().all() for v in student.values())
    assert len(learnt) == told["lora"]["taught"]
    assert latent.shape[0] == 1 and latent.isfinite().all() and latent.std() > 0.01
    DONE[version, name] = "yes"


# --- The table ---

DONE = {}


def rows_of(page):
    """The page's table: the heads, and the cells of each row by its first."""
    lines = page.partition("<!-- models -->\n")[2].partition("<!-- /models -->")[0].splitlines()
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return heads, {row[0]: row for row in rows}


def test_the_table_says_what_was_found(found, version):
    heads, rows = rows_of(PAGE.read_text())
    if version not in heads and not os.environ.get("WRITE_DOCS"):
        pytest.skip(f"{PAGE.name} has no column of ComfyUI {version}")
    if missing := [name for name, told in found["families"].items() if told and (version, name) not in DONE]:
        pytest.skip(f"needs the tests of {missing} before it")
    heads = heads if version in heads else [*heads, version]
    wanted = {}
    for name, about in found["families"].items():
        old = rows.get(name, [name, ""])
        cells = dict(zip(heads, old, strict=False)) | {version: DONE.get((version, name), "unknown to it")}
        if about:
            cells["a LoRA's key"] = f"`{about['key']}`"
        wanted[name] = [cells.get(head, "") for head in heads]
    if os.environ.get("WRITE_DOCS"):
        lines = [heads, ["---"] * len(heads), *wanted.values()]
        table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
        page = PAGE.read_text()
        before, after = page.split("<!-- models -->\n")[0], page.split("<!-- /models -->")[1]
        PAGE.write_text(f"{before}<!-- models -->\n{table}<!-- /models -->{after}")
        return
    assert wanted == rows
