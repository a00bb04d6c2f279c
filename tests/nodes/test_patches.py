"""What other nodes put on a MODEL: part of the teacher and of its pairs' key, or refused in words."""

import pytest
import torch
from turbodistill.core.denoiser import Cond

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


def test_the_network_is_told_what_patches_look_at(nodes, model, monkeypatch):
    told = []
    apply_model = type(model.model).apply_model
    monkeypatch.setattr(
        type(model.model),
        "apply_model",
        lambda self, *args, transformer_options, **more: [
            told.append(transformer_options),
            apply_model(self, *args, **more),
        ][1],
    )
    sigma = torch.tensor([14.0, 7.0])
    with torch.no_grad():
        nodes.denoiser.ModelDenoiser(model)(torch.randn(2, 4, 8, 8), sigma, COND)
    assert told[0]["cond_or_uncond"] == [0] and torch.equal(told[0]["sigmas"], sigma)
    assert "sigmas" not in model.model_options["transformer_options"]


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
        (with_negatives, "RescaleCFG"),
        (lambda model: model.injections.update(bypass_lora=[1]), "bypass_lora"),
    ],
    ids=["cfg", "post_cfg", "context", "wrapper", "negatives", "injection"],
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
