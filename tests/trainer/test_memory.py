"""What a training will take is measured on one sample, and said in words; a running out says what to change."""

import importlib.util
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from turbodistill.core.decoder import decoded_at_once
from turbodistill.core.schedule import DiscreteSchedule, expand
from turbodistill.trainer.config import Config
from turbodistill.trainer.loop.distill import distill
from turbodistill.trainer.loop.precision import autocast, cast_frozen
from turbodistill.trainer.run import estimate as estimating
from turbodistill.trainer.run import memory
from turbodistill.trainer.run.estimate import Estimate, seconds_of_pairs
from turbodistill.trainer.run.kept import SavedTensors
from turbodistill.trainer.run.memory import GB, REMEDIES, Memory, measure, measure_memory

RESOLUTION = (32, 32)


def _live():
    """The class `Live` of the benchmarks, which are no package."""
    path = Path(__file__).parents[2] / "benchmarks" / "live.py"
    spec = importlib.util.spec_from_file_location("turbodistill_benchmarks_live", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Live


Live = _live()


@pytest.fixture
def unet(kit):
    return kit.unet_host()


@pytest.fixture
def made(kit, unet, tmp_path):
    """Settings -> a fresh state over the UNet, and its pairs; every one is released in the end."""
    states = []

    def build(**changes):
        settings = kit.config(taps="", **changes)
        samples = kit.pairs(unet, kit.config(), tmp_path)
        states.append(kit.state(unet, settings, samples))
        return states[-1], samples

    yield build
    for state in states:
        state.release()


def estimate(made, **changes):
    state, samples = made(**changes)
    found = measure_memory(state, samples, RESOLUTION)
    state.release()
    return found


def test_it_grows_with_the_batch_alone_where_only_that_does(made):
    one, four = estimate(made, batch_size=1), estimate(made, batch_size=4)
    assert four.activations == pytest.approx(4 * one.activations, rel=0.02)
    assert (four.weights, four.trained) == (one.weights, one.trained)


def test_weights_that_are_cast_wait_beside_on_a_cpu(made):
    full, low = (estimate(made, precision=p).weights for p in ("float32", "bfloat16"))
    assert 1.45 * full < low < 1.6 * full  # half of them again, but for norms and the last layer


def test_checkpointing_takes_less(made):
    plain, again = estimate(made), estimate(made, gradient_checkpointing=True)
    assert 0 < again.activations < plain.activations / 2
    assert (again.weights, again.trained) == (plain.weights, plain.trained)


def test_what_is_not_computed_takes_nothing(made):
    every, alone = estimate(made), estimate(made, adversarial_weight=0.0)
    assert alone.activations < every.activations
    assert estimate(made, adversarial_weight=0.0, feature_weight=1.0).activations == every.activations


def test_the_student_is_counted_with_all_that_its_optimizer_keeps(made, unet):
    state, samples = made(rank=4)
    found = measure_memory(state, samples, RESOLUTION)
    of_weights = sum(p.numel() * 4 for p in unet.denoiser.backbone.parameters())
    assert found.weights == of_weights
    lora = sum(p.numel() * 4 for p in state.student.trained.parameters())
    heads = sum(p.numel() * 4 for p in state.critics[0].discriminator.parameters())
    assert found.trained == 4 * lora + 3 * heads  # gradients are of an update
    assert found.total == found.weights + found.trained + max(found.activations, found.decoding)
    state.release()
    scored, _ = made(rank=4, distillation="matching", distillation_weight=1.0, fake_score_rank=4)
    assert measure_memory(scored, samples, RESOLUTION).trained == 8 * lora + 3 * heads
    scored.release()
    full, _ = made(rank=0)
    assert measure_memory(full, samples, RESOLUTION).trained == 4 * of_weights + 3 * heads


def kept_by_autograd(state, samples):
    """Bytes of distinct memory that is alive between forward and backward of a batch, parameters aside."""
    storages, size = {}, state.config.batch_size

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    student = state.student
    modules = (student.teacher.backbone, student.trained, state.critics[0].discriminator)
    sigma = student.schedule.sigma(torch.full((size,), 500.0))
    x, cond = samples.latents[:1].repeat(size, 1, 1, 1), samples.cond.rows(torch.zeros(size, dtype=torch.long))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        student.training(),
        cast_frozen(state.config, student.teacher),
        autocast(state.config, student, student.teacher),
    ):
        known = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
        output = student(x * expand(sigma, x), sigma, cond)
        maps = state.critics[0].features(output, sigma, cond)
        total = sum(size for place, size in storages.items() if place not in known)
    assert maps
    return total


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_it_is_what_autograd_keeps_of_weights_that_are_cast_once(made, precision, size):
    state, samples = made(batch_size=size, precision=precision)
    measured = measure(state, samples, RESOLUTION)
    found = sum(line.of(size).throughout(False) for line in (measured.passes, measured.features))
    assert found == pytest.approx(kept_by_autograd(state, samples), rel=0.03)


