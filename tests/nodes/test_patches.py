"""What other nodes put on a MODEL: part of the teacher and of its pairs' key, or refused in words."""

from types import SimpleNamespace

import pytest
import torch
from turbodistill.core.denoiser import Cond, Guidance, guided
from turbodistill.trainer.config import Config

COND = Cond(torch.ones(2, 3, 6))


def free_u(scale):
    """As FreeU's patch: it writes into what it is given, of which it needs the old values for backward."""

    def output_block_patch(h, hsp, transformer_options):
        h[:, :2] = h[:, :2] * (1 + scale * h.mean(1, keepdim=True))
        return h, hsp

    return output_block_patch


class RescaleCFG:
    """As the nodes that change the guidance: a function within one of theirs."""

    @staticmethod
    def patch():
        def rescale(args):
            return args["cond"]

        return rescale


@pytest.fixture
def model(loaded):
    return loaded()


def patched(model, place, patch):
    new = model.clone()
    new.model_options["transformer_options"].setdefault("patches", {}).setdefault(place, []).append(patch)
    return new


def test_a_patch_and_its_values_are_in_the_key(nodes, model):
    bare = nodes.patcher.model_hash(model)
    found = [nodes.patcher.model_hash(patched(model, "output_block_patch", free_u(scale))) for scale in (0.5, 0.5, 0.6)]
    assert found[0] == found[1] and len({bare, *found}) == 3  # the node made it anew, the values are the same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.arange(4.0), torch.arange(4.0) + 1),
        ({"a": [1, None]}, {"a": [2, None]}),
        (lambda x: x, lambda x: -x),
        (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
        ({3, 1}, {1, 2}),
    ],
    ids=["tensors", "values", "functions", "networks", "sets"],
)
def test_what_a_patch_holds_is_in_the_key(nodes, model, one, other):
    def hashed(held):
        return nodes.patcher.model_hash(patched(model, "attn1_patch", lambda q, k, v, options: (q, k, v, held)))

    assert hashed(one) == hashed(one) != hashed(other)


def test_other_noise_levels_are_in_the_key(nodes, model, comfyui):
    bare = nodes.patcher.model_hash(model)
    spaces = [
        comfyui.model_sampling(kind, comfyui.ModelSamplingDiscrete) for kind in (comfyui.EPS, comfyui.V_PREDICTION)
    ]
    found = []
    for space in spaces:
        other = model.clone()
        other.add_object_patch("model_sampling", space)
        found.append(nodes.patcher.model_hash(other))
        with other.loaded():
            assert nodes.patcher.model_hash(other) == found[-1]
    assert len({bare, *found}) == 3


def test_a_patch_that_holds_itself_ends(nodes, model):
    held = []
    held.append(held)
    assert nodes.patcher.model_hash(patched(model, "attn1_patch", lambda q: held)) != nodes.patcher.model_hash(model)


def test_patches_may_write_in_place(nodes, model):
    """Their result is the same, and backward reaches what was before them."""
    kept = nodes.patches.kept_for_backward({"patches": {"output_block_patch": [free_u(0.5)]}, "other": 1})
    (patch,) = kept["patches"]["output_block_patch"]
    assert kept["other"] == 1
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    h, _ = patch(x * 1.0, None, {})
    h.square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    half = expected[:, :2] * (1 + 0.5 * expected.mean(1, keepdim=True))
    whole = torch.cat([half, expected[:, 2:]], 1)
    whole.square().sum().backward()
    assert torch.equal(h, whole) and torch.allclose(x.grad, expected.grad, atol=1e-6)


def kept_between_calls():
    """As ToMe's two patches: one merges, the other undoes what it did."""
    undo = None

    def merge(q, k, v, options):
        nonlocal undo
        undo = lambda out: out * len(q)  # noqa: E731
        return q, k, v

    return merge, lambda out, options: undo(out)


def test_what_a_patch_keeps_of_its_last_call_is_not_in_the_key(nodes, model):
    merge, undo = kept_between_calls()
    both = patched(patched(model, "attn1_output_patch", undo), "attn1_patch", merge)
    before = nodes.patcher.model_hash(both)
    undo(merge(torch.ones(2), None, None, {})[0], {})
    assert nodes.patcher.model_hash(both) == before != nodes.patcher.model_hash(model)


def test_a_merged_model_s_own_patches_are_in_the_key(nodes, model):
    """As ModelMergeSimple puts them on: another model's weight, and what that model has patched onto it."""
    key, weight = next((k, v) for k, v in model.model.state_dict().items() if v.ndim > 1)

    def merged(strength):
        theirs = [(strength, SimpleNamespace(weights=(torch.ones(4), None, 2.0)), 1.0, None, None)] * (strength > 0)
        other = model.clone()
        other.patches[key] = [(0.5, [(weight, None), *theirs], 0.5, None, None)]
        return nodes.patcher.model_hash(other)

    assert merged(0.5) == merged(0.5) and len({merged(0), merged(0.5), merged(1.0)}) == 3


