"""What people do with a ComfyUI that distils: sample in between, press Run again, delete, restart, move folders."""

import csv
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch
from safetensors.torch import load_file
from turbodistill.trainer.config import Config
from turbodistill.trainer.groups import ADVANCED
from turbodistill.trainer.run.state_file import read_values

pytestmark = [pytest.mark.host, pytest.mark.newest]

WORDS = "a {red|blue|green|black} {fox|owl|fish|cat}, animal, in flat noto style"
LORA = "the student (LoRA)"
CLOSED = Path("/sys/power")  # nobody can make a file there, not even root


@pytest.fixture
def distil():
    """Graph, name and settings -> the demo model in the graph, its pairs, its training and the student's saving."""

    def add(graph, name, updates=6, rank=4, **advanced):
        demo = graph.add("TurboDistillLoadDemoModel", batch_size=2)
        parts = {"model": demo, "clip": demo[1], "vae": demo[2]}
        prompts = graph.add("TurboDistillPrompts", source="the text below", text=WORDS, file="")
        small = {"pairs": 16, "pair_steps": 2, "pair_sampler": "euler", "guidance": 3.0, "seed": 0, "at_once": 8}
        pairs = graph.add("TurboDistillTeacherPairs", **parts, prompts=prompts, width=64, height=64, **small)
        quick = {"regression_updates": 2, "adversarial_ramp": 1, "save_every": 2, "head_channels": 16, "lr": 1e-3}
        settings = {field: getattr(Config(), field) for field in ADVANCED} | quick | advanced
        more = {"name": name, "rank": rank, "updates": updates, "batch_size": 2, "gradient_checkpointing": False}
        settings = graph.add("TurboDistillAdvancedSettings", **settings)
        node = graph.add("TurboDistillDistill", **parts, pairs=pairs, settings=settings, **more)
        saved = graph.add("TurboDistillSaveStudent", student=node[1], name=name, save_as=LORA)
        return demo, node, saved

    return add


def ksample(graph, demo, seed=5):
    """A picture in four steps of ComfyUI's own sampler."""
    positive = graph.add("CLIPTextEncode", clip=demo[1], text="a red fox, animal, in flat noto style")
    inputs = {"model": demo, "positive": positive, "negative": positive, "latent_image": demo[3]}
    return graph.add(
        "KSampler", **inputs, seed=seed, steps=4, cfg=3.0, sampler_name="euler", scheduler="normal", denoise=1.0
    )


@pytest.fixture
def picture(comfyui, new_graph):
    """The latents of such a picture. A number that was not given before makes it anew, past ComfyUI's cache."""

    def make(count):
        graph = new_graph()
        demo = graph.add("TurboDistillLoadDemoModel", batch_size=2)
        twice = ksample(graph, demo, seed=1000 + count), ksample(graph, demo)
        return comfyui.latents(graph, *twice)[1]

    return make


def run_folder(server, name):
    return server.base / "output" / "turbodistill" / "runs" / name


def told(server, node):
    return json.loads(server.get(f"turbodistill/runs/{node.name}") or b"{}")


def wait_for(server, node, name, update):
    """Until the run of this name has come to an update."""
    for _ in range(1200):
        run = told(server, node)
        if run.get("name") == name and run["what"] == "training" and run["done"] >= update:
            assert run["state"] == "working", run["error"]
            return
        time.sleep(0.05)
    raise TimeoutError(f"no update {update}")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_sampling_and_distilling_in_turn(comfyui, new_graph, distil, picture):
    """What the first training did to the shared weights would be in the second student, and in the pictures."""
    pictures, students = [picture(0)], []
    for count, name in enumerate(("turn-1", "turn-2"), start=1):
        graph = new_graph()
        distil(graph, name)
        comfyui.run(graph)
        students.append(load_file(run_folder(comfyui, name) / "student.safetensors"))
        pictures.append(picture(count))
    assert same(*students) and any(v.any() for k, v in students[0].items() if "lora_up" in k)
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])


def test_run_pressed_twice_trains_once_and_what_was_deleted_is_saved_again(comfyui, graph, distil):
    _, node, saved = distil(graph, "twice")
    lora = comfyui.base / "models" / "loras" / "twice.safetensors"
    first = comfyui.run(graph)
    assert str(lora) in first.outputs[saved.name]["text"][0]
    bytes_of, state = lora.read_bytes(), run_folder(comfyui, "twice") / "state.safetensors"
    trained = state.stat().st_mtime_ns
    assert comfyui.run(graph).cached == set(graph.prompt)
    lora.unlink()
    assert comfyui.run(graph).cached == set(graph.prompt) - {saved.name}
    assert lora.read_bytes() == bytes_of
    assert comfyui.run(graph).cached == set(graph.prompt)
    assert [path.name for path in lora.parent.glob("twice*")] == [lora.name]
    assert state.stat().st_mtime_ns == trained and told(comfyui, node)["done"] == 6


