"""Teacher pairs: made once, whole, completed where they were stopped, and refused when they are of another kind."""

import dataclasses
import errno
import itertools
import logging
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from turbodistill.core.denoiser import Guidance, Guided
from turbodistill.core.sampling import sample_euler, seeded_noise, trailing_sigmas
from turbodistill.core.schedule import DiscreteSchedule, scaled_linear, zero_terminal
from turbodistill.core.student import load_student
from turbodistill.generate.sample import sample
from turbodistill.trainer.config import Config
from turbodistill.trainer.data import conditioning, pairs
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.lock import LOCK
from turbodistill.trainer.data.pairs import load_pairs, make_pairs, pairs_key, pairs_size
from turbodistill.trainer.run import run
from turbodistill.trainer.run.estimate import estimate


def test_a_pair_is_what_the_teacher_makes_of_its_noise(kit, host, tmp_path):
    config = kit.config(pairs=7, pair_steps=3, seed=2)
    samples = kit.pairs(host, config, tmp_path, ["a", "b", "c"])
    assert samples.prompts == ["a", "b", "c", "a", "b", "c", "a"]
    assert samples.seeds.tolist() == [2_000_000 + k for k in range(7)]
    noise = samples.noise(torch.tensor([4]))
    assert torch.equal(noise, seeded_noise([2_000_004], host.latent_shape))
    model = Guided(host.denoiser, host.encode_text(["b"]), host.encode_text([""]), Guidance(config.guidance))
    sigmas = trailing_sigmas(host.denoiser.schedule, 3)
    with torch.no_grad():
        latents = sample_euler(model, noise * sigmas[0], sigmas)
    assert torch.allclose(samples.latents[4:5], latents, rtol=2e-3, atol=2e-3)  # they are stored as float16
    assert torch.allclose(samples.cond.rows(slice(4, 5)).context, host.encode_text(["b"]).context, rtol=2e-3, atol=2e-3)


@pytest.fixture
def small_shards(monkeypatch):
    for module in (pairs, conditioning):
        monkeypatch.setattr(module, "SHARD", 4)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != LOCK}


def test_pairs_go_on_where_they_were_stopped(kit, host, tmp_path, small_shards):
    config = kit.config(pairs=10)
    kit.pairs(host, config, tmp_path / "whole")
    making = make_pairs(host, config, kit.WORDS, tmp_path / "stopped")
    assert next(making)[0] == 4
    making.close()
    stamp = (tmp_path / "stopped" / "pairs-0000000.safetensors").stat().st_mtime_ns
    told = [done for done, _ in make_pairs(host, config, kit.WORDS, tmp_path / "stopped")]
    assert told == [4, 8, 10]
    assert (tmp_path / "stopped" / "pairs-0000000.safetensors").stat().st_mtime_ns == stamp
    for path in (tmp_path / "whole").iterdir():  # the headers' order is safetensors' own, so not byte by byte
        assert kit.same(kit.tensors(path), kit.tensors(tmp_path / "stopped" / path.name))


def test_more_pairs_keep_those_that_are_there(kit, host, tmp_path, small_shards):
    few = kit.pairs(host, kit.config(pairs=6), tmp_path)
    many = kit.pairs(host, kit.config(pairs=10), tmp_path)
    assert len(many) == 10 and torch.equal(many.latents[:6], few.latents[:])
    assert len(load_pairs(tmp_path, 5)) == 5


@pytest.mark.parametrize(
    ("damage", "told"), [("flip", "wrong checksum"), ("truncate", "is broken"), ("strip", "wrong checksum")]
)
def test_a_corrupt_shard_is_told_and_made_again(kit, host, tmp_path, small_shards, caplog, damage, told):
    config = kit.config(pairs=10)
    whole = kit.pairs(host, config, tmp_path)
    latents = whole.latents[:]
    getattr(kit, damage)(tmp_path / "pairs-0000004.safetensors")
    with pytest.raises(DataError, match=rf"pairs-0000004.*{told}.*every run makes such a file again"):
        load_pairs(tmp_path)
    with caplog.at_level(logging.WARNING):
        again = kit.pairs(host, config, tmp_path)
    assert "pairs-0000004" in caplog.text and "makes such a file again" in caplog.text
    assert torch.equal(again.latents[:], latents) and torch.equal(again.seeds, whole.seeds)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"guidance": 3.0}, "guidance was 2.0 and is 3.0"),
        ({"pair_steps": 3}, "steps was 2 and is 3"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"pair_sampler": "dpmpp_2m"}, "sampler was euler and is dpmpp_2m"),
    ],
)
def test_pairs_made_with_other_settings_are_refused_and_kept(kit, host, tmp_path, changes, told):
    config = kit.config()
    kit.pairs(host, config, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=rf"are others \({told}\): change that back, or use another name or folder"):
        kit.pairs(host, config.replace(**changes), tmp_path)
    assert contents(tmp_path) == before


