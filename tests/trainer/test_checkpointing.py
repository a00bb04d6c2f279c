"""Checkpointing as a setting of a training: with every loss it learns the same."""

import pytest
from turbodistill.trainer.loop.distill import Step, distill

OPTIONS = {
    "default": {},
    "exact r1": {"r1": "exact", "gradient_accumulation": 2},
    "matching": {"distillation": "matching", "distillation_weight": 0.5},
    "features": {"feature_weight": 1.0, "condition_image": True, "student_steps": 2},
    "full copy": {"rank": 0},
    "bfloat16": {"precision": "bfloat16"},
}


@pytest.fixture(scope="module")
def unet(kit):
    return kit.unet_host()


@pytest.fixture(scope="module")
def samples(kit, unet, tmp_path_factory):
    return kit.pairs(unet, kit.config(), tmp_path_factory.mktemp("pairs"))


def trained(kit, unet, samples, **changes):
    """The losses of every update of a training."""
    state = kit.state(unet, kit.config(taps="", updates=3, **changes), samples)
    try:
        return [step.losses for step in distill(state, samples, unet.encode_text([""]))]
    finally:
        state.release()


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS.keys())
def test_losses_are_the_same(kit, unet, samples, changes):
    plain, again = (trained(kit, unet, samples, gradient_checkpointing=on, **changes) for on in (False, True))
    assert plain[0] == again[0] != plain[1]
    # Gradients are added in another order, which their last bits show.
    close = 3e-2 if changes.get("precision") else 1e-4
    for one, other in zip(plain, again, strict=True):
        assert one == pytest.approx(other, rel=close)


def test_a_network_without_known_blocks_is_told(kit, host, tmp_path):
    with pytest.raises(
        ValueError, match="no known blocks in PlainBackbone: set gradient_checkpointing and compile to false"
    ):
        kit.go(host, kit.config(gradient_checkpointing=True), tmp_path)
    # What was said helps: the pairs stay, and the run goes on.
    kit.go(host, kit.config(), tmp_path)


def test_it_may_be_changed_when_a_run_goes_on(kit, unet, tmp_path):
    settings = kit.config(taps="", updates=4)
    whole = [e.losses for e in kit.go(unet, settings, tmp_path / "whole") if isinstance(e, Step)]
    kit.go(unet, settings.replace(updates=2), tmp_path / "cut")
    events = kit.go(unet, settings.replace(gradient_checkpointing=True), tmp_path / "cut")
    rest = [e.losses for e in events if isinstance(e, Step)]
    assert len(rest) == 2 and rest[0] == whole[2] and rest[1] == pytest.approx(whole[3], rel=1e-4)
