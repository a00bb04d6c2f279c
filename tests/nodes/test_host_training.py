"""A loaded checkpoint as the trainer's host: gradients on ComfyUI's own weights, which stay as they were."""

import pytest
import torch
from turbodistill.core.denoiser import Cond
from turbodistill.core.student import Student
from turbodistill.trainer.config import Config
from turbodistill.trainer.run import run

WORDS = ("fox", "owl", "elk", "ant", "bee", "cod", "emu", "yak")


@pytest.fixture
def host_of(nodes, comfyui, clip_of):
    """A MODEL -> the trainer's host over it."""

    def build(model, width=16):
        return nodes.training.ComfyUIHost(model, clip_of(), comfyui.Pictures(), "toy", width, 16)

    return build


def learn(nodes, toys, model):
    """One backward through a student of the MODEL; whether its LoRA got gradients."""
    denoiser = nodes.denoiser.ModelDenoiser(model)
    student = Student(denoiser, rank=2)
    try:
        with student.training():
            sigma = denoiser.schedule.sigma(torch.tensor([999.0, 300.0]))
            student(toys.picture(), sigma, toys.cond()).square().mean().backward()
        return all(b.up.grad is not None for b in student.lora.each())
    finally:
        student.release()


def test_what_was_loaded_in_inference_mode_takes_no_gradients_by_itself(nodes, toys, loaded):
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
        learn(nodes, toys, loaded())


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_within_it_does_and_the_weights_stay_to_the_bit(kit, nodes, toys, loaded, prediction):
    model = loaded(prediction)
    before, flags = kit.bits(model), [p.requires_grad for p in model.model.parameters()]
    assert all(flags)
    for _ in range(2):  # a second training starts clean
        with torch.inference_mode(), nodes.training.trainable(model):
            assert not any(p.requires_grad for p in model.model.parameters())
            assert learn(nodes, toys, model)
        assert kit.same(kit.bits(model), before)
        assert [p.requires_grad for p in model.model.parameters()] == flags


def test_flags_are_restored_after_an_error(nodes, loaded):
    model = loaded()
    with pytest.raises(MemoryError), torch.inference_mode(), nodes.training.trainable(model):
        raise MemoryError
    assert all(p.requires_grad for p in model.model.parameters())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_prompts_of_different_lengths_make_one_batch(loaded, host_of):
    cond = host_of(loaded()).encode_text(["fox", "a very long prompt", ""])
    assert len(cond) == 3 and cond.context.shape[1] == 6
    assert torch.equal(cond.context[0, :3], cond.context[0, 3:]) and not cond.context.is_inference()


def test_text_is_as_long_as_it_is_where_its_tokens_stand_beside_the_picture_s(comfyui, loaded, host_of):
    """As in Flux and SD3: repeated there, text tokens would count double."""
    model = loaded()
    model.model.extra_conds = lambda cross_attn, **_: {"c_crossattn": comfyui.models.CONDRegular(cross_attn)}
    host = host_of(model)
    short = host.encode_text(["fox", ""])
    assert short.context.shape == (2, 3, 6) and not short.lengths
    cond = host.encode_text(["fox", "a very long prompt"])
    assert cond.lengths["context"].tolist() == [3, 6] and not cond.context[0, 3:].any()
    both, x, sigma = Cond.cat([cond, short]).rows([1, 0, 3]), torch.randn(3, 4, 8, 8), torch.tensor([5.0, 1.0, 2.0])
    texts = [host.encode_text([text]) for text in ("a very long prompt", "fox", "")]
    with torch.no_grad():
        alone = [host.denoiser(x[k : k + 1], sigma[k : k + 1], text) for k, text in enumerate(texts)]
        assert torch.allclose(host.denoiser(x, sigma, both), torch.cat(alone), atol=1e-5)


def test_pictures_go_in_and_out(loaded, host_of):
    host = host_of(loaded())
    assert host.latent_shape == (4, 8, 8) and host.resolution == (16, 16)
    latents = torch.randn(2, 4, 8, 8)
    pictures = host.decode(latents)
    assert pictures.shape == (2, 3, 16, 16)
    assert torch.equal(host.encode_images(pictures)[:, :3], latents[:, :3])


def test_a_size_that_the_vae_cannot_make_is_refused(loaded, host_of):
    with pytest.raises(ValueError, match="17 x 16 pixels: give multiples of 2"):
        host_of(loaded(), 17)


def test_a_student_is_not_distilled_again(nodes, loaded, host_of):
    from turbodistill.core.families import SamplingRecipe

    with pytest.raises(ValueError, match="sampled as SDXL-Turbo already"):
        host_of(nodes.patcher.with_sampling(loaded(), SamplingRecipe("SDXL-Turbo")))