def test_pairs_of_another_model_or_other_prompts_are_refused(kit, host, tmp_path):
    config = kit.config()
    kit.pairs(host, config, tmp_path)
    with pytest.raises(DataError, match="another model"):
        kit.pairs(kit.conv_host(seed=1), config, tmp_path)
    with pytest.raises(DataError, match=r"are others \(other prompts\)"):
        kit.pairs(host, config, tmp_path, ["other", "words"])
    with pytest.raises(DataError, match=r"guidance was 2.0 and is 3.0 and other prompts"):
        kit.pairs(host, config.replace(guidance=3.0), tmp_path, ["other", "words"])


def test_more_pairs_of_prompts_with_choices_go_on_with_those_that_are_there(kit, host, tmp_path, small_shards):
    lines = ["a {red|blue|green} fox", "{one|two} owls"]
    few = kit.pairs(host, kit.config(pairs=6), tmp_path, lines)
    begun, latents = few.prompts, few.latents[:]
    many = kit.pairs(host, kit.config(pairs=14), tmp_path, lines)
    assert many.prompts[:6] == begun and len(set(many.prompts)) > 2 and not {"{", "|"} & set("".join(many.prompts))
    assert torch.equal(many.latents[:6], latents) and len(many) == 14


def test_no_pairs_and_no_prompts_are_told(kit, host, tmp_path):
    with pytest.raises(DataError, match="holds no teacher pairs"):
        load_pairs(tmp_path)
    with pytest.raises(DataError, match="no prompts"):
        next(make_pairs(host, kit.config(), [], tmp_path))


def test_a_full_disk_keeps_the_shards_that_are_whole(kit, host, tmp_path, small_shards, monkeypatch):
    config = kit.config(pairs=10)
    making = make_pairs(host, config, kit.WORDS, tmp_path)
    next(making)
    before = contents(tmp_path)
    inner = Path.write_bytes

    def full(path, content):
        inner(path, content[:100])  # as a full disk does: a part of the file is there
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"cannot write .*No space left on device.*: free some space"):
            next(making)
    assert contents(tmp_path) == before
    assert len(kit.pairs(host, config, tmp_path)) == 10


