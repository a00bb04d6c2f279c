"""Distilling the loaded model inside a real ComfyUI: it ends, is cancelled, fails, is killed, and nothing is lost."""

import json
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from turbodistill.trainer.run.state_file import read_values

pytestmark = pytest.mark.host


@pytest.mark.share
def test_it_ends_with_a_student_that_the_host_loads_whole(comfyui, graph, distilling, new_graph, teacher):
    before = teacher(1)
    nodes = distilling("whole")
    saved = graph.add(
        "TurboDistillSaveStudent", student=nodes["distill"][1], name="whole", save_as="the student (LoRA)"
    )
    shown = graph.add("PreviewImage", images=nodes["distill"][3])
    run = comfyui.run(graph)
    assert "saved " in run.outputs[saved.name]["text"][0]
    told = distilling.snapshot(nodes["distill"])
    assert told["state"] == "done" and told["done"] == told["total"] == 8 and told["error"] == ""
    assert told["history"]["update"] == list(range(1, 9))
    assert {"regression", "adversarial", "discriminator"} <= told["history"]["losses"].keys()
    assert told["memory"].startswith("training takes about ")
    assert [p["update"] for p in told["previews"]] == [0, 4, 8, 8]
    # Core's own loader takes every key of the file, and makes in one step what the preview showed.
    shown_last = told["previews"][-1]
    prompts, seeds = shown_last["prompts"][:2], shown_last["seeds"][:2]
    other = new_graph()
    demo = other.add("TurboDistillLoadDemoModel", batch_size=1)
    lora = other.add("LoraLoaderModelOnly", model=demo, lora_name="whole.safetensors", strength_model=1.0)
    made = []
    for text, seed in zip(prompts, seeds, strict=True):
        positive = other.add("CLIPTextEncode", clip=demo[1], text=text)
        one = other.add("VAEDecode", samples=other.sample(lora, positive, demo[3], seed=seed), vae=demo[2])
        made.append(other.add("PreviewImage", images=one))
    at = len(comfyui.log.read_text())
    run_other = comfyui.run(other)
    assert "lora key not loaded" not in comfyui.log.read_text()[at:]
    preview = comfyui.pictures(run, shown)[:2]
    pictures = torch.cat([comfyui.pictures(run_other, node) for node in made])
    assert (pictures - preview).abs().mean() < 0.01
    # The weights that others share are as they were, and no trace is left in the network.
    after = teacher(2)
    assert after[0] == before[0] and torch.equal(after[1], before[1])


@pytest.mark.newest
def test_a_flux_is_distilled(comfyui, graph, distilling, checkpoints):
    """Newer cores fuse its rotary embedding into an operation without a gradient, unless told of a training."""
    flux = checkpoints["flux"]
    parts = graph.add("TestsTextAndPictures", width=flux.width, pooled=flux.pooled)
    shared = {"model": graph.add("CheckpointLoaderSimple", ckpt_name=flux.file), "clip": parts, "vae": parts[1]}
    prompts = graph.add("TurboDistillPrompts", source="the text below", text="a {red|blue|green} {fox|owl}", file="")
    pairs = graph.add("TurboDistillTeacherPairs", **shared, prompts=prompts, width=64, height=64, **distilling.SMALL)
    settings = graph.add("TurboDistillAdvancedSettings", **distilling.settings())
    node = graph.add("TurboDistillDistill", **shared, pairs=pairs, name="flux", settings=settings, **distilling.SHORT)
    graph.add("PreviewAny", source=node[2])
    comfyui.run(graph)
    told = distilling.snapshot(node)
    assert told["state"] == "done" and told["history"]["update"] == list(range(1, 9))
    bars = [done for name, done, total in json.loads(comfyui.get("tests/progress")) if (name, total) == (node.name, 8)]
    assert min(bars) < max(bars) == 8  # ComfyUI's own bar goes along, after the pairs' 24 of 24
    student = load_file(distilling.folder("flux") / "student.safetensors")
    learnt = {k: v for k, v in student.items() if k.endswith("lora_up.weight")}
    assert any("double_blocks" in k for k in learnt) and any("single_blocks" in k for k in learnt)
    assert all(v.isfinite().all() and v.any() for v in learnt.values())