# --- weights that do not stay on the device ---


@pytest.fixture
def dynamic(comfyui, loaded, toys):
    """The MODEL of a checkpoint as ComfyUI 0.33 loads it on a GPU: its weights are streamed there for every pass."""

    def build():
        def read(path, disable_dynamic=False):
            assert path == "toy.safetensors"
            model = loaded(make=toys.row)
            return (model if disable_dynamic else comfyui.ModelPatcherDynamic(model.model), None)

        model, _ = read("toy.safetensors")
        model.cached_patcher_init = (read, ("toy.safetensors",), 0)
        return model

    return build


@pytest.mark.parametrize("rank", [2, 0])
def test_streamed_weights_are_left_alone_and_others_of_the_same_file_trained(nodes, graph, dynamic, kit, places, rank):
    pairs = graph.pairs()
    graph.distill(pairs, "ordinary", rank=rank)
    graph.model = dynamic()
    tensors = {name: value.data_ptr() for name, value in graph.model.model.state_dict().items()}
    assert graph.pairs().folder == pairs.folder
    model, student, *_ = graph.distill(pairs, "streamed", rank=rank)
    assert kit.same(kit.tensors(places, "streamed"), kit.tensors(places, "ordinary"))
    assert {name: value.data_ptr() for name, value in graph.model.model.state_dict().items()} == tensors
    assert all(p.requires_grad and p.is_inference() for p in graph.model.model.parameters())
    assert kit.hooks(graph.model) == 0
    assert model.is_dynamic() and model.model is graph.model.model  # what is put out holds no second copy
    assert student.model is model


def test_what_is_patched_onto_streamed_weights_is_trained_with(nodes, dynamic, comfyui):
    model = dynamic()
    change = {"diffusion_model.conv_in.weight": (torch.ones(1),)}
    model.add_patches(change)
    with torch.inference_mode(), nodes.training.trainable(model) as trained:
        assert type(trained) is comfyui.ModelPatcher and trained.model is not model.model
        assert trained.patches == model.patches


def test_streamed_weights_that_cannot_be_read_again_are_refused(nodes, dynamic, host_of):
    model = dynamic()
    model.cached_patcher_init = None
    refused = pytest.raises(ValueError, match=r"its loader cannot load them .* --disable-dynamic-vram")
    with refused, torch.inference_mode(), nodes.training.trainable(model):
        pass
    with refused:
        host_of(model)  # before any pairs are made


def test_quantised_weights_without_a_gradient_are_refused(nodes, loaded, host_of):
    model = loaded()
    model.model.diffusion_model.conv_in.quant_format = "nvfp4"
    host_of(model)
    model.model.diffusion_model.conv_in.quant_format = "convrot_w4a4"
    refused = pytest.raises(ValueError, match=r"quantised as convrot_w4a4, .* load the model in another format")
    with refused:
        host_of(model)
    with refused, torch.inference_mode(), nodes.training.trainable(model):
        pass


def test_weights_that_stay_off_the_device_are_refused(nodes, loaded):
    """As with --novram; the device is one that computes nothing."""
    model = loaded()
    model.load_device = torch.device("meta")
    flags = [p.requires_grad for p in model.model.parameters()]
    refused = pytest.raises(ValueError, match=r"10 of the model's weights stay on the cpu.* start ComfyUI without")
    with refused, torch.inference_mode(), nodes.training.trainable(model):
        pass
    assert [p.requires_grad for p in model.model.parameters()] == flags


@pytest.mark.slow
def test_the_trainer_runs_on_it_and_its_student_loads(kit, nodes, loaded, host_of, tmp_path):
    model = loaded()
    before = kit.bits(model)
    config = Config(
        **{
            "rank": 2,
            "pairs": 12,
            "pair_steps": 2,
            "batch_size": 4,
            "updates": 4,
            "regression_updates": 1,
            "adversarial_ramp": 0,
            "head_channels": 8,
        },
        **{"taps": "conv_in,down", "precision": "float32", "evaluate_every": 2, "preview_every": 2},
    )
    with torch.inference_mode(), nodes.training.trainable(model):
        *_, finished = run.run(host_of(model), config, tmp_path, WORDS)
    assert kit.same(kit.bits(model), before)
    tensors, card = nodes.load.read_student(finished.path)
    patched, warning = nodes.patcher.with_student(model, tensors, card, 1.0, "student.safetensors")
    assert warning == "" and len(patched.patches) == len(tensors) // 3 and card.base_model == "toy"
