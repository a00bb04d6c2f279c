"""ADD's own discriminator in a real WebUI: trainings that are judged by decoded pictures."""

import pytest
import torch
from turbodistill.trainer.loop.pixel_backbone import load_vision

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(900)]

PIXELS = {"pixel_backbone": "embedded", "pixel_size": 56, "head_channels": 16}
BOTH = PIXELS | {"pixel_share": 0.5, "pixel_crop": 32, "augment": True, "gradient_checkpointing": True}


@pytest.mark.share
@pytest.mark.parametrize(("name", "settings"), [("pixels", PIXELS), ("both", BOTH)])
def test_a_training_judged_by_pictures_ends_and_the_model_stays(trainer, name, settings):
    with trainer.unchanged():
        trainer.start(name, settings)
        told = trainer.ended()
    assert told["state"] == "done", told["error"]
    losses = told["history"]["losses"]
    names = {"adversarial (latents)", "adversarial (pixels)"} if name == "both" else {"adversarial"}
    assert names <= losses.keys() and all(v is not None for n in names for v in losses[n][1:])
    assert "vision transformer and decoder" in told["memory"]


def test_cancel_ends_one_and_it_goes_on(trainer):
    long = {"updates": 100000, "save_every": 100000, "evaluate_every": 0, "preview_every": 0}
    with trainer.unchanged():
        trainer.start("pixels-long", BOTH | long)
        done = trainer.until(trainer.trains)["done"]
        trainer.ask("cancel")
        assert trainer.ended()["state"] == "cancelled"
        trainer.start("pixels-long", BOTH | long)
        assert trainer.until(lambda told: trainer.trains(told) and told["done"] > done)
        trainer.ask("cancel")
        trainer.ended()


def test_a_failure_is_told_and_leaves_the_model_as_it_was(trainer):
    with trainer.unchanged():
        trainer.start("pixels-fails", PIXELS | {"updates": 100000, "evaluate_every": 0})
        trainer.until(trainer.trains)
        trainer.inspect("fail")
        told = trainer.ended()
    assert told["state"] == "failed" and "a fault of another extension" in told["error"]


def test_pictures_are_the_host_s_own(trainer):
    """Its decoder gives what the host decodes, with a gradient as steep as it is."""
    told = trainer.inspect("decoder")
    assert told["gap"] < 2e-3
    assert told["slope"] == pytest.approx(told["difference"], rel=0.05)


def test_the_embedded_network_sees_the_same_by_the_host_s_transformers(trainer):
    eye = load_vision("embedded")
    picture = torch.linspace(0, 1, 3 * 224 * 224).reshape(1, 3, 224, 224).square()
    mean, std = (torch.tensor(x)[:, None, None] for x in (eye.mean, eye.std))
    with torch.no_grad():
        ours = eye.network((picture - mean) / std).last_hidden_state.flatten()[::997]
    theirs = torch.tensor(trainer.inspect("eye")["seen"])
    assert (ours - theirs).norm() < 0.002 * ours.norm()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pixel_backbone": "/nowhere"}, "pixel_backbone is '/nowhere', which cannot be loaded"),
        (PIXELS | {"pixel_decoder": "tiny"}, "pixel_decoder is 'tiny', and the host"),
    ],
)
def test_what_cannot_be_had_is_told_before_the_pairs(trainer, settings, words):
    trainer.start("pixels-wrong", settings)
    told = trainer.ended()
    assert told["state"] == "failed" and words in told["error"]
