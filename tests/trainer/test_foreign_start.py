"""A training that begins from a few-step LoRA that others made."""

import logging

import pytest
import torch
from turbodistill.core.foreign_lora import ForeignLoRA
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.data.samples import Samples
from turbodistill.trainer.loop.start import begin, check

TAPS = "down_blocks.0,mid_block"


@pytest.fixture
def host(kit):
    return kit.unet_host()


@pytest.fixture
def lora(host, others, tmp_path):
    """An LCM LoRA of ranks up to 4."""
    return others.write(tmp_path / "lcm-lora-sdv1-5.safetensors", others.pairs(host.denoiser.backbone))


def begun(kit, host, lora, **changes):
    settings = kit.config(**{"rank": 4, "taps": TAPS, "init_student": str(lora)} | changes)
    sample = Samples(torch.zeros(1, *host.latent_shape), host.encode_text([""]), [""])
    return begin(host, settings, sample)


def x0s(kit, host, student, lora, strength=1.0):
    """The student's x0, that of the teacher with the LoRA merged into it, and the teacher's own."""
    x, cond = 14.6 * torch.randn(2, *host.latent_shape), host.encode_text(["a fox", "an owl"])
    sigma = torch.tensor([14.6, 3.0])
    changes = ForeignLoRA(lora).changes(host.denoiser.backbone)
    with torch.no_grad():
        ours = student(x, sigma, cond)
        with changes.merged(host.denoiser.backbone, strength):
            merged = host.denoiser(x, sigma, cond)
        return ours, merged, host.denoiser(x, sigma, cond)


@pytest.mark.parametrize("rank", [4, 6, 0])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_with_room_for_it_the_student_is_the_teacher_with_the_lora(kit, host, lora, rank, alpha):
    state = begun(kit, host, lora, rank=rank, alpha=alpha)
    ours, theirs, plain = x0s(kit, host, state.student, lora)
    assert (theirs - plain).abs().max() / theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5
    assert state.extra["earlier"] == {"init_error": 0.0}
    state.release()


def test_one_of_no_known_kind_is_told(kit, host, lora, caplog):
    begun(kit, host, lora).release()
    assert "few-step kind" not in caplog.text
    begun(kit, host, lora.rename(lora.with_name("watercolour.safetensors"))).release()
    assert "watercolour.safetensors is of no few-step kind that is known: the student begins as the" in caplog.text


def test_of_a_larger_rank_the_best_part_is_kept_and_the_rest_is_told(kit, host, lora, others, caplog):
    with caplog.at_level(logging.INFO):
        state = begun(kit, host, lora, rank=2)
    lost = whole = 0.0
    for delta in others.deltas(others.pairs(host.denoiser.backbone)).values():
        values = torch.linalg.svdvals(delta.flatten(1).double()).square()
        lost, whole = lost + values[2:].sum().item(), whole + values.sum().item()
    error = state.extra["earlier"]["init_error"]
    assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-2) and 0.01 < error < 1
    told = (
        "the student begins from LCM (lcm-lora-sdv1-5.safetensors): 8 layers of rank 1 to 4 in rank 2, relative error"
    )
    assert told in caplog.text
    state.release()


def test_rows_that_the_lora_leaves_free_still_learn(kit, host, lora):
    state = begun(kit, host, lora, rank=6)
    branches = dict(zip(state.student.lora.names, state.student.lora.each(), strict=True))
    branch = branches["conv_in"]
    assert (branch.up[:, 4:] == 0).all() and (branch.down[4:].flatten(1).norm(dim=1) > 0).all()
    state.release()


def test_layers_beyond_the_targets_are_lost_and_count(kit, host, lora):
    state = begun(kit, host, lora, targets="attention")
    assert state.extra["earlier"]["init_error"] > 0.5
    state.release()


def test_it_is_named_on_the_card_with_its_error(kit, host, lora, tmp_path):
    *_, finished = kit.go(host, kit.config(rank=2, taps=TAPS, init_student=str(lora)), tmp_path / "run")
    assert finished.card.training["init_student"] == lora.name
    assert 0 < finished.card.training["init_error"] < 1 and finished.card.training["updates"] == 2


def test_a_lora_of_hyper_flux_s_kind_counts_with_the_weight_it_was_made_for(kit, host, lora, others, monkeypatch):
    from dataclasses import replace

    from turbodistill.core import families

    known = families.recognise("lcm-lora-sdv1-5")
    monkeypatch.setattr(families, "recognise", lambda *_, **__: replace(known, strength=0.125))
    state = begun(kit, host, lora)
    ours, theirs, _ = x0s(kit, host, state.student, lora, 0.125)
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5
    state.release()


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("sdxl_lightning_1step_x0_lora", {}, "SDXL-Lightning, whose output is read as x0: set prediction to x0"),
        (
            "dmd2_sdxl_4step_lora",
            {"prediction": "x0"},
            "DMD2, whose output .* itself predicts: set prediction to inherit",
        ),
        ("NitroFusion-realism", {}, "NitroFusion Realism, whose network is told other timesteps"),
    ],
)
def test_one_whose_output_is_read_in_another_way_is_refused(kit, host, lora, name, changes, told):
    path = lora.rename(lora.with_name(f"{name}.safetensors"))
    host.architecture = "toy"
    with pytest.raises(ConfigError, match=f"init_student: .*{told}"):
        check(host, kit.config(init_student=str(path), taps=TAPS, **changes))


def test_another_start_timestep_is_told(kit, host, lora, caplog):
    path = lora.rename(lora.with_name("dmd2_sdxl_1step_lora.safetensors"))
    host.architecture = "stable-diffusion-xl-v1-base"
    begun(kit, host, path).release()
    assert "was made for start timestep 399: start_timestep is 999, so that the student begins further" in caplog.text


def test_what_is_no_plain_lora_of_this_model_is_refused_before_anything_is_made(kit, host, lora, others, tmp_path):
    pairs = others.pairs(host.denoiser.backbone)
    others.write(lora, pairs, more={"lora_unet_conv_in.dora_scale": torch.ones(8)})
    with pytest.raises(ConfigError, match=r"init_student: .*holds DoRA"):
        kit.go(host, kit.config(init_student=str(lora), taps=TAPS), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("pairs-*"))
    wide = {"conv_in": (torch.zeros(2, 5, 3, 3), torch.zeros(8, 2, 1, 1), 1.0)}
    with pytest.raises(ConfigError, match=r"init_student: .*conv_in is for a layer of shape"):
        check(host, kit.config(init_student=str(others.write(lora, wide))))
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    more = {f"{key}.lora_down.weight": torch.zeros(1, 2048), f"{key}.lora_up.weight": torch.zeros(8, 1)}
    host.architecture = "stable-diffusion-v1"
    with pytest.raises(ConfigError, match=r"is for stable-diffusion-xl-v1-base, this model is stable-diffusion-v1"):
        check(host, kit.config(init_student=str(others.write(lora, {}, more=more))))