@pytest.mark.newest
def test_the_page_asks_for_a_preview_and_for_the_end(comfyui, graph, distilling):
    nodes = distilling("early", updates=400, advanced={"preview_every": 0, "evaluate_every": 0})
    queued = comfyui.queue(graph)
    node = nodes["distill"]
    distilling.wait_for(node, 2)
    assert comfyui.post(f"turbodistill/runs/{node.name}/preview") == 204
    for _ in range(200):
        if len((told := distilling.snapshot(node))["previews"]) == 2:
            break
        time.sleep(0.05)
    assert 2 <= told["previews"][-1]["update"] < 400
    assert comfyui.post(f"turbodistill/runs/{node.name}/stop") == 204
    comfyui.wait(queued)
    told = distilling.snapshot(node)
    assert told["state"] == "stopped" and 2 <= told["done"] < 400
    assert (distilling.folder("early") / "student.safetensors").exists()
    assert comfyui.post(f"turbodistill/runs/{node.name}/stop") == 409
    assert comfyui.post("turbodistill/runs/none/stop") == 404
    # The same graph goes on from there.
    queued = comfyui.queue(graph)
    later = distilling.wait_for(node, told["done"] + 2)
    assert later["history"]["update"][:2] == [1, 2]
    assert comfyui.post(f"turbodistill/runs/{node.name}/stop") == 204
    comfyui.wait(queued)


