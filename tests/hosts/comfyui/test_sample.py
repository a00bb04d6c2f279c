"""One-Step Sample on the real sampling: seeds, batches, pictures, masks, ControlNets."""

import io
import json
import zipfile

import pytest
import torch
from PIL import Image
from turbodistill.demo.files import REFERENCE

pytestmark = pytest.mark.host


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["demo", "sdxl"])
def test_the_same_seed_gives_the_same_bits(comfyui, graph, demo, synthetic, name, steps):
    parts = demo[:3] if name == "demo" else synthetic(name)
    node = graph.sample(*parts, seed=7, steps=steps)
    first, run = comfyui.latents_and_run(graph, node)
    assert node.name not in run.cached
    graph.prompt[node.name]["inputs"]["seed"] = 8  # so that the cache forgets the first
    other = comfyui.latents(graph, node)
    graph.prompt[node.name]["inputs"]["seed"] = 7
    again, run = comfyui.latents_and_run(graph, node)
    assert node.name not in run.cached  # it was computed twice
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert first[0].isfinite().all() and first[0].std() > 0.1


# ComfyUI draws a batch's noise from one seed; the k-th item's noise is asked for alone by the latent's batch_index.
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["demo", "sd15", "sd3"])
def test_an_item_of_a_batch_equals_it_alone(comfyui, graph, demo, synthetic, gap, name, steps):
    model, positive, latent = demo[:3] if name == "demo" else synthetic(name, batch=4)
    together = graph.sample(model, positive, latent, seed=3, steps=steps)
    singles = [graph.add("LatentFromBatch", samples=latent, batch_index=k, length=1) for k in range(4)]
    alone = [graph.sample(model, positive, single, seed=3, steps=steps) for single in singles]
    batch, *items = comfyui.latents(graph, together, *alone)
    assert batch.shape[0] == 4 and {item.shape[0] for item in items} == {1}
    assert gap(torch.cat(items), batch) < 1e-4  # other kernels sum in another order
    assert gap(batch[:1], batch[1:2]) > 0.1


@pytest.fixture
def emoji(comfyui):
    """Four real pictures in the server's input folder: their file names and captions."""
    with zipfile.ZipFile(REFERENCE) as archive:
        rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()[:400:100]]
        for row in rows:
            picture = Image.open(io.BytesIO(archive.read(row["file_name"]))).convert("RGB")
            picture.save(comfyui.base / "input" / row["file_name"])
    return [(row["file_name"], row["text"]) for row in rows]


@pytest.mark.parametrize("steps", [1, 4])
def test_less_denoise_stays_nearer_to_the_picture(comfyui, graph, demo, emoji, steps):
    for name, caption in emoji:
        latent = graph.add("VAEEncode", pixels=graph.add("LoadImage", image=name), vae=demo.vae)
        positive = graph.add("CLIPTextEncode", clip=demo.clip, text=caption)
        made = [graph.sample(demo.model, positive, latent, steps=steps, denoise=d) for d in (0.3, 0.6, 1.0)]
        given, *changed = comfyui.latents(graph, latent, *made)
        near, middle, far = (float((latent - given).pow(2).mean().sqrt()) for latent in changed)
        assert 0 < near < middle < far, name


@pytest.fixture
def halved(graph):
    """A mask of 64 x 64 in the graph: the right half is to be painted."""
    left = graph.add("SolidMask", value=0.0, width=64, height=64)
    right = graph.add("SolidMask", value=1.0, width=32, height=64)
    return graph.add("MaskComposite", destination=left, source=right, x=32, y=0, operation="add")


@pytest.mark.parametrize(("steps", "denoise"), [(1, 1.0), (4, 1.0), (1, 0.6)])
def test_what_is_not_masked_stays(comfyui, graph, demo, emoji, halved, gap, steps, denoise):
    picture = graph.add("LoadImage", image=emoji[0][0])
    latent = graph.add("VAEEncode", pixels=picture, vae=demo.vae)
    masked = graph.add("SetLatentNoiseMask", samples=latent, mask=halved)
    grown = graph.add("VAEEncodeForInpaint", pixels=picture, vae=demo.vae, mask=halved, grow_mask_by=6)
    made = [graph.sample(demo.model, demo.positive, x, steps=steps, denoise=denoise) for x in (masked, grown)]
    for given, painted in zip(*[iter(comfyui.latents(graph, latent, made[0], grown, made[1]))] * 2, strict=True):
        side = given.shape[-1] // 2
        kept, new = slice(0, side - 2), slice(side + 1, None)  # the mask's edge is soft, and grows by up to 6 pixels
        assert gap(painted[..., kept], given[..., kept]) < 1e-5
        assert gap(painted[..., new], given[..., new]) > 0.1


def test_a_controlnet_is_heard(comfyui, graph, synthetic, gap):
    model, positive, latent = synthetic("sd15")
    net = graph.add("ControlNetLoader", control_net_name="sd15.safetensors")

    def controlled(color, strength):
        hint = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=color)
        heard = graph.add(
            "ControlNetApplyAdvanced",
            positive=positive,
            negative=positive,
            control_net=net,
            image=hint,
            strength=strength,
            start_percent=0.0,
            end_percent=1.0,
        )
        return graph.sample(model, heard, latent)

    made = [graph.sample(model, positive, latent), controlled(0, 0.0), controlled(0, 1.0), controlled(0xFFFFFF, 1.0)]
    free, silent, black, white = comfyui.latents(graph, *made)
    assert torch.equal(silent, free)
    assert gap(black, free) > 0.05 and gap(white, black) > 0.05
    assert white.isfinite().all()


def test_a_whole_checkpoint_makes_a_picture(comfyui, graph, checkpoints, whole):
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=whole)
    positive = graph.add("CLIPTextEncode", clip=loaded[1], text="a red fox")
    latent = graph.add("EmptyLatentImage", width=128, height=64, batch_size=2)
    picture = graph.add("VAEDecode", samples=graph.sample(loaded, positive, latent), vae=loaded[2])
    shown = graph.add("PreviewImage", images=picture)
    pictures = comfyui.pictures(comfyui.run(graph), shown)
    assert pictures.shape == (2, 64, 128, 3)
    assert (pictures[0] != pictures[1]).any() and pictures.std() > 0.01


@pytest.mark.newest
def test_an_empty_latent_is_as_large_as_for_comfyui_s_own_sampler(installation, comfyui, graph, demo):
    """Newer cores say for what factor it was made (8), and the demo model's is 4, as Flux.2's is 16."""
    empty = graph.add("EmptyLatentImage", width=64, height=96, batch_size=1)
    settings = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "seed": 0}
    inputs = {"model": demo.base, "positive": demo.positive, "negative": demo.positive, "latent_image": empty}
    own = graph.add("KSampler", **inputs, **settings)
    ours, theirs, given = comfyui.latents(graph, graph.sample(demo.model, demo.positive, empty), own, demo.latent)
    assert ours.shape == theirs.shape
    if "downscale_ratio_spacial" in (installation[0] / "nodes.py").read_text():
        assert ours.shape[2:] == (24, 16) and given.shape[2:] == (16, 16)
