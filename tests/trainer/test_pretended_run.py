"""Whole runs on a pretended GPU: pairs, previews, the choice of the best, saved states and pictures."""

from functools import partial

import pytest
import torch
from turbodistill.core.sampling import TEACHER_SAMPLERS, sample_few_step, sample_one_step
from turbodistill.trainer.data.pairs import make_pairs
from turbodistill.trainer.loop.distill import Step, distill
from turbodistill.trainer.run import training
from turbodistill.trainer.run.events import Preview, Selected

FORMS = {
    "LoRA": {},
    "full copy": {"rank": 0, "lr": 1e-4},
    "matching": {"distillation": "matching", "distillation_weight": 0.5, "fake_score_rank": 2},
    "guidance alone": {"guidance_only": True},
    "several sizes": {"sizes": "32x32, 24x40", "pairs": 16},
    "float16": {"precision": "float16"},
}


@pytest.fixture
def on_device(kit, pretended):
    """A host whose model lies on the pretended device, for as long as the test."""
    with pretended.pretend() as seen:
        host = kit.conv_host()
        host.denoiser.backbone.to("cuda")
        seen.clear()
        yield host, seen


@pytest.mark.parametrize("sampler", TEACHER_SAMPLERS)
def test_a_batch_of_pairs_is_waited_for_once(kit, on_device, tmp_path, sampler):
    """Its noise goes over, its pictures come back; in between no step of the sampler waits."""
    host, seen = on_device
    settings = kit.config(pairs=12, pair_steps=6, pair_sampler=sampler)
    found = []
    for _ in make_pairs(host, settings, kit.WORDS, tmp_path / "pairs"):
        found.append(dict(seen.waits))
        seen.clear()
    assert len(found) == 3
    for waits in found[1:]:
        assert list(waits.values()) == [1] and next(iter(waits)).startswith("copy to cpu"), waits


def test_pairs_are_those_of_the_cpu(kit, on_device, tmp_path):
    host, _ = on_device
    made = kit.pairs(host, kit.config(), tmp_path / "device").latents[:]
    alone = kit.pairs(kit.conv_host(), kit.config(), tmp_path / "cpu").latents[:]
    assert torch.allclose(made, alone, atol=2e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_begins_saves_goes_on_and_ends(kit, on_device, tmp_path, form):
    host, _ = on_device
    often = {"preview_every": 2, "evaluate_every": 2, "save_every": 2, "log_every": 2} | FORMS[form]
    first = kit.go(host, kit.config(updates=4, **often), tmp_path / "run")
    assert [type(event) for event in first].count(Selected) == 2
    assert all(preview.student.isfinite().all() for preview in first if isinstance(preview, Preview))
    more = kit.go(host, kit.config(updates=6, **often), tmp_path / "run")
    assert [event.update for event in more if isinstance(event, Step)] == [5, 6]
    straight = kit.go(host, kit.config(updates=6, **often), tmp_path / "straight", pairs_folder=tmp_path / "run/pairs")
    students = [kit.tensors(folder / training.BEST) for folder in (tmp_path / "run", tmp_path / "straight")]
    assert kit.same(*students)
    assert isinstance(straight[-1].score, float)


def test_no_step_of_a_student_waits(kit, on_device):
    host, seen = on_device
    noise, cond = torch.randn(2, 4, 8, 8).to("cuda"), host.encode_text(["fox", "owl"]).to("cuda")
    sigmas = torch.tensor([14.0, 7.0, 2.0, 1.0, 0.5, 0.0])
    fresh = [torch.randn(2, 4, 8, 8).to("cuda") for _ in sigmas]

    def model(x, sigma):
        return host.denoiser(x, sigma, cond)

    few = partial(sample_few_step, schedule=host.denoiser.schedule, noise=fresh.__getitem__)
    with torch.no_grad():
        model(noise, sigmas[:1].to("cuda").expand(2))  # its schedule's tables go over
        for sampler in (sample_one_step, few, *TEACHER_SAMPLERS.values()):
            seen.clear()
            sampler(model, noise, sigmas)
            assert dict(seen.waits) == {}


# What an update may send to the device, in passes of the student forward and backward.
BOUNDS = {
    "regression": ({"regression_updates": 99}, 1.15),
    "adversarial": ({}, 1.8),
    "matching": ({"distillation": "matching", "distillation_weight": 0.5, "fake_score_rank": 2}, 3.5),
    "guidance alone": ({"guidance_only": True}, 1.35),
}  # fmt: skip


@pytest.mark.parametrize("recipe", BOUNDS)
def test_an_update_sends_no_more_than_its_passes_need(kit, pretended, tmp_path, recipe):
    """Where a network is quick, a card waits for what launches its kernels."""
    changes, most = BOUNDS[recipe]
    with pretended.pretend() as seen:
        host = kit.unet_host()
        host.denoiser.backbone.to("cuda")
        settings = kit.config(updates=20, taps="down_blocks.0,mid_block", log_every=10, **changes)
        samples = kit.pairs(host, settings, tmp_path)
        state = kit.state(host, settings, samples)
        cond = host.encode_text(list(kit.WORDS[:4])).to("cuda")
        x, sigma = torch.randn(4, 4, 8, 8).to("cuda"), torch.full((4,), 3.0).to("cuda")
        with state.student.training():
            state.student(x, sigma, cond)
            seen.clear()
            state.student(x, sigma, cond).square().mean().backward()
            alone = seen.operations
        state.optimizer.zero_grad()
        running = distill(state, samples, host.encode_text([""]).to("cuda"))
        for _ in range(3):  # tables go over in the first
            seen.clear()
            next(running)
        assert alone < seen.operations < most * alone
