"""What a training leaves on the device: a packed base that comes back to the bit, and others that wait aside."""

from contextlib import contextmanager

import pytest
import torch
from turbodistill.core import eight_bits
from turbodistill.core.card import read_student
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.loop import start

INT8 = {"base_precision": "int8", "taps": ""}


@pytest.fixture
def unet(kit, monkeypatch):
    monkeypatch.setattr(eight_bits, "LEAST", 64)  # a toy's layers are small
    return kit.unet_host()


@pytest.fixture
def types(unet):
    """The types of the weights that passes of the network met."""
    seen = []
    network = unet.denoiser.backbone
    network.register_forward_pre_hook(lambda *_: seen.append({p.dtype for p in network.parameters()}))
    return seen


def test_pairs_are_made_by_the_whole_model_and_the_student_over_a_packed_one(kit, unet, types, tmp_path):
    before = kit.weights(unet.denoiser.backbone)
    passes = []
    for event in kit.run.run(unet, kit.config(**INT8), tmp_path, kit.WORDS):
        passes.append((type(event).__name__, len(types)))
    made = max(count for name, count in passes if name == "PairsMade")
    assert all(torch.int8 not in kinds for kinds in types[:made])
    assert all(torch.int8 in kinds for kinds in types[made + 1 :]) and len(types) > made + 4
    assert kit.same(kit.weights(unet.denoiser.backbone), before)


def test_a_run_that_is_broken_off_gives_the_weights_back(kit, unet, types, tmp_path):
    before = kit.weights(unet.denoiser.backbone)
    events = kit.run.run(unet, kit.config(**INT8, updates=9), tmp_path, kit.WORDS)
    for event in events:
        if type(event).__name__ == "Step":
            break
    assert torch.int8 in types[-1]
    events.close()
    assert kit.same(kit.weights(unet.denoiser.backbone), before)
    assert not any("forward" in module.__dict__ for module in unet.denoiser.backbone.modules())


def test_the_student_is_near_that_of_the_whole_model(kit, unet, tmp_path):
    def learnt(name, **changes):
        settings = {"updates": 6, "lr": 1e-3, "taps": "", "ema_decay": 0.0} | changes
        path = kit.go(unet, kit.config(**settings), tmp_path / name)[-1].path
        tensors = read_student(path)[0]
        return torch.cat([v.float().flatten() for k, v in sorted(tensors.items()) if "up" in k])

    whole, packed, other = learnt("whole"), learnt("packed", base_precision="int8"), learnt("other", seed=1)
    near = torch.nn.functional.cosine_similarity(whole, packed, 0)
    assert near > 0.9 > torch.nn.functional.cosine_similarity(whole, other, 0)


def test_a_run_goes_on_with_the_base_as_it_was_loaded(kit, unet, tmp_path):
    kit.go(unet, kit.config(**INT8), tmp_path)
    kit.go(unet, kit.config(taps="", updates=4), tmp_path)
    assert kit.updates(tmp_path) == [1, 2, 3, 4]


def test_a_model_that_cannot_be_packed_is_refused(kit, host):
    with pytest.raises(ConfigError, match="base_precision is 'int8', and none of the model's weights can be packed"):
        start.check(host, kit.config(base_precision="int8"))
    with pytest.raises(ConfigError, match="base_precision is 'int8' and rank 0"):
        kit.config(base_precision="int8", rank=0)


@pytest.mark.parametrize("offload", [False, True])
def test_others_wait_aside_while_the_student_trains(kit, host, tmp_path, offload):
    seen = []

    @contextmanager
    def aside(decodes=False):
        seen.append(("away", decodes))
        try:
            yield
        finally:
            seen.append(("back", decodes))

    host.aside = aside
    for event in kit.run.run(host, kit.config(offload=offload), tmp_path, kit.WORDS):
        seen.append(type(event).__name__)
    if not offload:
        assert not {("away", False), ("back", False)} & set(seen)
        return
    assert seen[-1] == ("back", False)
    assert seen.index("PairsMade") < seen.index(("away", False)) < seen.index("Begun")