@pytest.mark.asked
def test_a_prompt_that_is_queued_during_a_training_comes_after_it(comfyui, graph, new_graph, distil, picture):
    before = picture(10)
    _, node, _ = distil(graph, "busy", updates=40)
    training = comfyui.queue(graph)
    wait_for(comfyui, node, "busy", 2)
    other = new_graph()
    # Another number of pictures: nothing of it is cached.
    demo = other.add("TurboDistillLoadDemoModel", batch_size=2)
    drawn = other.add("SaveLatent", samples=ksample(other, demo), filename_prefix="busy")
    aside = other.add("SaveLatent", samples=ksample(other, demo, seed=77), filename_prefix="aside")
    waiting = comfyui.queue(other)
    queue = json.loads(comfyui.get("queue"))
    assert [entry[1] for entry in queue["queue_running"]] == [training]
    assert [entry[1] for entry in queue["queue_pending"]] == [waiting]
    comfyui.wait(training)
    assert told(comfyui, node)["state"] == "done" and told(comfyui, node)["done"] == 40
    outputs = comfyui.wait(waiting).outputs
    files = [comfyui.base / "output" / outputs[each.name]["latents"][0]["filename"] for each in (drawn, aside)]
    latents = [load_file(file)["latent_tensor"] for file in files]
    assert torch.equal(latents[0], before) and not torch.equal(latents[1], before)


@pytest.mark.share
def test_core_s_own_nodes_follow(comfyui, graph, distil):
    """LORA_MODEL saves and loads as the student does; LOSS_MAP is drawn."""
    known = json.loads(comfyui.get("object_info"))
    demo, node, _ = distil(graph, "core", evaluate_every=0)
    save = next(name for name in ("SaveLoRA", "SaveLoRANode") if name in known)
    graph.add(save, lora=node[4], prefix="loras/of-core", steps=6)
    plot = graph.add("LossGraphNode", loss=node[5], filename_prefix="of-core")
    loaded = graph.add("LoraModelLoader", model=demo, lora=node[4], strength_model=1.0, bypass=False)
    if "bypass" not in known["LoraModelLoader"]["input"]["required"]:
        del graph.prompt[loaded.name]["inputs"]["bypass"]
    positive = graph.add("CLIPTextEncode", clip=demo[1], text="a red fox, animal, in flat noto style")
    samples = [graph.sample(model, positive, demo[3], seed=3) for model in (loaded, node, demo)]
    (core, ours, plain), run = comfyui.latents_and_run(graph, *samples)
    assert torch.allclose(core, ours, atol=0.01 * float(ours.std())) and not torch.allclose(core, plain, atol=0.01)
    (file,) = (comfyui.base / "output" / "loras").glob("of-core*_6_steps_*.safetensors")
    assert same(load_file(file), load_file(run_folder(comfyui, "core") / "student.safetensors"))
    drawn = comfyui.pictures(run, plot)[..., :3]
    assert (drawn[..., 2] - drawn[..., 0] > 0.5).sum() > 100  # a blue line


def test_a_full_student_has_no_lora_and_the_rest_goes_on(comfyui, graph, distil):
    known = json.loads(comfyui.get("object_info"))
    _, node, saved = distil(graph, "whole-copy", updates=2, rank=0)
    save = next(name for name in ("SaveLoRA", "SaveLoRANode") if name in known)
    graph.add(save, lora=node[4], prefix="loras/whole-copy")
    run = comfyui.run(graph)
    assert "whole-copy.safetensors" in run.outputs[saved.name]["text"][0]
    assert not list((comfyui.base / "output").glob("loras/whole-copy*"))


def test_odd_folders_and_a_restart_in_the_middle(serve, graph, distil, tmp_path, monkeypatch):
    """Blanks and letters of other languages, a first folder of LoRAs that can only be read, a server that is ended."""
    if not CLOSED.is_dir():
        pytest.skip(f"needs a folder that nobody can write to: there is no {CLOSED}")
    nodes = tmp_path / "custom nodes é"
    nodes.mkdir()
    (nodes / "turbo distill").symlink_to(Path(__file__).parents[3], target_is_directory=True)
    base = tmp_path / "base"
    (base / "custom_nodes").mkdir(parents=True)
    places = tmp_path / "paths.yaml"
    told_paths = f"mine:\n  is_default: true\n  custom_nodes: {nodes}\n  loras: {CLOSED}\n"
    places.write_text(told_paths, encoding="utf-8")
    flags = os.environ.get("COMFYUI_FLAGS", "")
    monkeypatch.setenv("COMFYUI_FLAGS", f"{flags} --extra-model-paths-config {places}")
    _, node, saved = distil(graph, "odd é", updates=12)
    folder = base / "output" / "turbodistill" / "runs" / "odd é"

    def rows():
        with (folder / "history.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    with serve(base) as server:
        assert "TurboDistill lies in the folder 'turbo distill'" in server.log.read_text()  # and is served, or not
        assert len(json.loads(server.get("workflow_templates"))["turbo distill"]) == 10
        with suppress(HTTPError):  # ComfyUIs from before blueprints
            packs = [each["info"]["node_pack"] for each in json.loads(server.get("global_subgraphs")).values()]
            assert packs.count("custom_nodes.turbo distill") == 2
        server.queue(graph)
        wait_for(server, node, "odd é", 5)
    done = read_values(folder / "state.safetensors")["update"]
    before = rows()[:done]
    assert done >= 2
    with serve(base) as server:
        run = server.run(graph)
        assert told(server, node)["history"]["update"] == list(range(1, 13))
    assert rows()[:done] == before and len(rows()) == 12  # with the seconds that they took: none was made again
    lora = base / "models" / "loras" / "odd é.safetensors"
    assert f"saved {lora}\n" in run.outputs[saved.name]["text"][0]
    assert lora.read_bytes() == (folder / "student.safetensors").read_bytes()
