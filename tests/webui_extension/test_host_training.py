"""The loaded checkpoints of AUTOMATIC1111 and Forge as the trainer's host: bare while trained, as before after it."""

import importlib.util
import json
import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from turbodistill.core.card import fingerprint
from turbodistill.core.student import Student
from turbodistill.trainer.config import Config
from turbodistill.trainer.run import run

KINDS = ("a1111", "forge")
WORDS = ("fox", "owl", "elk", "ant", "bee", "cod", "emu", "yak")
LAYER = "conv_out.weight"


@pytest.fixture(scope="module")
def models():
    """The stand-ins, by their path."""
    path = Path(__file__).parent / "stand_ins" / "models.py"
    spec = importlib.util.spec_from_file_location("turbodistill_webui_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loaded(SimpleNamespace):
    """A host with a model: `ours` are our modules over it, `host` is a function from the name of its module to that."""

    @property
    def network(self):
        return self.model.network if self.kind == "forge" else self.model.model.diffusion_model

    @property
    def module(self):
        """Our module of the one host or the other."""
        return self.ours.host_forge if self.kind == "forge" else self.ours.host_a1111

    def open(self, width=32, height=32):
        return self.ours.host_backend.HostBackend().open(width, height)

    def bits(self):
        return {k: v.clone() for k, v in self.network.state_dict().items()}

    def unchanged(self, before):
        return all(torch.equal(v, before[k]) for k, v in self.network.state_dict().items())

    def hooks(self):
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.network.modules())


@pytest.fixture
def loading(models, monkeypatch, tmp_path):
    """A host's short name and its model, or None -> a context with that host."""

    @contextmanager
    def enter(kind, model):
        with models.within(monkeypatch, model, tmp_path, kind == "forge") as ours:
            yield Loaded(kind=kind, model=model, ours=ours, host=lambda name: sys.modules[name])

    return enter


@pytest.fixture(params=KINDS)
def loaded(request, loading, models, toys):
    """Each host in turn, with its toy model."""
    model = models.Engine(toys) if request.param == "forge" else models.Compvis(toys)
    with loading(request.param, model) as found:
        yield found


@pytest.fixture
def a1111(loading, models, toys):
    with loading("a1111", models.Compvis(toys)) as found:
        yield found


@pytest.fixture
def forge(loading, models, toys):
    with loading("forge", models.Engine(toys)) as found:
        yield found


def learn(host):
    """One backward through a student; whether every layer of its LoRA got gradients."""
    student = Student(host.denoiser, rank=2)
    try:
        with student.training():
            sigma = host.denoiser.schedule.sigma(torch.tensor([999.0, 300.0]))
            x = torch.randn(2, *host.latent_shape)
            student(x, sigma, host.encode_text(["fox", "owl"])).square().mean().backward()
        return all(b.up.grad is not None for b in student.lora.each())
    finally:
        student.release()


def test_within_gradients_flow_and_all_is_as_before_after_it(loaded):
    before, flags = loaded.bits(), [p.requires_grad for p in loaded.network.parameters()]
    assert all(flags)
    for _ in range(2):  # a second training starts clean
        with torch.inference_mode(), loaded.open() as host:
            assert not any(p.requires_grad or p.is_inference() for p in loaded.network.parameters())
            assert host.denoiser.backbone is loaded.network and learn(host)
        assert loaded.unchanged(before) and loaded.hooks() == 0
        assert [p.requires_grad for p in loaded.network.parameters()] == flags


def test_all_is_as_before_after_an_error(loaded):
    before, lock = loaded.bits(), loaded.host("modules.call_queue").queue_lock
    with pytest.raises(MemoryError), torch.inference_mode(), loaded.open():
        assert lock.locked()
        raise MemoryError
    assert loaded.unchanged(before) and loaded.hooks() == 0 and not lock.locked()
    assert all(p.requires_grad for p in loaded.network.parameters())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_it_waits_for_the_lock(loaded):
    lock, opened = loaded.host("modules.call_queue").queue_lock, threading.Event()

    def work():
        with loaded.open():
            opened.set()

    thread = threading.Thread(target=work)
    with lock:
        thread.start()
        assert not opened.wait(0.2)
    assert opened.wait(20)
    thread.join()


