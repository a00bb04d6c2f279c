"""A vision transformer that judges decoded pictures: ADD's own discriminator."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model
from turbodistill.core.features import VisionFeatures
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.loop import start, steps
from turbodistill.trainer.loop.batch import Reals, draw_batch, generator
from turbodistill.trainer.loop.distill import Step
from turbodistill.trainer.loop.feature_cache import FeatureCache
from turbodistill.trainer.loop.pixel_backbone import load_vision
from turbodistill.trainer.run.estimate import estimate

PATCH, BLOCKS, WIDTH = 8, 4, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny, untrained vision transformer in transformers' layout."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Dinov2Model(Dinov2Config(image_size=32, patch_size=PATCH, layerscale_value=0.5, **shape))
    path = tmp_path_factory.mktemp("pixel_backbone")
    network.save_pretrained(path)
    return path


@pytest.fixture
def settings(kit, folder):
    return lambda **changes: kit.config(**({"pixel_backbone": str(folder), "taps": ""} | changes))


def seen(state, output, batch):
    """The positives and the student's pictures as the discriminator sees them."""
    return steps.real_inputs(state, batch), steps.head_inputs(state, output, batch.cond, batch)


def made(kit, host, settings, folder):
    samples = kit.pairs(host, settings, folder)
    state = kit.state(host, settings, samples)
    return state, samples, draw_batch(settings, state.student, samples, None, generator(0, 0))


def test_the_one_that_comes_with_the_clone():
    network, patch = load_vision("embedded")
    assert (patch, network.config.num_hidden_layers, network.config.hidden_size) == (14, 4, 384)
    features = VisionFeatures(network, patch, lambda x: x, 70)
    assert features.taps == ["encoder.layer.1", "encoder.layer.3"]
    with torch.no_grad():
        maps = features(torch.rand(2, 3, 64, 64), torch.zeros(2), ...)
    assert [m.shape for m in maps] == [(2, 384, 5, 5)] * 2
    assert all(m.isfinite().all() and m.std((0, 2, 3)).min() > 0 for m in maps)


