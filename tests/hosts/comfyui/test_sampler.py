"""Teacher Pairs with ComfyUI's own SAMPLER and SIGMAS: the pictures are SamplerCustom's; and a CLIP's last layer."""

import json

import pytest
import torch
from safetensors.torch import load_file
from turbodistill.core.precision import fast_bfloat16
from turbodistill.demo import files

pytestmark = pytest.mark.host

PROMPT = "a red fox, animal, in flat noto style"
SEED = 7
COUNT = 4
# Pairs of a model in float32 are made in bfloat16 where the CPU is fast in it, ComfyUI's pictures are not.
CLOSE = 0.06 if fast_bfloat16(torch.device("cpu")) else 0.01


@pytest.fixture(scope="module")
def scale():
    """What the demo model's latents are multiplied with for its network."""
    from safetensors import safe_open

    with safe_open(files.MODEL, "pt") as file:
        return json.loads(file.metadata()[files.HEADER])["vae"]["scaling_factor"]


@pytest.fixture
def made(comfyui, graph):
    """Settings of Teacher Pairs -> the latents and the folder that it made, with a sampler and sigmas of ComfyUI's."""

    def make(sampler="euler", scheduler="karras", steps=6, denoise=1.0, loaded=None, **more):
        loaded = loaded or graph.add("TurboDistillLoadDemoModel", batch_size=1)
        parts = {"model": loaded, "clip": loaded[1], "vae": loaded[2]} | more.pop("parts", {})
        prompts = graph.add("TurboDistillPrompts", source="the text below", text=PROMPT, file="")
        settings = {"pairs": COUNT, "pair_steps": 9, "pair_sampler": "dpmpp_2m", "guidance": 3.0, "seed": SEED}
        settings |= {"at_once": 3, "width": 64, "height": 64} | more
        if sampler:
            settings["sampler"] = graph.add("KSamplerSelect", sampler_name=sampler)
        if scheduler:
            told = {"scheduler": scheduler, "steps": steps, "denoise": denoise}
            settings["sigmas"] = graph.add("BasicScheduler", model=loaded, **told)
        folder = comfyui.base / "output" / "turbodistill" / "pairs"
        before = set(folder.iterdir()) if folder.exists() else set()
        graph.add("TurboDistillTeacherPairs", **parts, prompts=prompts, **settings)
        comfyui.run(graph)
        (new,) = set(folder.iterdir()) - before
        return load_file(new / "pairs-0000000.safetensors")["latents"].float(), new

    return make


@pytest.fixture
def own(comfyui, new_graph):
    """Sampler, scheduler, steps, negative -> what SamplerCustom makes of the pairs' noises at their guidance."""

    def sample(sampler, scheduler, steps, negative=""):
        graph, made = new_graph(), []
        demo = graph.add("TurboDistillLoadDemoModel", batch_size=1)
        texts = {
            name: graph.add("CLIPTextEncode", clip=demo[1], text=text)
            for name, text in (("positive", PROMPT), ("negative", negative))
        }
        chosen = graph.add("KSamplerSelect", sampler_name=sampler)
        sigmas = graph.add("BasicScheduler", model=demo, scheduler=scheduler, steps=steps, denoise=1.0)
        for k in range(COUNT):
            told = {"add_noise": True, "noise_seed": SEED * 1_000_000 + k, "cfg": 3.0, "latent_image": demo[3]}
            made.append(graph.add("SamplerCustom", model=demo, sampler=chosen, sigmas=sigmas, **texts, **told))
        return torch.cat(comfyui.latents(graph, *made))

    return sample


def off(found, expected):
    """The root mean square of the difference, as a share of the spread: texts and pairs are kept in half precision."""
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.mark.newest
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("euler", "karras"),
        ("dpmpp_2m", "karras"),
        ("dpmpp_2m", "normal"),
        ("euler_ancestral", "simple"),
        ("dpmpp_2m_sde", "karras"),
        ("uni_pc", "normal"),
        ("lcm", "simple"),
    ],
)
def test_pairs_are_what_sampler_custom_makes(made, own, scale, sampler, scheduler):
    found, _ = made(sampler, scheduler)
    assert off(found / scale, own(sampler, scheduler, 6)) < CLOSE


def test_sigmas_alone_are_sampled_with_the_setting_s_sampler_and_a_negative_prompt_counts(made, own, scale):
    found, _ = made(None, "karras", negative_prompt="blue", pair_sampler="euler")
    assert off(found / scale, own("euler", "karras", 6, "blue")) < 0.01
    assert off(found / scale, own("euler", "karras", 6)) > 0.05


def test_a_sampler_alone_takes_pair_steps_at_our_levels(made):
    ours, _ = made(None, None, pair_sampler="euler")
    theirs, _ = made("euler", None, pair_sampler="dpmpp_2m")
    assert off(theirs, ours) < 0.02  # ComfyUI begins with noise that is 0.2 per cent stronger


def test_every_sampler_and_every_sigma_has_pairs_of_its_own(made):
    folders = [made(sampler, scheduler, steps)[1] for sampler, scheduler, steps in [
        ("euler", "karras", 4), ("heun", "karras", 4), ("euler", "normal", 4), ("euler", "karras", 5),
    ]]  # fmt: skip
    assert len({folder.name for folder in folders}) == 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"denoise": 0.4}, "set the scheduler's denoise to 1"),
        ({"sampler": "euler_cfg_pp"}, "as those of CFG"),
    ],
)
def test_what_makes_no_pairs_is_refused_in_words(made, node_error, given, words):
    with pytest.raises(node_error, match=words):
        made(**given)


def test_a_student_is_distilled_from_them(comfyui, graph, made):
    """Distill finds the pairs of the same sampler again."""
    _, folder = made("heun", "karras")
    nodes = {entry["class_type"]: name for name, entry in graph.prompt.items()}
    demo, pairs = [nodes["TurboDistillLoadDemoModel"], 0], [nodes["TurboDistillTeacherPairs"], 0]
    graph.add(
        "TurboDistillDistill", model=demo, clip=[demo[0], 1], vae=[demo[0], 2], pairs=pairs, name="by-heun",
        rank=2, updates=2, batch_size=2, gradient_checkpointing=False,
    )  # fmt: skip
    written = (folder / "pairs-0000000.safetensors").stat().st_mtime_ns
    comfyui.run(graph)
    assert (comfyui.base / "output/turbodistill/runs/by-heun/student.safetensors").is_file()
    assert (folder / "pairs-0000000.safetensors").stat().st_mtime_ns == written


def test_a_clip_that_stops_earlier_has_pairs_of_its_own(made, graph, whole):
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=whole)
    settings = {"loaded": loaded, "steps": 1, "guidance": 1.0}
    plain, earlier = [], []
    for layer, kept in ((None, plain), (-2, earlier)):
        clip = loaded[1] if layer is None else graph.add("CLIPSetLastLayer", clip=loaded[1], stop_at_clip_layer=layer)
        kept.extend(made("euler", "normal", parts={"clip": clip}, **settings))
    assert plain[1].name != earlier[1].name
    states = [load_file(place / "prompts-0000000.safetensors")["context"].float() for _, place in (plain, earlier)]
    assert (states[0] - states[1]).abs().max() > 0.1 and states[0].shape == states[1].shape