def test_what_it_says_of_the_model(loaded):
    with loaded.open(48, 32) as host:
        assert host.name == "toy.safetensors" and host.architecture == "stable-diffusion-v1"
        assert host.base_hash == fingerprint(loaded.network) and len(host.text_hash) == 24
        assert host.latent_shape == (4, 4, 6) and host.resolution == (48, 32)
        before = host.text_hash
    loaded.host("modules.shared").opts.CLIP_stop_at_last_layers = 2
    with loaded.open() as host:
        assert host.text_hash != before and host.clip_skip == 2
    if loaded.kind == "forge":
        assert loaded.model.clip_skip == 2


def test_prompts_of_different_lengths_make_one_batch(loaded):
    with loaded.open() as host:
        cond = host.encode_text(["fox", "a very long prompt", ""])
    assert len(cond) == 3 and cond.context.shape[1] == 6 and not cond.context.is_inference()
    assert torch.equal(cond.context[0, :3], cond.context[0, 3:]) and not cond.context.requires_grad
    assert cond.pooled is None


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a fox <lora:mine:1>", r"'a fox <lora:mine:1>' names lora: .* leave the <...> out"),
        ("a fox AND an owl", "joins 2 prompts with AND"),
    ],
)
def test_prompts_that_are_more_than_text_are_refused(loaded, prompt, words):
    with loaded.open() as host, pytest.raises(ValueError, match=words):
        host.encode_text([prompt])


def test_a_text_that_comes_out_as_no_number_is_named(loaded, monkeypatch):
    monkeypatch.setattr(
        type(loaded.model),
        "get_learned_conditioning",
        lambda self, p: torch.full((1, 3, 6), float("nan" if p[0] else 0)),
    )
    with loaded.open() as host, pytest.raises(ValueError, match="no numbers of prompt 'fox'"):
        host.encode_text(["fox"])


def test_pictures_go_in_and_out(loaded):
    with torch.inference_mode(), loaded.open() as host:
        latents = torch.rand(2, 4, 4, 4) / 2
        latents[:, 3] = 0
        pictures = host.decode(latents)
        assert pictures.shape == (2, 3, 32, 32) and pictures.min() >= 0 and pictures.max() <= 1
        again = host.encode_images(pictures)  # the mean, not a draw
        assert torch.allclose(again, latents, atol=1e-6) and not again.is_inference() and not again.requires_grad
        assert not host.decode(latents).is_inference() and learn(host)


def test_a_size_that_the_vae_cannot_make_is_refused(loaded):
    before = loaded.bits()
    with pytest.raises(ValueError, match="36 x 32 pixels: give multiples of 8"), loaded.open(36, 32):
        pass
    assert loaded.unchanged(before) and all(p.requires_grad for p in loaded.network.parameters())


def test_an_sdxl_s_conditioning_comes_whole(loading, models, toys):
    with loading("a1111", models.Large(toys)) as found, found.open(48, 32) as host:
        cond = host.encode_text(["fox", ""])
        assert host.architecture == "stable-diffusion-xl-v1-base"
    assert torch.equal(cond.pooled, torch.tensor([[48.0, 32.0], [48.0, 32.0]]))
    assert cond.context[0].any() and not cond.context[1].any()  # as an empty negative prompt


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_checkpoint_it_says_so(loading, kind):
    with loading(kind, None) as found:
        backend = found.ours.host_backend.HostBackend()
        assert backend.checkpoint() == "" and backend.sizes == (512, 512)
        with pytest.raises(ValueError, match="there is no checkpoint: put one into"), backend.open(32, 32):
            pass
        assert not found.host("modules.call_queue").queue_lock.locked()


def test_another_checkpoint_in_its_place_ends_the_pass_in_words(loaded):
    data = loaded.host("modules.sd_models").model_data
    with (
        pytest.raises(ValueError, match=r"another checkpoint was loaded in place of toy.safetensors"),
        loaded.open() as host,
    ):
        data.sd_model = object()
        learn(host)
    data.sd_model = loaded.model
    assert loaded.hooks() == 0 and all(p.requires_grad for p in loaded.network.parameters())


