"""ADD's own discriminator in a real ComfyUI: gradients through its VAE, and trainings that are judged by pictures."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.host

HERE = Path(__file__).parent
PIXELS = {"pixel_backbone": "embedded", "pixel_size": 56, "precision": "float32", "head_channels": 16}
BOTH = PIXELS | {"pixel_share": 0.5, "pixel_crop": 32, "augment": True}


@pytest.fixture(scope="module")
def decoders(installation, comfyui, whole, tmp_path_factory):
    """What pixels.py told of the decoders of a checkpoint's VAE and of the demo model's."""
    folder = tmp_path_factory.mktemp("pixels")
    (folder / "files.json").write_text(json.dumps({"sd15": str(comfyui.base / "models" / "checkpoints" / whole)}))
    ran = subprocess.run(
        [installation[1], *map(str, (HERE / "pixels.py", installation[0], HERE.parents[2], folder))],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads((folder / "told.json").read_text())


@pytest.mark.newest
@pytest.mark.parametrize("name", ["sd15", "demo"])
def test_its_pictures_are_the_vae_s_with_gradients_and_the_vae_stays(decoders, name):
    told = decoders[name]
    assert told["gap"] < 1e-4 and told["slope"] == pytest.approx(told["difference"], rel=0.05)
    assert told["again"] < 1e-5 and told["blocks"]  # computed again in backward, block by block
    assert told["same"] and told["flags"] and told["frozen"]


def test_a_clip_vision_of_comfyui_s_sees_with_gradients(decoders):
    for kind in ("clip", "dino"):
        told = decoders[kind]
        assert told["maps"] and told["reached"] > 0 and told["same"] and told["frozen"]
    assert "sees no squares of one size in patches" in decoders["no patches"]


@pytest.mark.share
@pytest.mark.parametrize(("name", "advanced"), [("pixels", PIXELS), ("both", BOTH)])
def test_a_training_judged_by_pictures_ends_and_the_model_stays(comfyui, graph, distilling, teacher, name, advanced):
    before = teacher(11)
    nodes = distilling(name, advanced=advanced)
    comfyui.run(graph)
    told = distilling.snapshot(nodes["distill"])
    assert told["state"] == "done" and told["history"]["update"] == list(range(1, 9))
    losses, health = told["history"]["losses"], told["history"]["health"]
    if name == "both":
        assert {"adversarial (latents)", "adversarial (pixels)", "r1 (pixels)"} <= losses.keys()
        assert any(v is not None for v in health["pixel_accuracy"])
    else:
        assert {"adversarial", "discriminator", "r1"} <= losses.keys() and "pixel_accuracy" not in health
    assert "vision transformer and decoder" in told["memory"]
    after = teacher(12)
    assert after[0] == before[0] and torch.equal(after[1], before[1])


@pytest.mark.newest
def test_a_cancelled_one_goes_on_to_the_same_bits(comfyui, distilling, new_graph, cancelled):
    found = []
    for name in ("pixels whole", "pixels cancelled"):
        graph = new_graph()
        nodes = distilling(name, graph, advanced=BOTH)
        if "cancelled" in name:
            prompt = comfyui.queue(graph)
            distilling.wait_for(nodes["distill"], 3)
            comfyui.post("interrupt", {})
            with pytest.raises(cancelled):
                comfyui.wait(prompt)
        comfyui.run(graph)
        found.append(load_file(distilling.folder(name) / "student.safetensors"))
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_running_out_of_memory_says_what_to_change(comfyui, distilling, new_graph, teacher, node_error):
    before = teacher(13)
    graph = new_graph()
    comfyui.run(distilling.with_pairs_alone(graph))  # they are there: the fault meets the training
    graph = new_graph()
    full = {"model": lambda demo: graph.add("TestsOutOfMemory", model=demo, after=4)}
    distilling("pixels full", graph, advanced=PIXELS, **full)
    with pytest.raises(node_error, match=r"out of memory while training .*gradient_checkpointing to true"):
        comfyui.run(graph)
    after = teacher(14)
    assert after[0] == before[0] and torch.equal(after[1], before[1])


def test_both_front_ends_judge_pictures_alike(distilling, tmp_path):
    """The same data, seed and settings on the command line: the same losses over fifty updates."""
    advanced = PIXELS | {"evaluate_every": 0, "preview_every": 0, "lr": 1e-4, "lr_discriminator": 1e-4}
    ours, theirs = distilling.on_both("pixels parity", advanced, 50, tmp_path)
    assert len(ours) == len(theirs) == 50
    gaps = {}
    for name in ("regression", "adversarial", "discriminator", "r1"):
        a, b = (torch.tensor([float(row[name] or 0) for row in rows]) for rows in (ours, theirs))
        gaps[name] = float((a - b).abs().max() / b.abs().max())
    print("\nmost that a loss differs over fifty updates:", {name: f"{gap:.3%}" for name, gap in gaps.items()})
    assert max(gaps.values()) < 0.05


def test_a_network_that_is_not_there_is_told_before_the_pairs(comfyui, graph, distilling, node_error):
    distilling("pixels nowhere", advanced={"pixel_backbone": "/nowhere"})
    with pytest.raises(node_error, match="pixel_backbone is '/nowhere', which cannot be loaded"):
        comfyui.run(graph)


def test_a_tiny_decoder_is_that_of_previews_or_named(comfyui, graph, distilling, node_error):
    distilling("pixels tiny", advanced=PIXELS | {"pixel_decoder": "tiny"})
    with pytest.raises(node_error, match=r"pixel_decoder is 'tiny'.*set pixel_decoder to vae"):
        comfyui.run(graph)
