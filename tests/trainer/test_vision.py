"""A vision transformer that judges decoded pictures: ADD's own discriminator."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model
from turbodistill.core.decoder import Decoder
from turbodistill.core.vision import VisionFeatures
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.data import images
from turbodistill.trainer.loop import start, steps
from turbodistill.trainer.loop.batch import Reals, draw_batch, generator
from turbodistill.trainer.loop.distill import Step, distill
from turbodistill.trainer.loop.feature_cache import FeatureCache
from turbodistill.trainer.loop.pixel_backbone import load_vision
from turbodistill.trainer.run.estimate import estimate

PATCH, BLOCKS, WIDTH = 8, 4, 16
FULL = steps.Phase(discriminator=True, adversarial=True, ramp=1.0, fresh_noise_share=0.0)
AS_IT_IS = Decoder(1, nn.Identity, lambda _network, x: x)


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
    (critic,) = state.critics
    return steps.real_inputs(state, critic, batch), steps.head_inputs(state, critic, output, batch.cond, batch)


def made(kit, host, settings, folder):
    samples = kit.pairs(host, settings, folder)
    state = kit.state(host, settings, samples)
    return state, samples, draw_batch(settings, state.student, samples, None, generator(0, 0))


def test_the_one_that_comes_with_the_clone():
    eye = load_vision("embedded")
    assert (eye.patch, eye.network.config.num_hidden_layers, eye.network.config.hidden_size) == (14, 4, 384)
    features = VisionFeatures(eye, AS_IT_IS, 70)
    assert features.taps == ["encoder.layer.1", "encoder.layer.3"]
    with torch.no_grad():
        maps = features(torch.rand(2, 3, 64, 64), torch.zeros(2), ...)
    assert [m.shape for m in maps] == [(2, 384, 5, 5)] * 2
    assert all(m.isfinite().all() and m.std((0, 2, 3)).min() > 0 for m in maps)


def test_its_maps_are_the_blocks_outputs_by_rows_and_columns(folder):
    eye = load_vision(str(folder))
    features = VisionFeatures(eye, AS_IT_IS)
    pictures = torch.rand(2, 3, 16, 32)
    normal = (pictures - torch.tensor(eye.mean)[:, None, None]) / torch.tensor(eye.std)[:, None, None]
    with torch.no_grad():
        states = eye.network(normal, output_hidden_states=True).hidden_states
        maps = features(pictures, torch.zeros(2), ...)
    for found, expected in zip(maps, (states[2], states[4]), strict=True):
        assert torch.allclose(found, expected[:, 1:].reshape(2, 2, 4, WIDTH).permute(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize(("size", "shape"), [(0, (2, 4)), (64, (4, 8)), (8, (1, 1)), (20, (2, 3))])
def test_pictures_are_scaled_to_the_size_asked_for_in_whole_patches(folder, size, shape):
    eye = load_vision(str(folder))
    features = VisionFeatures(eye, AS_IT_IS, size)
    assert features(torch.rand(1, 3, 16, 32), torch.zeros(1), ...)[0].shape == (1, WIDTH, *shape)


def test_the_pass_ends_at_the_last_tap(folder):
    eye = load_vision(str(folder))
    features = VisionFeatures(eye, AS_IT_IS, taps=["encoder.layer.1"])
    eye.network.encoder.layer[2].register_forward_hook(lambda *_: pytest.fail("a block that nobody taps has run"))
    assert len(features(torch.rand(1, 3, 16, 16), torch.zeros(1), ...)) == 1


def test_it_sees_the_clean_picture_and_the_gradient_reaches_the_student(kit, host, settings, tmp_path):
    state, _, batch = made(kit, host, settings(), tmp_path)
    before = kit.weights(state.critics[0].features.network)
    with state.student.training():
        real, fake = seen(state, state.student(batch.x, batch.sigma, batch.cond), batch)
        sum(x.square().mean() for x in fake.maps).backward()
    clean = state.critics[0].features(batch.target, torch.zeros(4), batch.cond)
    expected = state.critics[0].discriminator.standardise(clean)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(real.maps, expected, strict=True))
    assert (real.sigma == 0).all()
    assert all(p.grad is not None for p in state.student.trained.parameters())
    assert all(p.grad is None for p in state.critics[0].features.network.parameters())
    assert all(p.grad is None for p in host.denoiser.backbone.parameters())
    assert kit.same(kit.weights(state.critics[0].features.network), before)


def test_a_real_picture_is_seen_once_and_its_maps_are_kept(kit, host, settings, tmp_path):
    state, _, batch = made(kit, host, settings(), tmp_path)
    passes = []
    state.critics[0].features.network.encoder.layer[-1].register_forward_hook(lambda *_: passes.append(1))
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


def gradients(state, batch):
    """Of the latents of a batch, by what its one discriminator sees of them."""
    x = batch.target.clone().requires_grad_()
    maps = steps.head_inputs(state, state.critics[0], x, batch.cond, batch).maps
    sum(m.square().mean() for m in maps).backward()
    return x.grad


@pytest.mark.parametrize("changes", [{}, {"pixel_crop": 16}, {"augment": True}, {"pixel_crop": 16, "augment": True}])
def test_decoding_again_in_backward_gives_the_same_gradients(kit, host, settings, tmp_path, changes):
    found = []
    for again in (False, True):
        state, _, batch = made(kit, host, settings(gradient_checkpointing=again, **changes), tmp_path)
        found.append(gradients(state, batch))
    assert found[0].abs().sum() > 0 and torch.allclose(*found, atol=1e-7)


def test_decoding_again_keeps_next_to_nothing(kit, host, settings, tmp_path):
    kept = []
    for again in (False, True):
        state, _, batch = made(kit, host, settings(gradient_checkpointing=again), tmp_path)
        sizes, x = [], batch.target.clone().requires_grad_()
        with saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            state.critics[0].features(x, batch.sigma, batch.cond)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 10


def test_a_crop_is_all_that_is_decoded_and_lies_elsewhere_each_time(kit, host, settings, tmp_path):
    state, samples, batch = made(kit, host, settings(pixel_crop=16), tmp_path)
    reached = (gradients(state, batch) != 0).any(1)
    assert [int(r.any(1).sum()) for r in reached] == [4] * 4  # latents: 16 pixels
    assert len({tuple(r.flatten().tolist()) for r in reached}) > 1
    other = draw_batch(state.config, state.student, samples, None, generator(0, 1))
    assert not torch.equal((gradients(state, other) != 0).any(1), reached)


@pytest.mark.parametrize("changes", [{"augment": True}, {"pixel_crop": 16}])
def test_what_is_seen_in_another_way_each_time_is_not_kept(kit, host, settings, tmp_path, changes):
    state, _, batch = made(kit, host, settings(**changes), tmp_path)
    with torch.no_grad():
        first, again = (seen(state, batch.target, batch) for _ in range(2))
    assert not state.feature_cache.maps
    assert all(torch.equal(a, b) for a, b in zip(first[0].maps, again[0].maps, strict=True))  # by the batch's seed
    assert not torch.allclose(first[0].maps[0], first[1].maps[0], atol=1e-3)  # real and fake are seen apart


def test_two_discriminators_share_the_student_s_loss(kit, host, settings, tmp_path):
    config = settings(pixel_share=0.25, feature_weight=0.5, discriminator_updates=2, mismatch_weight=0.5, rank=2)
    samples = kit.pairs(host, config, tmp_path)
    state = kit.state(host, config, samples)
    assert [(c.features.name, c.share) for c in state.critics] == [("latents", 0.75), ("pixels", 0.25)]
    found = list(distill(state, samples, host.encode_text([""])))
    of_both = {f"{name} ({seen})" for seen in ("latents", "pixels") for name in ("adversarial", "discriminator", "r1")}
    assert of_both <= found[-1].losses.keys()
    assert {"features (latents)", "mismatch (pixels)"} <= found[-1].losses.keys()
    health = found[-1].health.numbers
    assert 0 <= health["pixel_accuracy"] <= 1 and "pixel_logit_gap" in health


def test_the_share_is_that_of_the_student_s_losses(kit, host, settings, tmp_path):
    parts = []
    for share in (0.25, 0.5):
        state, _, batch = made(kit, host, settings(pixel_share=share), tmp_path)
        with state.student.training():
            parts.append(steps.student_losses(state, batch, host.encode_text([""]), FULL).losses)
    ratios = {name: float(parts[1][name] / parts[0][name]) for name in parts[0]}
    assert ratios["adversarial (pixels)"] == pytest.approx(2, rel=1e-4)
    assert ratios["adversarial (latents)"] == pytest.approx(0.5 / 0.75, rel=1e-4)


def test_a_training_with_two_goes_on_bit_for_bit(kit, host, settings, tmp_path):
    both = {"pixel_share": 0.5, "pixel_crop": 16, "augment": True}
    whole = kit.go(host, settings(updates=4, **both), tmp_path / "whole")[-1]
    for updates in (2, 4):
        parts = kit.go(host, settings(updates=updates, **both), tmp_path / "parts")[-1]
    assert kit.same(kit.tensors(whole.path), kit.tensors(parts.path))
    assert parts.card.method == "ADD, LADD"


def test_distillation_compares_pixels_where_it_is_told_to(kit, host, settings, tmp_path):
    asked = {"distillation_weight": 1.0, "distillation_space": "pixel", "pixel_backbone": "", "taps": "blocks.0"}
    config = settings(**asked)
    samples = kit.pairs(host, config, tmp_path)
    state = start.begin(host, config, samples)
    batch = draw_batch(config, state.student, samples, None, generator(0, 0))
    output = batch.target.clone().requires_grad_()
    loss = steps.distillation_loss(state, output, batch, host.encode_text([""]))
    loss.backward()
    assert (output.grad[:, :3] != 0).any() and (output.grad[:, 3] == 0).all()  # of which the toy makes no picture
    state.release()


@pytest.mark.parametrize("kind", ["matching", "nfsd"])
def test_a_direction_of_latents_is_not_compared_in_pixels(settings, kind):
    with pytest.raises(ConfigError, match=f"distillation_space is 'pixel' and distillation '{kind}'"):
        settings(distillation=kind, distillation_space="pixel")


def test_raw_pictures_are_those_of_the_files(kit, host, settings, tmp_path):
    config = settings(positives="real", raw_pictures=True)
    samples = kit.pairs(host, config, tmp_path)
    state = kit.state(host, config, samples)
    raw = torch.rand(len(samples), 3, *host.resolution)
    reals = Reals.beside(samples, replace(samples, pictures=lambda row: raw[row]))
    batch = draw_batch(config, state.student, samples, reals, generator(0, 0))
    rows = [-1 - key for key in batch.positive_key.tolist()]
    with torch.no_grad():
        found = steps.real_inputs(state, state.critics[0], batch).maps
        wanted = state.critics[0].discriminator.standardise(state.critics[0].features.of_pictures(raw[rows]))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_raw_pictures_are_read_from_a_folder(kit, host, settings, tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    for i, shade in enumerate((0, 128, 255)):
        Image.new("RGB", (40, 40), (shade, 0, 0)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"number {i}")
    (place / "1.png").write_bytes(b"broken")
    config = settings(positives="real", raw_pictures=True, broken_pictures="skip")
    read, inner = [], images.load_picture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            images, "load_picture", lambda picture, size: read.append(Path(picture.name).name) or inner(picture, size)
        )
        kit.go(host, config, tmp_path / "run", images=place)
    trained = read[read.index("2.png") + 1 :]  # encoding comes first
    assert set(trained) == {"0.png", "2.png"}


@pytest.mark.parametrize("name", ["embedded", "nowhere"])
def test_a_tiny_decoder_that_is_not_there_is_told(kit, host, settings, name):
    with pytest.raises(ConfigError, match="pixel_decoder is 'tiny', and this toy has none"):
        start.features(host, settings(pixel_backbone=name, pixel_decoder="tiny"))


def test_memory_counts_what_it_keeps(kit, host, settings):
    small, large = (estimate(host, settings(pixel_size=size), kit.WORDS).memory.activations for size in (16, 64))
    assert 0 < small < large


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


def test_a_plan_s_checkpointing_reaches_what_sees_pictures(kit, host, settings, tmp_path):
    config = settings()
    samples = kit.pairs(kit.unet_host(), settings(taps=""), tmp_path)
    seen = start.features(host, config)
    assert not seen[0].again
    unet = kit.unet_host()
    state = start.begin(unet, settings(gradient_checkpointing=True), samples, seen)
    assert state.critics[0].features.again
    state.release()


def test_a_decoder_of_the_distillation_loss_is_asked_for_before_the_pairs(kit, host, settings, tmp_path):
    asked = {"distillation_weight": 1.0, "distillation_space": "pixel", "pixel_backbone": "", "taps": "blocks.0"}
    with pytest.raises(ConfigError, match="pixel_decoder is 'tiny', and this toy has none"):
        kit.go(host, settings(**asked, pixel_decoder="tiny"), tmp_path)
    assert not list(tmp_path.glob("pairs/*.safetensors"))


def test_the_card_says_what_was_judged_and_how(kit, host, settings, tmp_path):
    changes = {"pixel_crop": 16, "augment": True, "feature_weight": 0.5, "pixel_share": 0.5}
    card = kit.go(host, settings(**changes), tmp_path / "both")[-1].card
    assert card.method == "ADD, LADD, feature matching"
    assert all(card.training[name] == value for name, value in changes.items())
    card = kit.go(host, settings(adversarial_weight=0.0, feature_weight=1.0), tmp_path / "features")[-1].card
    assert card.method == "feature matching" and card.training["feature_weight"] == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"pixel_crop": 8}, "pixel_crop is 8, in which nothing"), ({"pixel_size": 4}, "looks at patches of 8")],
)
def test_sizes_in_which_nothing_is_seen_are_refused(host, settings, changes, words):
    with pytest.raises(ConfigError, match=words):
        start.features(host, settings(**changes))


def test_what_cannot_be_loaded_says_what_can(host, settings, tmp_path):
    file = tmp_path / "weights.txt"
    file.write_text("x")
    with pytest.raises(ConfigError, match=r"it is a file. Give 'embedded', a vision transformer's folder"):
        start.features(host, settings(pixel_backbone=str(file)))
    with pytest.raises(ConfigError, match=r"the folder has no config.json. Give 'embedded'"):
        start.features(host, settings(pixel_backbone=str(tmp_path)))