def test_many_cancels_at_random_moments_leave_the_model_as_it_was(comfyui, distilling, new_graph, teacher, cancelled):
    before = teacher(3)
    draws, reached = random.Random(0), set()
    for k in range(20):
        graph = new_graph()
        # New pairs every few times, so that some cancels meet the making of pairs.
        nodes = distilling(f"cancelled-{k // 4}", graph, pairs={"seed": 100 + k // 4}, updates=100000)
        queued = comfyui.queue(graph)
        if k % 4:
            distilling.wait_for(nodes["distill"], 1)
        time.sleep(draws.uniform(0, 0.5))
        begun = time.monotonic()
        comfyui.post("interrupt")
        with pytest.raises(cancelled):
            comfyui.wait(queued)
        assert time.monotonic() - begun < 5  # one pass, not one training
        told = [t for n in ("pairs", "distill") if (t := distilling.snapshot(nodes[n]))]
        reached |= {t["kind"] for t in told if t["state"] == "cancelled"}
        assert all(t["state"] != "working" for t in told)
    assert reached == {"pairs", "distill"}
    after = teacher(4)
    assert after[0] == before[0] and torch.equal(after[1], before[1])
    # A second training starts clean, and a cancelled one goes on.
    graph = new_graph()
    done = read_values(distilling.folder("cancelled-4") / "state.safetensors")["update"]
    nodes = distilling("cancelled-4", graph, pairs={"seed": 104}, updates=done + 2)
    comfyui.run(graph)
    assert distilling.snapshot(nodes["distill"])["done"] == done + 2


@pytest.mark.newest
def test_out_of_memory_says_what_to_change_and_the_queue_goes_on(comfyui, distilling, new_graph, teacher, node_error):
    before = teacher(5)
    comfyui.run(distilling.with_pairs_alone(new_graph()))  # the pairs are there: the fault meets the training
    graph = new_graph()
    nodes = distilling("full", graph, model=lambda demo: graph.add("TestsOutOfMemory", model=demo, after=20))
    with pytest.raises(
        node_error, match=r"out of memory while training .*gradient_checkpointing to true, or lower batch_size"
    ):
        comfyui.run(graph)
    told = distilling.snapshot(nodes["distill"])
    assert told["state"] == "failed" and "out of memory" in told["error"]
    after = teacher(6)
    assert after[0] == before[0] and torch.equal(after[1], before[1])
    graph = new_graph()
    nodes = distilling("full", graph)
    comfyui.run(graph)  # goes on from what was saved
    assert distilling.snapshot(nodes["distill"])["state"] == "done"


@pytest.mark.newest
def test_a_killed_server_goes_on_to_the_same_bits(comfyui, serve, graph, distilling, tmp_path):
    nodes = distilling("killed")
    with serve(tmp_path) as server:
        server.queue(graph)
        distilling.at(server).wait_for(nodes["distill"], 5)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with serve(tmp_path) as server:
        server.run(graph)
        told = distilling.at(server).snapshot(nodes["distill"])
        assert told["history"]["update"] == list(range(1, 9))  # the curves of before the kill are there
        resumed = load_file(distilling.at(server).folder("killed") / "student.safetensors")
    comfyui.run(graph)
    whole = load_file(distilling.folder("killed") / "student.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_both_front_ends_run_one_trainer(distilling, tmp_path):
    """The same data, seed and settings on the command line: the same losses, and as good a student."""
    advanced = {"precision": "float32", "head_channels": 16, "evaluate_every": 0, "preview_every": 0}
    ours, theirs = distilling.on_both("parity", advanced, 14, tmp_path)
    assert len(ours) == len(theirs) == 14
    for name in ("regression", "adversarial", "discriminator", "sharpness", "diversity"):
        a = torch.tensor([float(row[name] or 0) for row in ours])
        b = torch.tensor([float(row[name] or 0) for row in theirs])
        scale = 1 if name == "adversarial" else b.abs().max()  # a mean of logits about 0: by the hinge's margin
        gap = (a - b).abs() / scale
        assert gap[:5].max() < 0.01, name  # two hosts' arithmetic, the pairs' maybe bfloat16; the game has just begun
        assert gap.max() < 0.1, name  # and what an adversarial game makes of it in ten updates


def test_no_prompts(comfyui, graph, distilling, node_error):
    nodes = distilling("bad")
    graph.prompt[nodes["prompts"].name]["inputs"]["text"] = "# only a remark\n\n"
    with pytest.raises(node_error, match="there is no prompt in the text: write one a line"):
        comfyui.run(graph)


def test_a_folder_with_a_broken_picture(comfyui, graph, distilling, node_error):
    folder = comfyui.base / "input" / "mine"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (80, 64), (80 * k, 0, 0)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text("a square")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[:60])
    images = graph.add("TurboDistillImageFolder", folder="mine", broken_pictures="stop")
    nodes = distilling("mine", images=images)
    with pytest.raises(node_error, match=r"picture .*1\.png cannot be read .*replace or remove it"):
        comfyui.run(graph)
    (folder / "1.png").write_bytes(whole)
    comfyui.run(graph)
    assert distilling.snapshot(nodes["distill"])["state"] == "done"
    assert "positives both" in nodes_card(comfyui, graph, nodes)


@pytest.mark.newest
def test_buckets_blocks_a_card_s_memory_and_a_student_to_begin_from(comfyui, graph, distilling, new_graph, node_error):
    folder = comfyui.base / "input" / "squares"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (80, 80), (80 * k, 0, 0)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text("a square")
    images = graph.add("TurboDistillImageFolder", folder="squares", broken_pictures="stop")
    targets = "attention, not output_blocks"
    pairs = {"sizes": "buckets", "images": images}
    nodes = distilling("in-buckets", images=images, pairs=pairs, advanced={"targets": targets}, vram=24.0)
    graph.add("TurboDistillSaveStudent", student=nodes["distill"][1], name="in-buckets", save_as="the student (LoRA)")
    comfyui.run(graph)
    told = distilling.snapshot(nodes["distill"])
    assert told["memory"].startswith("for a card of 24.0 GB: as it is set; set by hand, and kept: batch_size")
    saved = read_values(distilling.folder("in-buckets") / "state.safetensors")["config"]
    assert (saved["sizes"], saved["targets"], saved["vram"]) == ("64x64", targets, 24.0)
    second = new_graph()
    nodes = distilling("second", second, advanced={"targets": targets, "init_student": "in-buckets"})
    assert "init_student in-buckets.safetensors" in nodes_card(comfyui, second, nodes)
    third = new_graph()
    distilling("third", third, advanced={"optimizer": "prodigy", "lr": 1.0}, vram=0.9)
    with pytest.raises(node_error, match=r"needs pytorch-optimizer|No settings make it fit"):
        comfyui.run(third)


def nodes_card(comfyui, graph, nodes):
    return comfyui.run(graph).outputs[nodes["card"].name]["text"][0]


def test_a_vae_of_another_kind(comfyui, graph, distilling, node_error, other_vae):
    nodes = distilling("vae")
    vae = graph.add("VAELoader", vae_name=other_vae)
    graph.prompt[nodes["pairs"].name]["inputs"]["vae"] = vae[0]
    with pytest.raises(node_error, match="the VAE makes latents of 16 channels, the model wants 4"):
        comfyui.run(graph)


def test_a_size_that_the_vae_cannot_make(comfyui, graph, distilling, node_error):
    nodes = distilling("size")
    graph.prompt[nodes["pairs"].name]["inputs"]["width"] = 62
    with pytest.raises(node_error, match="62 x 64 pixels: give multiples of"):
        comfyui.run(graph)


def test_a_base_that_is_a_student_already(comfyui, graph, distilling, node_error):
    def student(demo):
        return graph.add("TurboDistillLoadStudent", model=demo, student=distilling.BUILT_IN, strength=1.0)

    distilling("again", model=student)
    with pytest.raises(node_error, match="connect the model as it was loaded"):
        comfyui.run(graph)


@pytest.mark.newest
def test_a_lora_on_the_model_is_part_of_the_teacher(comfyui, graph, distilling, new_graph, teacher):
    """The pairs are the adapted model's, and the student fits it and not the bare one."""
    plain = new_graph()
    distilling("first", plain)
    saving = plain.add(
        "TurboDistillSaveStudent",
        student=[str(len(plain.prompt) - 1), 1],
        name="style",
        save_as="the student (LoRA)",
    )
    comfyui.run(plain)
    assert saving
    before = teacher(7)

    def adapted(demo):
        return graph.add("LoraLoaderModelOnly", model=demo, lora_name="style.safetensors", strength_model=0.5)

    nodes = distilling("over-a-lora", model=adapted)
    out = graph.add("TurboDistillSaveStudent", student=nodes["distill"][1], name="over", save_as="the student (LoRA)")
    run = comfyui.run(graph)
    assert "One-step student of style.safetensors" in run.outputs[out.name]["text"][0]
    after = teacher(8)
    # ComfyUI's own patching has changed which weights ask for gradients: the bits are what counts.
    assert after[0].split()[0] == before[0].split()[0] and torch.equal(after[1], before[1])
    warnings = []
    for model in (lambda g, demo: demo, lambda g, demo: adapted_in(g, demo)):
        other = new_graph()
        demo = other.add("TurboDistillLoadDemoModel", batch_size=2)
        loaded = other.add(
            "TurboDistillLoadStudent", model=model(other, demo), student="loras/over.safetensors", strength=1.0
        )
        warnings.append("pictures may suffer" in comfyui.text(other, loaded[1]))
    assert warnings == [True, False]


def adapted_in(graph, demo):
    return graph.add("LoraLoaderModelOnly", model=demo, lora_name="style.safetensors", strength_model=0.5)


def test_pairs_of_another_model_are_refused(comfyui, graph, distilling, node_error, new_graph):
    nodes = distilling("mixed")
    demo = nodes["demo"]
    lora = graph.add("LoraLoaderModelOnly", model=demo, lora_name="whole.safetensors", strength_model=0.5)
    graph.prompt[nodes["distill"].name]["inputs"]["model"] = lora[0]
    with pytest.raises(node_error, match="the pairs were made with another model or CLIP"):
        comfyui.run(graph)


def test_other_settings_or_prompts_do_not_go_on(comfyui, graph, distilling, node_error, new_graph):
    distilling("fixed")
    comfyui.run(graph)
    other = new_graph()
    distilling("fixed", other, rank=8)
    with pytest.raises(node_error, match="rank was 4 and is 8"):
        comfyui.run(other)
    other = new_graph()
    distilling("fixed", other, pairs={"seed": 5})
    with pytest.raises(node_error, match="seed was 0 and is 5"):
        comfyui.run(other)


def test_an_output_folder_that_is_deleted_is_made_anew(comfyui, graph, distilling):
    nodes = distilling("deleted", updates=400, advanced={"save_every": 2})
    queued = comfyui.queue(graph)
    told = distilling.wait_for(nodes["distill"], 2)
    folder = distilling.folder("deleted")
    shutil.rmtree(folder.rename(folder.with_name("gone")))  # at once: the server may be writing into it
    distilling.wait_for(nodes["distill"], told["done"] + 2)
    assert comfyui.post(f"turbodistill/runs/{nodes['distill'].name}/stop") == 204
    comfyui.wait(queued)
    assert distilling.snapshot(nodes["distill"])["state"] == "stopped"
    left = {path.name for path in distilling.folder("deleted").iterdir()}
    assert left == {"history.csv", "state.safetensors", "student.safetensors"}


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux: a limit on the server's files")
def test_a_disk_without_room(comfyui, graph, distilling, node_error):
    distilling("no-room")
    before = resource.prlimit(comfyui.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(comfyui.process.pid, resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(node_error, match=r"cannot write .*free some space or choose another folder"):
            comfyui.run(graph)
    finally:
        resource.prlimit(comfyui.process.pid, resource.RLIMIT_FSIZE, before)
    assert not list(distilling.folder("no-room").glob("*.part"))
    comfyui.run(graph)


@pytest.mark.parametrize("name", ["", "../out", "a/b", "C:\\x"])
def test_a_name_that_is_no_folder_s(comfyui, graph, distilling, node_error, name):
    distilling(name)
    with pytest.raises(node_error, match="give one that can be a folder's"):
        comfyui.run(graph)