class Wide(nn.Module):
    """A row of blocks that keep much more than they are given, as those of transformers do."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 32, 1), nn.Conv2d(32, 4, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 192, 1), nn.SiLU(), nn.Conv2d(192, 32, 1)) for _ in range(6)
        )

    def forward(self, x, _time, context):
        h = self.conv_in(x) + context.mean()
        for block in self.blocks:
            h = h + block(h)
        return self.conv_out(h)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize(
    "changes",
    [{}, {"batch_size": 2, "gradient_accumulation": 2}, {"distillation": "matching", "distillation_weight": 1.0}],
)
def test_it_is_the_peak_of_real_updates(kit, toys, tmp_path, rank, checkpointing, changes):
    """Of the very updates that a training makes, on a CPU."""
    host = kit.ToyHost(toys.Toy(Wide(), DiscreteSchedule(), "eps")).sized(256, 256)
    settings = {
        "rank": rank,
        "gradient_checkpointing": checkpointing,
        "taps": "blocks.1,blocks.4",
        "fake_score_rank": 4,
    }
    config = kit.config(**settings, **changes)
    samples = kit.pairs(host, kit.config(), tmp_path)
    state = kit.state(host, config, samples)
    memory = measure_memory(state, samples, RESOLUTION)
    modules = [host.denoiser.backbone, state.student.trained, state.average, state.critics[0].discriminator]
    modules += [state.fake_score.denoiser.trained] if state.fake_score else []
    with Live(t for module in modules for t in (*module.parameters(), *module.buffers())) as live:
        assert len(list(distill(state, samples, host.encode_text([""])))) == 2
    state.release()
    told = memory.weights + memory.trained + memory.activations
    assert told == pytest.approx(live.most, rel=0.1)


def test_a_preview_is_counted_where_it_takes_more_than_a_step():
    needed = Memory(2 * GB, GB, GB, decoding=3 * GB)
    assert needed.total == 6 * GB
    assert needed.in_words() == "training takes about 6.0 GB: 2.0 GB weights, 1.0 GB student, 3.0 GB a preview"


@pytest.mark.parametrize(
    ("resolution", "pictures"), [((64, 64), 16), ((256, 256), 4), ((512, 512), 1), ((1024, 1024), 1), ((768, 64), 5)]
)
def test_large_pictures_are_decoded_one_at_a_time(resolution, pictures):
    assert decoded_at_once(resolution) == pictures


@pytest.mark.slow
def test_a_decoder_takes_what_is_told():
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with FakeTensorMode(), torch.no_grad():
        vae = AutoencoderKL(**kinds, block_out_channels=(128, 256, 512, 512), layers_per_block=2).eval()
        latents = torch.randn(1, 4, 128, 128)
        with Live() as peak:
            vae.decode(latents)
    assert pytest.approx(peak.most, rel=0.1) == memory.DECODING * 1024**2


def test_nothing_is_kept_or_changed(kit, made, unet):
    state, samples = made()
    backbone = unet.denoiser.backbone
    parts = (backbone, state.student.trained, state.critics[0].discriminator, state.average)
    before, flags = [kit.weights(m) for m in parts], [p.requires_grad for p in backbone.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules()]
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    measure_memory(state, samples, RESOLUTION)
    assert torch.equal(torch.rand(2), drawn)
    assert all(kit.same(kit.weights(m), b) for m, b in zip(parts, before, strict=True))
    assert [p.requires_grad for p in backbone.parameters()] == flags
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules()] == hooks
    assert all(p.grad is None for m in parts for p in m.parameters())


def test_an_error_in_the_pass_leaves_no_hook(kit, made, unet):
    state, samples = made()
    backbone = unet.denoiser.backbone
    handle = backbone.conv_out.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("cancelled")))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules()]
    with pytest.raises(KeyError, match="cancelled"):
        measure_memory(state, samples, RESOLUTION)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules()] == hooks
    handle.remove()


def test_a_pass_that_was_only_counted_has_no_backward(unet):
    x = torch.randn(1, 4, 8, 8)
    with SavedTensors(unet.denoiser.backbone, []):
        output = unet.denoiser(x, torch.tensor([1.0]), unet.encode_text(["a"]))
    with pytest.raises(RuntimeError, match="only counted"):
        output.sum().backward()


def test_a_network_without_known_blocks_is_counted_as_a_whole(kit, host, tmp_path):
    samples = kit.pairs(host, kit.config(), tmp_path)
    found = []
    for checkpointing in (False, True):
        state = kit.state(host, kit.config(gradient_checkpointing=checkpointing), samples)
        found.append(measure_memory(state, samples, RESOLUTION))
        state.release()
    assert found[0] == found[1] and found[0].activations > 0


# --- in words ---


def test_in_words_without_a_comparison():
    told = Memory(2 * GB, GB // 2, 64 * 1024**2).in_words()
    assert told == "training takes about 2.6 GB: 2.0 GB weights, 0.5 GB student, 64 MB activations"
    assert Memory(2 * GB, 1000, 64 * 1024**2).in_words().endswith("less than 1 MB student, 64 MB activations")


def test_in_words_with_the_pairs():
    told = Estimate(Memory(2 * GB, GB, GB), 1024, 3 * GB, 1500.0).in_words(5 * GB)
    assert told.startswith("1024 teacher pairs take about 25 min to make and 3.0 GB on disk; training takes about")
    assert told.endswith("; 5.0 GB are there")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 5 * 2 + 3 * 8 * 2),  # five texts of 2 s; three batches of eight steps of 2 s
        ({"guidance": 1.0}, 5 * 2 + 3 * 8),  # a step of one row a sample takes half
        # Steps begin at 0, 1/8 ... 7/8 of the sampling: three of them within the interval.
        ({"guidance_start": 0.2, "guidance_end": 0.6}, 5 * 2 + 3 * (3 * 2 + 5)),
        ({"prompt_suffix": "best", "bake_affixes": True}, 10 * 2 + 3 * 8 * 2),
        ({"batch_size": 16}, 5 * 2 + 8 * 2),
    ],
)
def test_the_time_of_the_pairs_is_known_beforehand(kit, host, monkeypatch, changes, expected):
    config = kit.config(pairs=12, pair_steps=8, guidance=3.0).replace(**changes)
    batch, now, encode = min(config.batch_size, 12), [0.0], host.encode_text

    def passes(_module, args):
        now[0] += len(args[0]) / batch  # a second for each row of a pair

    def encoded(texts):
        now[0] += 2
        return encode(texts)

    monkeypatch.setattr(estimating.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(host, "encode_text", encoded)
    handle = host.denoiser.backbone.register_forward_pre_hook(passes)
    assert seconds_of_pairs(host, config, 10 if config.bake_affixes else 5) == pytest.approx(expected)
    handle.remove()


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation": 2}, {"rank": 0}, {"offload": True}])
def test_the_time_of_the_training_is_known_beforehand(kit, host, tmp_path, monkeypatch, changes):
    """By a clock that goes on by a second with each pass, beside the training itself."""
    now = [0.0]

    def passed(*_):
        now[0] += 1

    before = kit.weights(host.denoiser.backbone)
    settings = {"updates": 8, "regression_updates": 6, "discriminator_warmup": 2, **changes}
    config = kit.config(**settings)
    samples = kit.pairs(host, config, tmp_path)
    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: now[0])
    handle = host.denoiser.backbone.register_forward_pre_hook(passed)
    told = estimating.seconds_of_training(host, config)
    state = kit.state(host, config, samples)
    steps = list(distill(state, samples, host.encode_text([""])))
    state.release()
    assert told == pytest.approx(sum(step.seconds for step in steps))
    assert steps[-1].seconds > 1.5 * steps[1].seconds  # without a discriminator it is shorter
    assert kit.same(kit.weights(host.denoiser.backbone), before)
    assert estimating.seconds_of_training(host, config.replace(minutes=1e-3)) == pytest.approx(0.06)
    handle.remove()


def test_in_words_where_it_is_enough_and_where_not():
    needed = Memory(2 * GB, GB, GB)
    assert needed.in_words(4 * GB).endswith("; 4.0 GB are there")
    told = needed.in_words(3 * GB)
    assert "; only 3.0 GB are there. It may run out of memory: " in told
    assert all(remedy in told for remedy in REMEDIES)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ", or ".join(REMEDIES)),
        ({"gradient_checkpointing": True}, ", or ".join(REMEDIES[1:])),
        ({"batch_size": 1}, ", or ".join((REMEDIES[0], *REMEDIES[2:]))),
    ],
)
def test_what_would_not_help_is_not_advised(made, changes, told):
    state, _ = made(**changes)
    about = f"batch_size {changes.get('batch_size', 4)}, latents of 16 x 8, rank 2"
    assert memory.advice("training", state.config, (4, 8, 16)) == f"out of memory while training ({about}): {told}"


def test_advice_names_settings_that_are():
    for remedy in REMEDIES:
        assert set(remedy.replace(",", "").split()) & {*Config.__dataclass_fields__, "pictures"}, remedy