def test_other_weights_in_the_same_model_do_so_too(a1111):
    """AUTOMATIC1111 reuses a model's modules for a file of the same architecture."""
    with pytest.raises(ValueError, match="another checkpoint was loaded"), a1111.open() as host:
        a1111.model.sd_checkpoint_info = SimpleNamespace(filename="/models/other.safetensors")
        learn(host)


def test_an_error_that_comes_of_a_checkpoint_taken_away_is_told_as_that(a1111):
    with pytest.raises(ValueError, match=r"toy.safetensors was unloaded while it was trained"), a1111.open():
        a1111.network.to("meta")
        raise RuntimeError("Expected all tensors to be on the same device")


# AUTOMATIC1111's own.


def test_loras_merged_in_place_are_taken_out_and_come_back(a1111):
    networks, layer = a1111.host("networks"), a1111.network.conv_out
    bare = a1111.bits()
    networks.loaded_networks.append("mine")
    networks.network_apply_weights(layer)
    with a1111.open() as host:
        assert a1111.unchanged(bare) and host.base_hash == fingerprint(bare) and networks.loaded_networks == []
        assert learn(host)
    assert networks.loaded_networks == ["mine"]
    networks.network_apply_weights(layer)  # as the next pass does
    assert torch.equal(layer.weight, bare[LAYER] + 1)


def test_hypernetworks_tiling_hypertile_and_engines_are_off_meanwhile(a1111):
    shared, hijack = a1111.host("modules.shared"), a1111.host("modules.sd_hijack").model_hijack
    shared.loaded_hypernetworks.append("mine")
    hijack.apply_circular(True)
    tiles = SimpleNamespace(enabled=True)
    setattr(a1111.network.conv_in, a1111.ours.host_a1111.HYPERTILE, tiles)
    with a1111.open():
        assert shared.loaded_hypernetworks == [] and not hijack.circular_enabled and not tiles.enabled
        assert a1111.host("modules.sd_unet").told.unets == ["None"]
    assert shared.loaded_hypernetworks == ["mine"] and hijack.circular_enabled and tiles.enabled