@pytest.fixture
def told(model, monkeypatch):
    """The `transformer_options` of every pass of the network."""
    found = []
    apply_model = type(model.model).apply_model
    monkeypatch.setattr(
        type(model.model),
        "apply_model",
        lambda self, *args, transformer_options, **more: [
            found.append(transformer_options),
            apply_model(self, *args, **more),
        ][1],
    )
    return found


def test_the_network_is_told_what_patches_look_at(nodes, model, told):
    sigma = torch.tensor([14.0, 7.0])
    with torch.no_grad():
        nodes.denoiser.ModelDenoiser(model)(torch.randn(2, 4, 8, 8), sigma, COND)
    assert told[0]["cond_or_uncond"] == [0] and torch.equal(told[0]["sigmas"], sigma)
    assert "sigmas" not in model.model_options["transformer_options"]


def test_patches_are_told_which_rows_are_the_negative_s(nodes, model, told):
    """As by ComfyUI's own sampling: in halves of a pass, or in two passes where some rows have no guidance."""
    sigma, x, uncond = torch.tensor([14.0, 7.0]), torch.randn(2, 4, 8, 8), Cond(torch.zeros(1, 3, 6))
    denoiser = nodes.denoiser.ModelDenoiser(patched(model, "output_block_patch", lambda h, hsp, options: (h, hsp)))
    with torch.no_grad():
        both = guided(denoiser, x, sigma, COND, uncond, Guidance(3.0))
        some = guided(denoiser, x, sigma, COND, uncond, Guidance(3.0), torch.tensor([True, False]))
        assert [found["cond_or_uncond"] for found in told] == [[0, 1], [0], [1]]
        assert torch.allclose(both[0], some[0], atol=1e-5)
        assert torch.allclose(some[1], denoiser(x, sigma, COND)[1], atol=1e-5)


def test_nodes_that_compare_with_the_negative_act_where_there_is_one(nodes, model, clip_of, comfyui):
    other = model.clone()
    with_negatives(other)
    host = nodes.training.ComfyUIHost(other, clip_of(), comfyui.Pictures(), "toy", 16, 16)
    host.sampled_by(None, None, Config(guidance=3.0))
    for settings in ({"guidance": 1.0}, {"guidance": 3.0, "guidance_end": 0.5}):
        with pytest.raises(ValueError, match="comes through RescaleCFG, which compares with the negative prompt"):
            host.sampled_by(None, None, Config(**settings))


def with_option(name, value):
    return lambda model: model.model_options.update({name: value})


def with_wrapper(model):
    model.wrappers["outer_sample"] = {"easycache": [lambda executor: executor()]}


def with_compilation(model):
    model.wrappers["apply_model"] = {"torch.compile": [lambda executor: executor()]}
    model.model_options["torch_compile_kwargs"] = {"backend": "inductor"}


def with_negatives(model):
    model.model_options["disable_cfg1_optimization"] = True
    model.model_options["transformer_options"]["patches"] = {"attn1_output_patch": [RescaleCFG.patch()]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (with_option("sampler_cfg_function", RescaleCFG.patch()), "RescaleCFG"),
        (with_option("sampler_post_cfg_function", [RescaleCFG.patch()]), "RescaleCFG"),
        (with_option("context_handler", RescaleCFG()), "RescaleCFG"),
        (with_wrapper, "easycache"),
        (lambda model: model.injections.update(bypass_lora=[1]), "bypass_lora"),
    ],
    ids=["cfg", "post_cfg", "context", "wrapper", "injection"],
)
def test_what_acts_outside_of_the_network_is_refused(nodes, model, clip_of, comfyui, change, named):
    other = model.clone()
    change(other)
    with pytest.raises(ValueError, match=f"comes through {named}, which acts on the sampling"):
        nodes.training.ComfyUIHost(other, clip_of(), comfyui.Pictures(), "toy", 16, 16)
    nodes.training.ComfyUIHost(model, clip_of(), comfyui.Pictures(), "toy", 16, 16)


@pytest.mark.parametrize(
    "change", [with_compilation, with_option("denoise_mask_function", len)], ids=["compiled", "mask"]
)
def test_what_changes_no_training_passes(nodes, model, change):
    other = model.clone()
    change(other)
    nodes.patches.check_patches(other)
    assert nodes.patcher.model_hash(other) == nodes.patcher.model_hash(model)
