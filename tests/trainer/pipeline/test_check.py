"""What stands in the way is said before anything is changed: what it is, and what to do."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from turbodistill import load_model, use_student
from turbodistill.trainer.pipeline.host import ModelError


def other_class(pipe):
    own = {"__init__": type(pipe).__init__}
    pipe.__class__ = type("StableCascadePipeline", type(pipe).__bases__, own)


def without_vae(pipe):
    pipe.vae = None


def of_another_network(pipe):
    pipe.unet = nn.Linear(2, 2)


def for_inpainting(pipe):
    pipe.unet.register_to_config(in_channels=9)


def with_ip_adapter(pipe):
    pipe.unet.encoder_hid_proj = nn.Identity()


def of_a_consistency_model(pipe):
    pipe.unet.register_to_config(time_cond_proj_dim=16)


def on_meta(pipe):
    pipe.unet.to("meta")


def in_eight_bits(pipe):
    pipe.unet.conv_in.weight = nn.Parameter(pipe.unet.conv_in.weight.to(torch.int8), requires_grad=False)


def in_float8(pipe):
    pipe.unet.conv_in.to(torch.float8_e4m3fn)


def fused(pipe):
    pipe.unet.fuse_qkv_projections()


def with_another_prediction(pipe):
    pipe.scheduler.register_to_config(prediction_type="sample")


def with_a_flow_s_scheduler(pipe):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler()


BOTH = [  # of a training, and of a student that stays
    (other_class, "a StableCascadePipeline cannot be distilled: give one of StableDiffusionPipeline, .*SanaPipeline"),
    (without_vae, "this StableDiffusionPipeline has no vae: load it with all its parts"),
    (of_another_network, "the unet of this StableDiffusionPipeline is a Linear: it must be a UNet2DConditionModel"),
    (for_inpainting, "takes 9 channels and its vae makes 4: it wants a picture or a mask"),
    (with_ip_adapter, r"carries an IP-Adapter.*pipe\.unload_ip_adapter\(\)"),
    (of_a_consistency_model, "is distilled already .*: give its base"),
    (on_meta, r"weights of the unet are not in memory .*pipe\.remove_all_hooks\(\)"),
    (in_eight_bits, r"the unet is quantised \(Parameter\): load it in float32"),
    (in_float8, r"the unet is quantised \(float8_e4m3fn\)"),
    (fused, r"attention of this StableDiffusionPipeline is fused.*pipe\.unfuse_qkv_projections\(\)"),
    (with_another_prediction, "prediction_type is 'sample': known are epsilon and v_prediction"),
    (with_a_flow_s_scheduler, "FlowMatchEulerDiscreteScheduler has no alphas_cumprod"),
]


def offloaded(pipe):
    pipe.vae._hf_hook = SimpleNamespace()


def mapped(pipe):
    pipe.unet.hf_device_map = {"": "cpu"}


def cached(pipe):
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig())


def cast_layer_by_layer(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def in_float16(pipe):
    nn.Module.to(pipe.unet, torch.float16)


def of_inference_mode(pipe):
    with torch.inference_mode():
        pipe.unet.conv_in.weight = nn.Parameter(torch.zeros_like(pipe.unet.conv_in.weight), requires_grad=False)


def without_text(pipe):
    pipe.text_encoder = None


def without_any_text(pipe):
    for k in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        setattr(pipe, k, None)


def refining(pipe):
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipe.__class__ = StableDiffusionXLImg2ImgPipeline
    pipe.register_to_config(requires_aesthetics_score=True)


TRAINING = [
    ("sd", without_text, "this StableDiffusionPipeline has no text_encoder: load it with all its parts"),
    ("sdxl", without_any_text, "this StableDiffusionXLPipeline has no text_encoder"),
    ("sdxl", refining, "is a refiner, which begins from another model's picture"),
    ("sd", offloaded, r"the vae is moved for every pass \(accelerate's SimpleNamespace\).*pipe\.remove_all_hooks\(\)"),
    ("sd", mapped, r"the unet is moved for every pass \(a device map\).*pipe\.reset_device_map\(\)"),
    (
        "flux-dev",
        cached,
        r"the transformer is changed by hooks of diffusers \(.*\): .*pipe\.transformer\.disable_cache\(\)",
    ),
    ("flux-dev", cast_layer_by_layer, r"the transformer is changed by hooks of diffusers \(layerwise_casting"),
    ("sd", in_float16, r"in float16, which has no room .* on a CPU: pipe\.to\(torch\.bfloat16\)"),
    ("sd", of_inference_mode, r"loaded in torch\.inference_mode"),
]


@pytest.mark.parametrize(("change", "told"), BOTH, ids=lambda value: getattr(value, "__name__", ""))
def test_a_pipeline_on_which_no_student_can_be_is_told(tiny_kit, students, change, told):
    path = students("sd").path
    pipe = tiny_kit.tiny.make("sd")
    change(pipe)
    for attempt in (lambda: load_model(pipe), lambda: use_student(pipe, path)):
        before = tiny_kit.everything(pipe) if change is not on_meta else None
        with pytest.raises(ModelError, match=told):
            attempt()
        assert before is None or tiny_kit.everything(pipe) == before


@pytest.mark.parametrize(("kind", "change", "told"), TRAINING, ids=lambda value: getattr(value, "__name__", ""))
def test_a_pipeline_that_cannot_be_trained_on_is_told(tiny_kit, kind, change, told):
    pipe = tiny_kit.tiny.make(kind)
    change(pipe)
    before = tiny_kit.everything(pipe)
    with pytest.raises(ModelError, match=told):
        load_model(pipe)
    assert tiny_kit.everything(pipe) == before


def test_a_transformer_with_a_scheduler_that_is_none_for_flows_is_told(tiny_kit):
    from diffusers import DDIMScheduler

    pipe = tiny_kit.tiny.make("sd3")
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ModelError, match="the scheduler DDIMScheduler is none for a flow"):
        load_model(pipe)


def test_another_scheduler_of_flows_has_the_same_noise_levels(tiny_kit):
    from diffusers import DPMSolverMultistepScheduler

    pipe = tiny_kit.tiny.make("sana")
    shift = load_model(pipe).denoiser.schedule.shift
    pipe.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    assert load_model(pipe).denoiser.schedule.shift == shift == 3.0


def test_a_device_where_the_pipeline_is_not_is_told(tiny_kit):
    with pytest.raises(ModelError, match=r"the pipeline is on cpu, and stays there: call pipe\.to\('cuda'\)"):
        load_model(tiny_kit.tiny.make("sd"), "cuda")
    assert load_model(tiny_kit.tiny.make("sd"), "cpu").denoiser.device.type == "cpu"


def test_a_compiled_network_is_trained_on_uncompiled_and_gets_no_student(tiny_kit, students, tmp_path):
    """Whether it is compiled in place or wrapped; a compiler that cannot run shows that it is not called."""

    def refuse(*_):
        raise AssertionError("compiled")

    for wrap in (False, True):
        pipe = tiny_kit.tiny.make("sd")
        if wrap:
            pipe.unet = torch.compile(pipe.unet, backend=refuse)
        else:
            pipe.unet.mid_block.compile(backend=refuse)
            pipe.unet.compile(backend=refuse)
        compiled = pipe.unet, pipe.unet._compiled_call_impl
        model = tiny_kit.host("sd", pipe)
        tiny_kit.distil(model, tmp_path / str(wrap), updates=1)
        assert (pipe.unet, pipe.unet._compiled_call_impl) == compiled
        with pytest.raises(ModelError, match=r"the unet is compiled.*: compile it afterwards"):
            use_student(pipe, students("sd").path)


def test_what_is_no_model_is_told():
    with pytest.raises(ModelError, match="does not exist"):
        load_model("nothing")
    for size, told in (
        ((63, 64), "give multiples of"),
        ((64,), "give width and height"),
        ((64, 0.5), "give width and"),
    ):
        with pytest.raises(ModelError, match=told):
            load_model(size=size)


def test_stable_diffusion_3_works_without_its_third_encoder(tiny_kit):
    pipe = tiny_kit.tiny.make("sd3")
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    assert not load_model(pipe).encode_text(["a"]).context[:, 16:].any()


def test_offloading_is_told_to_a_training(tiny_kit):
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate: pip install 'turbodistill[test]'")
    pipe = tiny_kit.tiny.make("sd3")
    hooks.add_hook_to_module(pipe.transformer, hooks.CpuOffload("cpu"))
    with pytest.raises(ModelError, match=r"the transformer is moved for every pass \(accelerate's CpuOffload\)"):
        load_model(pipe)
    pipe.remove_all_hooks()
    load_model(pipe)
