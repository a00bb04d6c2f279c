"""On a real GPU: what is trained, saved and sampled there is what the CPU makes."""

import itertools

import pytest
import torch
from turbodistill.core.transfer import to_device, to_host
from turbodistill.trainer.loop.distill import distill
from turbodistill.trainer.run import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch finds none here"),
]
TAPS = "down_blocks.0,mid_block"


@pytest.fixture
def there(kit):
    """A small model on the GPU."""
    host = kit.unet_host()
    host.denoiser.backbone.to("cuda")
    return host


def trained(kit, host, folder, count=5, **changes):
    """The first updates of a training, and its student's weights on the CPU."""
    settings = kit.config(updates=100, log_every=1, taps=TAPS, **changes)
    samples = kit.pairs(kit.unet_host(), settings, folder)  # of the CPU, so that both see the same
    state = kit.state(host, settings, samples)
    steps = list(itertools.islice(distill(state, samples, host.encode_text([""])), count))
    state.release()
    return steps, {name: value.cpu() for name, value in kit.weights(state.student.trained).items()}


@pytest.mark.parametrize("rank", [2, 0])
def test_a_student_in_float32_is_that_of_the_cpu(kit, there, tmp_path, rank):
    changes = {"rank": rank, "precision": "float32", "lr": 1e-3}
    steps, found = trained(kit, there, tmp_path, **changes)
    others, expected = trained(kit, kit.unet_host(), tmp_path, **changes)
    for step, other in zip(steps, others, strict=True):
        assert step.losses == pytest.approx(other.losses, rel=0.02, abs=1e-3)
    assert all((found[name] - expected[name]).abs().max() < 5e-3 for name in found)


@pytest.mark.parametrize("precision", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_low_precision_trains_and_leaves_the_model_as_it_was(kit, there, tmp_path, precision, checkpointing):
    before = {name: value.cpu() for name, value in kit.weights(there.denoiser.backbone).items()}
    changes = {"precision": precision, "gradient_checkpointing": checkpointing}
    steps, found = trained(kit, there, tmp_path, 12, **changes)
    assert all(value.isfinite().all() for value in found.values()) and steps[-1].losses
    after = {name: value.cpu() for name, value in kit.weights(there.denoiser.backbone).items()}
    assert kit.same(after, before)


def test_a_run_that_is_broken_off_goes_on_as_if_it_had_not_been(kit, tmp_path):
    found = []
    for name, stops in (("whole", (6,)), ("broken", (3, 6))):
        for updates in stops:
            host = kit.unet_host()
            host.denoiser.backbone.to("cuda")
            settings = kit.config(updates=updates, save_every=3, precision="bfloat16", taps=TAPS)
            list(run.run(host, settings, tmp_path / name, kit.WORDS))
        found.append(kit.saved(tmp_path / name)["student"])
    assert all(torch.allclose(found[0][name].cpu(), found[1][name].cpu(), atol=1e-4) for name in found[0])


def test_copies_in_the_background_arrive():
    numbers = torch.randn(1000, 1000)
    assert torch.equal(
        to_device(to_host(to_device(numbers, torch.device("cuda"))), torch.device("cuda")).cpu(), numbers
    )
