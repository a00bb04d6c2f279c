"""The planner's choices, on sizes that are given: the fastest that fits, what is set by hand kept, and honest words."""

from types import SimpleNamespace

import pytest
from torch import nn
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.run import memory, run
from turbodistill.trainer.run import plan as plans
from turbodistill.trainer.run.estimate import estimate, planned
from turbodistill.trainer.run.events import Planned
from turbodistill.trainer.run.kept import Kept
from turbodistill.trainer.run.memory import GB, Line, Measured
from turbodistill.trainer.run.plan import CONTEXT, DISPLAY, LOST, check_full, plan, set_by_hand, usable

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


def test_what_there_is_none_of_in_a_host_is_neither_chosen_nor_told():
    config = Config(batch_size=2)
    found = plan(measured(), config, card(7.8), {"batch_size"}, absent=("base_precision", "offload"))
    assert changed(found, config) == {"gradient_checkpointing": True} and found.given == ("batch_size",)
    assert "base_precision" not in found.in_words() and "offload" not in found.in_words()


def test_a_page_is_told_in_a_sentence_what_differs_from_what_was_asked():
    asked = Config(batch_size=2, gradient_checkpointing=True)
    begun = asked.replace(gradient_checkpointing=False)
    assert plan(measured(), begun, 16 * GB, {"offload"}).in_a_sentence(asked) == (
        "for a card of 16.0 GB: batch_size 1 with gradient_accumulation 2, gradient_checkpointing false; "
        "set by hand, and kept: offload"
    )
    assert plan(measured(), begun, 40 * GB).in_a_sentence(begun) == "for a card of 40.0 GB: as it is set"
    small = plan(measured(), begun, 4 * GB, {"batch_size"}).in_a_sentence(asked)
    assert "No settings make it fit" in small and small.endswith("set by hand, and kept: batch_size")


def test_what_is_set_by_hand_is_not_where_the_form_begins():
    begins = {"batch_size": 4, "gradient_checkpointing": True}
    assert set_by_hand(Config(**begins), begins) == set()
    assert set_by_hand(Config(batch_size=4, lr=1e-3), begins) == {"gradient_checkpointing", "lr"}


def test_prodigy_stays_what_it_is():
    config = Config(rank=0, batch_size=1, optimizer="prodigy", lr=1.0)
    found = plan(measured(packing=0), config, card(4), eight_bit_moments=True)
    assert not found.fits and found.config.optimizer == "prodigy"
    adam = plan(measured(packing=0), config.replace(optimizer="adamw"), card(4))
    assert found.memory.trained - adam.memory.trained == 2 * GB // 4


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


# --- in a run ---


def room_for(monkeypatch, host, config, prompts, less=1):
    """A card that leaves `less` bytes less than these settings take, whatever its GB; the measure that says so.

    Previews take nothing: of such small pictures they would be most of it, and no setting makes them less.
    """
    monkeypatch.setattr(memory, "DECODING", 0)
    found, _, measure = planned(host, config, prompts)
    take = measure.memory(found.config).total - less
    monkeypatch.setattr(plans, "usable", lambda card: take)
    return measure


def test_a_run_chooses_what_fits_and_says_it_before_the_pairs(kit, tmp_path, monkeypatch):
    config = kit.config(taps="", vram=8.0)
    measure = room_for(monkeypatch, kit.unet_host(), config, kit.WORDS)
    events = kit.go(kit.unet_host(), config, tmp_path)
    first = events[0]
    assert isinstance(first, Planned) and first.text.startswith("for a card of 8.0 GB: ")
    chosen = Config(**kit.saved(tmp_path)["config"])
    assert chosen != config and chosen.batch_size * chosen.gradient_accumulation == config.batch_size
    assert measure.memory(chosen).total < measure.memory(config).total
    assert kit.names(events)[-1] == "Finished"
    monkeypatch.undo()  # on a larger card it goes on as it was set, with the optimizer that it has
    kit.go(kit.unet_host(), config.replace(updates=3, vram=9.0), tmp_path)
    assert kit.updates(tmp_path) == [1, 2, 3]
    later = Config(**kit.saved(tmp_path)["config"])
    assert later == config.replace(updates=3, vram=9.0, optimizer=chosen.optimizer)


def test_a_run_keeps_what_is_set_by_hand_and_ends_where_nothing_fits(kit, tmp_path, monkeypatch):
    host, config = kit.unet_host(), kit.config(taps="", vram=8.0)
    room_for(monkeypatch, host, config, kit.WORDS)
    fixed = {"batch_size", "gradient_checkpointing", "offload", "optimizer"}
    with pytest.raises(ConfigError, match=r"No settings make it fit: .* set by hand, and kept: .*batch_size"):
        list(run.run(host, config, tmp_path, kit.WORDS, given=fixed))
    assert not list(tmp_path.glob("pairs*"))
    with pytest.raises(ConfigError, match="vram plans for one process"):
        run._fitted(host, config, kit.WORDS, None, SimpleNamespace(size=2), tmp_path)


def test_an_estimate_is_of_what_is_chosen(kit, monkeypatch):
    host, config = kit.unet_host(), kit.config(taps="", vram=8.0)
    measure = room_for(monkeypatch, host, config, kit.WORDS)
    found = estimate(host, config, kit.WORDS)
    assert found.plan.startswith("for a card of 8.0 GB: ") and found.in_words().startswith(found.plan)
    assert found.memory.total < measure.memory(config).total


def test_a_host_packs_and_places_by_itself(kit, monkeypatch):
    host, config = kit.unet_host(), kit.config(taps="", vram=8.0, batch_size=1)
    host.own = False
    room_for(monkeypatch, host, config, kit.WORDS, less=10**9)
    found, *_ = planned(host, config, kit.WORDS)
    assert not found.fits and found.config.base_precision == "as loaded" and not found.config.offload