def test_with_medvram_the_unet_comes_back_after_the_others(a1111):
    seen = []
    a1111.model.lowvram = True
    a1111.model.model.register_forward_pre_hook(lambda module, _: seen.append(module))
    with a1111.open() as host:
        assert seen == [a1111.model.model]
        host.encode_text(["fox"])
        host.decode(torch.zeros(1, 4, 4, 4))
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_sd3": True}, "is a Stable Diffusion 3, which is not distilled here: use Forge or ComfyUI"),
        ({"is_sdxl_inpaint": True}, "a picture or a mask beside the latent"),
        ({"parameterization": "x0"}, "predicts 'x0': known are eps and v"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_in_words(a1111, change, words):
    vars(a1111.model).update(change)
    with pytest.raises(ValueError, match=words), a1111.open():
        pass


def test_an_inpainting_model_is_refused(a1111):
    a1111.model.model.conditioning_key = "hybrid"
    with pytest.raises(ValueError, match="a picture or a mask beside the latent"), a1111.open():
        pass


def test_lowvram_is_refused(a1111):
    a1111.host("modules.shared").cmd_opts.lowvram = True
    with pytest.raises(ValueError, match=r"with --lowvram .* start with --medvram"), a1111.open():
        pass


# Forge's own.


def test_what_was_made_in_inference_mode_takes_no_gradients_by_itself(forge):
    with forge.open() as host:
        denoiser = host.denoiser
    fresh = forge.network
    with torch.inference_mode():
        for module in fresh.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = nn.Parameter(parameter.clone())
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
        learn(SimpleNamespace(denoiser=denoiser, latent_shape=(4, 4, 4), encode_text=lambda _: toy_text()))


def toy_text():
    from turbodistill.core.denoiser import Cond

    return Cond(torch.randn(2, 3, 6))


def test_a_lora_that_is_applied_is_taken_out_and_comes_back(forge):
    objects = forge.model.forge_objects_original
    bare = forge.bits()
    mine = objects.unet.clone({f"diffusion_model.{LAYER}": 1.0})
    mine.refresh_loras()
    forge.model.forge_objects = applied = type(objects)(mine, objects.clip, objects.vae)
    assert torch.equal(forge.network.conv_out.weight, bare[LAYER] + 1)
    with forge.open() as host:
        assert forge.unchanged(bare) and host.base_hash == fingerprint(bare) and learn(host)
    assert forge.model.forge_objects is applied
    mine.refresh_loras()  # as the next generation does
    assert torch.equal(forge.network.conv_out.weight, bare[LAYER] + 1)


def test_zero_terminal_noise_levels_are_those_of_a_generation(forge):
    predictor = forge.model.forge_objects_original.unet.model.predictor
    before = predictor.sigmas.clone()
    forge.host("modules.shared").opts.sd_noise_schedule = "Zero Terminal SNR"
    with forge.open() as host:
        assert host.denoiser.schedule.sigma_max == pytest.approx(2 * float(before[-1]), rel=1e-4)
    assert torch.equal(predictor.sigmas, before)


def test_float16_is_computed_in_float32_and_in_one_stream(forge):
    base, stream = forge.model.forge_objects_original.unet.model, forge.host("backend.stream")
    base.computation_dtype = torch.float16
    base.diffusion_model.conv_in.parameters_manual_cast = False
    with forge.open():
        assert base.computation_dtype == torch.float32 and base.diffusion_model.conv_in.parameters_manual_cast
        assert not stream.stream_activated
    assert base.computation_dtype == torch.float16 and not base.diffusion_model.conv_in.parameters_manual_cast
    assert stream.stream_activated


@pytest.mark.parametrize(("mark", "words"), [("bnb_quantized", "nf4 or fp4"), ("gguf_cls", "GGUF")])
def test_weights_in_blocks_of_bits_are_refused(forge, mark, words):
    setattr(forge.network.conv_in.weight, mark, True)
    with pytest.raises(ValueError, match=f"keeps its weights as .*{words}.*load it in fp8, fp16 or bf16"), forge.open():
        pass


def test_a_forge_inpainting_model_is_refused(forge):
    forge.model.model_config.unet_config["in_channels"] = 9
    with pytest.raises(ValueError, match="a picture or a mask beside the latent"), forge.open():
        pass


def test_a_longer_prompt_goes_by_itself_where_its_tokens_stand_beside_the_picture_s(forge):
    del forge.network.input_blocks
    with forge.open() as host:
        assert host.joint
        both = host.encode_text(["a fox", "a very long prompt"])
        assert both.lengths["context"].tolist() == [3, 6] and both.context.shape[1] == 6
        assert not both.context[0, 3:].any() and not host.encode_text(["a fox"]).lengths


@pytest.mark.slow
def test_the_trainer_runs_on_it(loaded, tmp_path):
    before = loaded.bits()
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
        **{"precision": "float32", "evaluate_every": 2, "preview_every": 2, "gradient_checkpointing": True},
    )
    with torch.inference_mode(), loaded.open() as host:
        *_, finished = run.run(host, config, tmp_path, WORDS)
    assert loaded.unchanged(before) and loaded.hooks() == 0
    assert finished.card.base_model == "toy.safetensors" and finished.card.base_hash == fingerprint(before)


def test_a_kin_of_forge_that_is_not_known_is_told_so(forge, monkeypatch):
    backend = forge.ours.host_backend.HostBackend()
    assert backend.refusal() == ""
    monkeypatch.delitem(sys.modules, "backend.memory_management")
    assert backend.checkpoint() == "toy"  # the page is drawn
    assert "keeps its models in a way that is not known here" in backend.refusal()