def whole_of(path):
    """All that a shard holds; the order in a file's header is safetensors' own."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def same_shards(kit, one, other):
    for path in one.iterdir():
        (about, tensors), (about_other, tensors_other) = whole_of(path), whole_of(other / path.name)
        assert about == about_other and kit.same(tensors, tensors_other)
        assert path.stat().st_size == (other / path.name).stat().st_size
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_shard_that_is_begun_is_completed_to_the_same(kit, host, tmp_path, monkeypatch, after):
    monkeypatch.setattr(pairs, "SHARD", 8)
    config = kit.config(pairs=14, batch_size=3)
    kit.pairs(host, config, tmp_path / "whole")
    making = make_pairs(host, config, kit.WORDS, tmp_path / "cut")
    done = [next(making)[0] for _ in range(after)][-1]
    making.close()
    assert done == (3, 6, 8, 11)[after - 1]
    assert len(load_pairs(tmp_path / "cut")) == done  # nothing of it is lost, nor half
    told = [done for done, _ in make_pairs(host, config, kit.WORDS, tmp_path / "cut")]
    assert told[-1] == 14 and all(number > done for number in told if number != 8)
    same_shards(kit, tmp_path / "whole", tmp_path / "cut")


def test_an_error_in_a_pass_keeps_what_is_made(kit, host, tmp_path):
    config, passes = kit.config(pairs=12), iter(range(1, 100))

    def look(*_):
        if next(passes) == 4:  # of two for every batch of four
            raise KeyError("a host's own")

    kit.pairs(host, config, tmp_path / "whole")
    handle = host.denoiser.backbone.register_forward_pre_hook(look)
    with pytest.raises(KeyError, match="a host's own"):
        kit.pairs(host, config, tmp_path / "cut")
    handle.remove()
    assert len(load_pairs(tmp_path / "cut")) == 4
    kit.pairs(host, config, tmp_path / "cut")
    same_shards(kit, tmp_path / "whole", tmp_path / "cut")


def test_nothing_is_written_before_anything_is_made(kit, host, tmp_path, monkeypatch):
    monkeypatch.setattr(host.denoiser.schedule, "add_noise", None)
    with pytest.raises(TypeError):
        kit.pairs(host, kit.config(), tmp_path / "pairs")
    assert not list(tmp_path.rglob("pairs-*"))


def test_fewer_pairs_are_those_that_are_there(kit, host, tmp_path):
    kit.pairs(host, kit.config(pairs=12), tmp_path)
    before = contents(tmp_path)
    assert [done for done, _ in make_pairs(host, kit.config(pairs=5), kit.WORDS, tmp_path)] == [5]
    assert contents(tmp_path) == before and len(load_pairs(tmp_path, 5)) == 5


def test_the_text_encoder_is_part_of_a_pair_s_key(kit, host, monkeypatch):
    before = pairs_key(host, kit.config(), kit.WORDS)
    assert pairs_key(host, kit.config(lr=1.0, pairs=99), kit.WORDS) == before  # what does not decide a pair
    monkeypatch.setattr(host, "text_hash", "another", raising=False)
    assert pairs_key(host, kit.config(), kit.WORDS) != before


def test_how_the_weights_are_read_is_part_of_a_pair_s_key(kit, host, monkeypatch):
    """The same weights at other noise levels, or read as another prediction, make other pairs."""
    before = pairs_key(host, kit.config(), kit.WORDS)
    with monkeypatch.context() as changed:
        changed.setattr(host.denoiser, "prediction", "v")
        assert pairs_key(host, kit.config(), kit.WORDS) != before
    monkeypatch.setattr(host.denoiser, "schedule", DiscreteSchedule(zero_terminal(scaled_linear())))
    assert pairs_key(host, kit.config(), kit.WORDS) != before


@pytest.mark.parametrize(("count", "prompts"), [(12, 12), (8, 3), (5, 12)])
def test_the_size_on_disk_is_known_beforehand(kit, host, tmp_path, count, prompts):
    kit.pairs(host, kit.config(pairs=count), tmp_path, kit.WORDS[:prompts])
    tensors = [t for path in tmp_path.iterdir() for t in kit.tensors(path).values()]
    size = pairs_size(host.latent_shape, host.encode_text([""]), count, min(count, prompts))
    assert size == sum(t.numel() * t.element_size() for t in tensors)
    assert estimate(host, kit.config(pairs=count), kit.WORDS[:prompts]).on_disk == size


def test_pairs_that_do_not_fit_on_the_disk_are_not_begun(kit, host, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    with pytest.raises(DataError, match=r"take about 0\.0 GB in .*pairs, and 0\.0 GB are free there: make room"):
        kit.pairs(host, kit.config(), tmp_path / "new" / "pairs")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    kit.pairs(host, kit.config(), tmp_path / "new" / "pairs")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    assert len(kit.pairs(host, kit.config(pairs=13), tmp_path / "new" / "pairs")) == 13  # what is there is counted


@contextmanager
def spoilt(host, value, *passes):
    """Within, the given passes of the model, counted from 1, have `value` in place of the picture of their row 2."""
    count = itertools.count(1)

    def spoil(_module, _args, output):
        output = output.clone()
        if next(count) in passes:
            output[min(2, len(output) - 1)] = value
        return output

    handle = host.denoiser.backbone.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pair_that_is_no_picture_is_named_and_made_from_another_noise(kit, host, tmp_path, value):
    config, said = kit.config(guidance=1.0), []
    whole = kit.pairs(host, config, tmp_path / "whole")
    with spoilt(host, value, 4):  # of two for every batch of four: in the second batch
        assert len(list(make_pairs(host, config, kit.WORDS, tmp_path / "bad", said.append))) == 3
    assert said == ["pair 6 ('emu') was no picture: made from another noise"]
    other = load_pairs(tmp_path / "bad")
    same = [torch.equal(a, b) for a, b in zip(whole.latents[:], other.latents[:], strict=True)]
    assert [row for row, equal in enumerate(same) if not equal] == [6] and other.latents[:].isfinite().all()
    assert other.prompts == whole.prompts and other.noise(torch.tensor([6]))[0].ne(whole.noise(torch.tensor([6]))).any()
    again = kit.pairs(host, config.replace(pairs=20), tmp_path / "bad")
    assert torch.equal(again.seeds[:12], other.seeds) and again.seeds[6] == 6 + 2**31


def test_a_picture_of_one_colour_is_none(kit, host, tmp_path, monkeypatch):
    inner, said, made = pairs.Teacher.pictures, [], []

    def dull(*args):
        made.append(inner(*args))
        if len(made) == 1:
            made[0][1] = torch.tensor([0.3, -1.0, 0.0, 5.0])[:, None, None]
        return made[-1]

    monkeypatch.setattr(pairs.Teacher, "pictures", dull)
    list(make_pairs(host, kit.config(), kit.WORDS, tmp_path, said.append))
    assert said == ["pair 1 ('owl') was no picture: made from another noise"]
    assert load_pairs(tmp_path).latents[:].std((2, 3)).min() > 0.01


def test_a_pair_that_is_no_picture_twice_stops_at_once_and_is_named(kit, host, tmp_path):
    with spoilt(host, float("nan"), 4, 5, 6), pytest.raises(
        DataError, match=r"picture of pair 6 \('emu'\) is no picture: .* NaN or infinity.*float32"
    ):  # fmt: skip
        kit.pairs(host, kit.config(guidance=1.0), tmp_path)
    assert len(load_pairs(tmp_path)) == 4  # what was made before


def test_a_text_in_place_of_a_list_of_prompts_is_refused(kit, host, tmp_path):
    with pytest.raises(DataError, match="prompts is 'a fox': give a list of prompts"):
        kit.pairs(host, kit.config(), tmp_path, "a fox")
    with pytest.raises(ValueError, match="prompts is 'a fox': give a list of prompts"):
        next(sample(host, None, "a fox"))


def test_prompts_may_come_from_a_generator(kit, host, tmp_path):
    *_, finished = run.run(host, kit.config(updates=2), tmp_path, (word for word in kit.WORDS))
    student, _, _ = load_student(finished.path, host.denoiser)
    assert len(list(sample(host, student, iter(["a", "b"])))) == 2
    with pytest.raises(ValueError, match="steps is 2: the student was trained for 1 at most"):
        next(sample(host, student, ["a"], steps=2))
    with pytest.raises(ValueError, match="a student is sampled without size, strength: leave it out"):
        next(sample(host, student, ["a"], size=(64, 64), strength=0.5))


# What decides a teacher's picture; `pairs` only says how many there are, all else how they are trained on.
DECIDES = {
    *("pair_steps", "pair_sampler", "guidance", "seed", "sizes"),
    *("guidance_rescale", "guidance_start", "guidance_end"),
    *("negative_prompt", "prompt_prefix", "prompt_suffix"),
}
OTHER_VALUES = {"sizes": "24x40", "guidance": 3.0, "distillation_guidance": 3.0, "student_steps": 2, "teacher_steps": 2}


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda field: field.name)
def test_every_setting_that_decides_pairs_is_in_their_key_and_no_other(kit, host, field):
    config, name = kit.config(), field.name
    value = OTHER_VALUES.get(name) or {bool: True, str: "other", int: 9, float: 0.25}[type(field.default)]
    if field.metadata["choices"]:
        value = next(choice for choice in field.metadata["choices"] if choice != getattr(config, name))
    changed = config.replace(**{name: value})
    assert changed != config
    assert (pairs_key(host, changed, kit.WORDS) != pairs_key(host, config, kit.WORDS)) == (name in DECIDES)
    with_affix = config.replace(prompt_prefix="best")  # whether they are baked in matters where there are some
    assert pairs_key(host, with_affix.replace(bake_affixes=True), kit.WORDS) != pairs_key(host, with_affix, kit.WORDS)