def test_its_maps_are_the_blocks_outputs_by_rows_and_columns(folder):
    network, patch = load_vision(str(folder))
    features = VisionFeatures(network, patch, lambda x: x)
    pictures = torch.rand(2, 3, 16, 32)
    normal = (pictures - torch.tensor(features.MEAN)[:, None, None]) / torch.tensor(features.STD)[:, None, None]
    with torch.no_grad():
        states = network(normal, output_hidden_states=True).hidden_states
        maps = features(pictures, torch.zeros(2), ...)
    for found, expected in zip(maps, (states[2], states[4]), strict=True):
        assert torch.allclose(found, expected[:, 1:].reshape(2, 2, 4, WIDTH).permute(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize(("size", "shape"), [(0, (2, 4)), (64, (4, 8)), (8, (1, 1)), (20, (2, 3))])
def test_pictures_are_scaled_to_the_size_asked_for_in_whole_patches(folder, size, shape):
    network, patch = load_vision(str(folder))
    features = VisionFeatures(network, patch, lambda x: x, size)
    assert features(torch.rand(1, 3, 16, 32), torch.zeros(1), ...)[0].shape == (1, WIDTH, *shape)


def test_the_pass_ends_at_the_last_tap(folder):
    network, patch = load_vision(str(folder))
    features = VisionFeatures(network, patch, lambda x: x, taps=["encoder.layer.1"])
    network.encoder.layer[2].register_forward_hook(lambda *_: pytest.fail("a block that nobody taps has run"))
    assert len(features(torch.rand(1, 3, 16, 16), torch.zeros(1), ...)) == 1


def test_it_sees_the_clean_picture_and_the_gradient_reaches_the_student(kit, host, settings, tmp_path):
    state, _, batch = made(kit, host, settings(), tmp_path)
    before = kit.weights(state.features.network)
    with state.student.training():
        real, fake = seen(state, state.student(batch.x, batch.sigma, batch.cond), batch)
        sum(x.square().mean() for x in fake.maps).backward()
    clean = state.features(batch.target, torch.zeros(4), batch.cond)
    expected = state.discriminator.standardise(clean)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(real.maps, expected, strict=True))
    assert (real.sigma == 0).all()
    assert all(p.grad is not None for p in state.student.trained.parameters())
    assert all(p.grad is None for p in state.features.network.parameters())
    assert all(p.grad is None for p in host.denoiser.backbone.parameters())
    assert kit.same(kit.weights(state.features.network), before)


def test_a_real_picture_is_seen_once_and_its_maps_are_kept(kit, host, settings, tmp_path):
    state, _, batch = made(kit, host, settings(), tmp_path)
    passes = []
    state.features.network.encoder.layer[-1].register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        first, _ = seen(state, batch.x, batch)
        once = len(passes)
        again, _ = seen(state, batch.x, batch)
    different = len(set(batch.positive_key.tolist()))
    assert (once, len(passes)) == (different + 1, different + 2)  # the student's pictures are seen every time
    assert all(torch.equal(a, b) for a, b in zip(first.maps, again.maps, strict=True))
    state.feature_cache = FeatureCache(limit=0)
    with torch.no_grad():
        anew, _ = seen(state, batch.x, batch)
    assert not state.feature_cache.maps
    assert all(torch.equal(a, b) for a, b in zip(first.maps, anew.maps, strict=True))


def test_maps_are_kept_by_the_picture_that_they_are_of(kit, host, settings, tmp_path):
    config = settings(positives="both", batch_size=64)
    samples = kit.pairs(host, config, tmp_path)
    state = kit.state(host, config, samples)
    reals = Reals.beside(samples, replace(samples, latents=-samples.latents[:]))
    batch = draw_batch(config, state.student, samples, reals, generator(0, 0))
    assert batch.positive_key.min() < 0 <= batch.positive_key.max()
    for key, positive in zip(batch.positive_key.tolist(), batch.positive, strict=True):
        latents = samples.latents if key >= 0 else reals.samples.latents
        assert torch.equal(positive, latents[:][key if key >= 0 else -1 - key])


def test_a_training_with_it_ends_and_the_card_says_so(kit, host, settings, folder, tmp_path):
    events = kit.go(host, settings(), tmp_path)
    steps = [e for e in events if isinstance(e, Step)]
    assert all({"adversarial", "discriminator", "regression"} <= step.losses.keys() for step in steps)
    assert events[-1].card.method == "ADD"
    assert events[-1].card.training["pixel_backbone"] == folder.name  # not where it lay


def test_a_training_with_it_goes_on_bit_for_bit(kit, host, settings, tmp_path):
    whole = kit.go(host, settings(updates=4, condition_image=True, student_steps=2), tmp_path / "whole")[-1]
    for updates in (2, 4):
        parts = kit.go(host, settings(updates=updates, condition_image=True, student_steps=2), tmp_path / "parts")[-1]
    assert kit.same(kit.tensors(whole.path), kit.tensors(parts.path))


def test_memory_counts_what_it_keeps(kit, host, settings):
    small, large = (estimate(host, settings(pixel_size=size), kit.WORDS).memory.activations for size in (16, 64))
    assert 0 < small < large


def test_a_host_without_gradients_through_its_autoencoder_says_so(kit, host, settings, tmp_path):
    host.decoder = None
    with pytest.raises(ConfigError, match="in this host the discriminator sees latents only: leave it empty"):
        kit.go(host, settings(), tmp_path)
    assert not list(tmp_path.glob("pairs/*.safetensors"))  # told before the hours of pairs


def test_a_folder_that_is_missing_is_named(kit, host, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"pixel_backbone is '.*nowhere', which cannot be loaded"):
        start.features(host, settings(pixel_backbone=str(tmp_path / "nowhere")))


def test_a_network_without_patches_is_refused(kit, host, settings, tmp_path):
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **shape)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a BertModel without patches: use a vision transformer"):
        start.features(host, settings(pixel_backbone=str(tmp_path)))


def test_a_file_that_lacks_weights_is_refused(kit, host, settings, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    whole = load_file(folder / "model.safetensors")
    whole.pop("encoder.layer.1.mlp.fc1.weight")
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"whose file lacks 1 weights \(encoder.layer.1.mlp.fc1.weight, ...\)"):
        start.features(host, settings(pixel_backbone=str(tmp_path)))


def test_weights_that_are_a_pickle_are_refused(kit, host, settings, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").unlink()
    (tmp_path / "vit" / "pytorch_model.bin").write_bytes(kit.pickles.archive(tmp_path / "ran"))
    with pytest.raises(ConfigError, match=r"pixel_backbone is .*which cannot be loaded: .*model\.safetensors"):
        start.features(host, settings(pixel_backbone=str(tmp_path / "vit")))
    assert not (tmp_path / "ran").exists()


def test_taps_are_of_its_own_modules(kit, host, settings):
    with pytest.raises(ConfigError, match=r"taps \['blocks.0'\] are no modules of Dinov2Model"):
        start.features(host, settings(taps="blocks.0"))