def test_a_transformer_that_has_no_gradient_is_refused(forge, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_kitchen", sys)  # as in Neo
    forge.ours.host_forge.check(forge.model)
    del forge.model.network.input_blocks
    with pytest.raises(ValueError, match=r"comfy_kitchen\) has no gradient"):
        forge.ours.host_forge.check(forge.model)


def test_a_checkpoint_for_1024_pixels_is_told_by_its_file(a1111, tmp_path):
    path = tmp_path / "large.safetensors"
    save_file({"conditioner.embedders.1.model.ln_final.weight": torch.zeros(1)}, path)
    backend = a1111.ours.host_backend.HostBackend()
    a1111.model.sd_checkpoint_info.filename = str(path)
    assert backend.sizes == (1024, 1024)
    path.write_bytes(b"broken")
    assert backend.sizes == (512, 512)


def test_forge_s_choice_counts_before_what_is_loaded(forge):
    other = SimpleNamespace(filename="/models/other.safetensors", name_for_extra="other")
    forge.host("modules.sd_models").model_data.forge_loading_parameters = {"checkpoint_info": other}
    assert forge.ours.host_backend.HostBackend().checkpoint() == "other"


def test_a_backend_knows_its_host_s_folders(loaded, tmp_path):
    backend = loaded.ours.host_backend.HostBackend()
    assert backend.name == {"a1111": "AUTOMATIC1111", "forge": "Forge"}[loaded.kind]
    assert backend.checkpoint() == "toy" and backend.sizes == (512, 512) and backend.free_memory() is None
    assert backend.runs_folder() == tmp_path / "outputs" / "turbodistill" / "runs"
    assert backend.students_folder() == tmp_path / "Lora" and list(backend.prompts()) == ["auto", "prose", "tags"]


def test_the_list_that_suits_is_told_by_the_checkpoint_s_file(a1111, tmp_path):
    backend, info = a1111.ours.host_backend.HostBackend(), a1111.model.sd_checkpoint_info
    info.filename, info.name_for_extra = str(tmp_path / "wai.safetensors"), "waiIllustrious_v14"
    assert backend.suggestion().words.endswith("of tags, since the model's name says wai")  # there is no file yet
    assert backend.prompts()["auto"] == backend.prompts()["tags"] != backend.prompts()["prose"]
    learnt = {"ss_tag_frequency": json.dumps({"a": {"a photograph of a red fox in snow": 40}})}
    save_file({"a": torch.zeros(1)}, info.filename, learnt)
    assert "metadata says that it learnt sentences" in backend.suggestion().words
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1), "img_in.weight": torch.zeros(1),
               "vector_in.in_layer.weight": torch.zeros(1)}, info.filename)  # fmt: skip
    os.utime(info.filename, ns=(1, 1))
    assert "flux-1-schnell" in backend.suggestion().words and backend.suggestion().name == "prose"


def test_wildcards_are_the_webui_s_and_its_extensions(a1111, tmp_path, monkeypatch):
    backend, shared = a1111.ours.host_backend.HostBackend(), a1111.host("modules.shared")
    extensions = tmp_path / "extensions"
    theirs = [extensions / name / "wildcards" for name in ("sd-dynamic-prompts", "stable-diffusion-webui-wildcards")]
    assert backend.wildcards() == [tmp_path / "wildcards", *theirs]
    monkeypatch.setattr(shared.opts, "wildcard_dir", "/data/mine", raising=False)
    assert backend.wildcards() == [tmp_path / "wildcards", Path("/data/mine"), theirs[1]]
    monkeypatch.setattr(shared.cmd_opts, "listen", True, raising=False)  # a setting that others could change
    assert backend.wildcards() == [tmp_path / "wildcards", theirs[1]]


@pytest.mark.parametrize(
    ("name", "refused"),
    [("double_blocks.0.img_attn.qkv.weight", True), ("model.diffusion_model.input_blocks.0.0.weight", False)],
)
def test_a_transformer_without_gradient_is_refused_before_the_click(forge, monkeypatch, tmp_path, name, refused):
    monkeypatch.setitem(sys.modules, "comfy_kitchen", sys)  # as in Neo
    backend, info = forge.ours.host_backend.HostBackend(), forge.model.sd_checkpoint_info
    monkeypatch.setattr(info, "filename", str(tmp_path / "model.safetensors"))
    assert backend.refusal() == ""  # there is no file yet
    save_file({name: torch.zeros(1)}, info.filename)
    assert ("has no gradient in this WebUI" in backend.refusal()) == refused
