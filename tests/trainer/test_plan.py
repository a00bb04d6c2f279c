"""The planner's choices, on sizes that are given: the fastest that fits, what is set by hand kept, and honest words."""

import pytest
from torch import nn
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.run.kept import Kept
from turbodistill.trainer.run.memory import GB, Line, Measured
from turbodistill.trainer.run.plan import CONTEXT, DISPLAY, LOST, check_full, plan, usable

WAYS = ("offload", "batch_size", "gradient_checkpointing", "optimizer", "base_precision")


def kept(*gigabytes, outside=0.0, inputs=0.0):
    return Kept({"": int(outside * GB), **{f"b{i}": int(n * GB) for i, n in enumerate(gigabytes)}}, int(inputs * GB))


def measured(**changes):
    """A model of 5 GB, of which a sample keeps 4 GB in four blocks, or 0.4 GB with checkpointing."""
    one, two = kept(1, 1, 1, 1, inputs=0.2), kept(2, 2, 2, 2, inputs=0.4)
    values = {
        "weights": 5 * GB, "packing": 2 * GB, "encoders": GB, "autoencoder": GB // 2, "student": GB // 4, "score": 0,
        "heads": 0, "casts": 0, "passes": Line(one, two), "features": None, "maps": 0, "scoring": None,
        "decoding": GB,
    }  # fmt: skip
    return Measured(**(values | changes))


def card(room):
    """Bytes of a card that leaves so many GB to a training."""
    return int(room * GB / (1 - LOST)) + CONTEXT + DISPLAY + 8


def changed(found, config):
    return {name: getattr(found.config, name) for name in WAYS if getattr(found.config, name) != getattr(config, name)}


def test_what_is_usable_is_told_apart():
    assert usable(card(9)) == pytest.approx(9 * GB, abs=100)
    assert usable(12 * GB) == pytest.approx((12 - 0.5 - 0.4) * 0.95 * GB, rel=1e-6)
    assert usable(GB // 2) == 0


def test_nothing_is_changed_where_everything_fits():
    config = Config(batch_size=2)
    found = plan(measured(), config, card(17))  # 5 + 1.5 + 1 + 8
    assert found.fits and found.config == config and found.changes == {} and found.slower == 1
    assert "which fits" in found.in_words()


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (15.4, {"offload": True}),  # the rest is 14 GB
        (12.0, {"batch_size": 1}),  # 5 + 1.5 + 1 + 4 and the gradients
        (10.4, {"offload": True, "batch_size": 1}),
        (7.8, {"offload": True, "batch_size": 1, "gradient_checkpointing": True}),
        (6.5, {"offload": True, "gradient_checkpointing": True, "base_precision": "int8"}),
    ],
)
def test_the_fastest_that_fits_is_taken(room, expected):
    config = Config(batch_size=2)
    found = plan(measured(), config, card(room))
    assert found.fits and changed(found, config) == expected
    assert found.config.batch_size * found.config.gradient_accumulation == 2
    assert found.memory.total <= room * GB
    assert set(found.changes) == set(expected) and all(n > 0 for n in found.changes.values())


def test_halves_of_a_batch_come_before_a_batch_of_one():
    found = plan(measured(), Config(batch_size=12, gradient_accumulation=3), card(5 + 1.5 + 1 + 0.25 + 17))
    assert (found.config.batch_size, found.config.gradient_accumulation) == (4, 9)


def test_what_is_set_by_hand_stays_and_is_said():
    config = Config(batch_size=2, gradient_checkpointing=False)
    found = plan(measured(), config, card(8), {"gradient_checkpointing", "batch_size", "rank"})
    assert not found.fits and found.config.batch_size == 2 and not found.config.gradient_checkpointing
    assert "set by hand, and kept: batch_size, gradient_checkpointing" in found.in_words()
    by_accumulation = plan(measured(), config, card(12), {"gradient_accumulation"})
    assert by_accumulation.config.batch_size == 2


def test_eight_bit_moments_are_offered_where_there_is_an_optimizer_for_them():
    full = measured(student=10 * GB, packing=0, encoders=0, autoencoder=0)
    config = Config(rank=0, batch_size=1, gradient_checkpointing=True)
    # 5 + 4 * 10 + 10 of gradients, or two moments of 2.5 GB and their scales in place of 20 GB
    assert not plan(full, config, card(46)).fits
    found = plan(full, config, card(46), eight_bit_moments=True)
    assert found.fits and changed(found, config) == {"optimizer": "adamw8bit"}
    assert found.changes["optimizer"] == pytest.approx(20 * GB * (1 - (1 + 4 / 256) / 4), rel=1e-3)


def test_what_cannot_be_is_not_offered():
    small = measured(packing=0, encoders=0, autoencoder=0, passes=Line(kept(outside=4), kept(outside=8)))
    config = Config(batch_size=2)
    found = plan(small, config, card(3))
    assert changed(found, config) == {"batch_size": 1}
    pixels = Config(batch_size=2, pixel_backbone="embedded")
    found = plan(measured(encoders=0), pixels, card(3))
    assert not found.config.offload  # every update decodes


def test_an_autoencoder_that_is_away_comes_back_for_a_preview():
    config = Config(batch_size=2)
    here, away = (measured(decoding=9 * GB).memory(config.replace(offload=on)) for on in (False, True))
    assert here.beside == GB + GB // 2 and here.decoding == 9 * GB
    assert away.beside == 0 and away.decoding == 9 * GB + GB // 2


def test_where_nothing_fits_that_is_said():
    found = plan(measured(), Config(batch_size=2), card(4))
    words = found.in_words()
    assert not found.fits and "which does not fit" in words
    missing = found.memory.total - usable(found.card)
    assert f"{missing / GB:.1f} GB are missing. Make smaller pictures, or lower rank" in words
    full = plan(measured(packing=0), Config(rank=0), card(4)).in_words()
    assert "Train a LoRA (rank 1 or more)" in full and "lower rank" not in full


def test_a_model_that_cannot_be_loaded_whole_is_told():
    """A packed one would fit, but the pairs are made before it is packed."""
    config = Config(batch_size=2)
    found = plan(measured(encoders=9 * GB), config, card(10))
    assert found.trains and not found.fits
    assert "The model is loaded whole to make the teacher pairs, and takes 14.5 GB then" in found.in_words()
    assert plan(measured(encoders=9 * GB), config, card(15)).fits


def test_every_gigabyte_is_told():
    found = plan(measured(), Config(batch_size=2), card(7.8))
    words = found.in_words()
    rows = [line.split("  ") for line in words.splitlines() if line.startswith("  ")]
    numbers = [float(row[-2].split()[0]) for row in rows]
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.2)
    assert "0.5 GB for CUDA's context, 0.4 GB for a display and 5% that the allocator cannot use leave 7.8 GB" in words
    assert "batch_size 1 with gradient_accumulation 2" in words and "gradient_checkpointing true" in words
    assert "about a third slower" in words


def test_a_full_copy_that_cannot_fit_is_refused_before_it_is_made():
    network = nn.Linear(2**14, 2**14, bias=False, device="meta")  # 2**28 numbers: 22 bytes each are 5.5 GB
    check_full(network, Config(rank=0), card(5.6), False)
    with pytest.raises(ConfigError, match="rank is 0, and a full copy takes"):
        check_full(network, Config(rank=0), card(5.4), False)
    check_full(network, Config(rank=0), card(5.4), True)
