"""Nodes of ComfyUI's own between the loader and ours: part of the teacher, harmless, or refused by name."""

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.host

SMALL = {"pairs": 4, "pair_steps": 1, "pair_sampler": "euler", "guidance": 2.0, "seed": 0, "at_once": 4}
SHORT = {"rank": 2, "updates": 2, "batch_size": 2}
FREE_U = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
LEVELS = {"sampling": "v_prediction", "zsnr": True}
GUIDANCE = {
    "RescaleCFG": {"multiplier": 0.7},
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "SelfAttentionGuidance": {"scale": 0.5, "blur_sigma": 2.0},
}


def teacher_pairs(graph, model, demo, seed=0):
    parts = {"model": model, "clip": demo.clip, "vae": demo.vae}
    prompts = graph.add("TurboDistillPrompts", source="the text below", text="a red fox\na blue owl", file="")
    return parts, graph.add(
        "TurboDistillTeacherPairs", **parts, prompts=prompts, width=64, height=64, **SMALL | {"seed": seed}
    )


def folders(comfyui):
    return {path.name for path in (comfyui.base / "output" / "turbodistill" / "pairs").glob("*")}


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_model_with_free_u_is_distilled(comfyui, graph, demo, checkpointing):
    patched = graph.add("FreeU_V2", model=demo.base, **FREE_U)
    parts, pairs = teacher_pairs(graph, patched, demo)
    name = f"free-u-{checkpointing}"
    trained = graph.add(
        "TurboDistillDistill", **parts, pairs=pairs, name=name, **SHORT, gradient_checkpointing=checkpointing
    )
    graph.add("PreviewAny", source=trained[2])
    comfyui.run(graph)
    assert (comfyui.base / "output" / "turbodistill" / "runs" / name / "student.safetensors").exists()


def test_each_teacher_has_pairs_of_its_own(comfyui, demo, graph, new_graph):
    """The same weights, read at other noise levels or patched, make other pairs; the same patches make the same."""
    made = []
    for node, values in ((None, {}), ("ModelSamplingDiscrete", LEVELS), ("FreeU_V2", FREE_U), ("FreeU_V2", FREE_U)):
        other, before = new_graph(), folders(comfyui)
        other.prompt |= graph.prompt
        teacher_pairs(other, other.add(node, model=demo.base, **values) if node else demo.base, demo, seed=7)
        comfyui.run(other)
        made.append(len(folders(comfyui) - before))
    assert made == [1, 1, 1, 0]


def test_a_lycoris_on_the_teacher_is_told_on_the_card(comfyui, graph, demo):
    """And its pairs are its own."""
    layer = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0"
    torch.manual_seed(0)
    tensors = {f"{layer}.lokr_w1": torch.randn(4, 4), f"{layer}.lokr_w2": torch.randn(40, 40) / 10}
    save_file(tensors | {f"{layer}.alpha": torch.tensor(1.0)}, comfyui.base / "models" / "loras" / "lokr.safetensors")
    adapted = graph.add("LoraLoaderModelOnly", model=demo.base, lora_name="lokr.safetensors", strength_model=1.0)
    before = folders(comfyui)
    parts, pairs = teacher_pairs(graph, adapted, demo, seed=7)
    trained = graph.add(
        "TurboDistillDistill", **parts, pairs=pairs, name="over-lokr", **SHORT, gradient_checkpointing=False
    )
    assert "One-step student of lokr.safetensors" in comfyui.text(graph, trained[2])
    assert len(folders(comfyui) - before) == 1


@pytest.mark.parametrize("node", GUIDANCE)
def test_guidance_of_another_kind_is_refused_where_a_student_is_made(comfyui, graph, demo, node_error, node):
    patched = graph.add(node, model=demo.base, **GUIDANCE[node])
    teacher_pairs(graph, patched, demo)
    with pytest.raises(node_error, match=f"comes through {node}, which acts on the sampling"):
        comfyui.run(graph)


@pytest.mark.parametrize("node", GUIDANCE)
def test_guidance_of_another_kind_samples_a_student(comfyui, graph, demo, node):
    patched = graph.add(node, model=demo.model, **GUIDANCE[node])
    (latent,) = comfyui.latents(graph, graph.sample(patched, demo.positive, demo.latent))
    assert latent.isfinite().all() and 0.5 < latent.std() < 4
