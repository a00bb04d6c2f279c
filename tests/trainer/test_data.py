"""Prompts, captioned pictures and teacher pairs: made once, whole, and refused with a reason when they are not."""

import errno
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from turbodistill.core.denoiser import Cond, Guided
from turbodistill.core.sampling import sample_euler, seeded_noise, trailing_sigmas
from turbodistill.trainer.data import images, pairs
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.images import cache_images, check_pictures, load_picture, read_image_folder
from turbodistill.trainer.data.pairs import load_pairs, make_pairs, pairs_key
from turbodistill.trainer.data.prompts import prompt_lines, read_prompts
from turbodistill.trainer.data.samples import Samples, read_shard, write_shard


def test_prompts_are_lines_without_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# a comment\n a red fox \r\n\n\u00fcber owl\n".encode())
    assert read_prompts(path) == ["a red fox", "über owl"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist: check the name"),
        (b"", "holds no prompt: write one a line"),
        (b"\n# only a comment\n", "holds no prompt"),
        (b"caf\xe9\n", "is no UTF-8 text"),
    ],
)
def test_a_bad_prompt_file_is_told(tmp_path, content, told):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_prompts(path)


def picture(path, colour="red", size=(40, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def captioned(folder, count=3):
    for i in range(count):
        picture(folder / f"{i}.png", (80 * i, 0, 0)).with_suffix(".txt").write_text(f"picture {i}\n")
    return folder


def test_captions_come_from_text_files(tmp_path):
    found = read_image_folder(captioned(tmp_path / "images"))
    assert [(p.name, text) for p, text in found] == [(f"{i}.png", f"picture {i}") for i in range(3)]


def test_captions_come_from_a_table(tmp_path):
    picture(tmp_path / "deep" / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "deep/a.png", "text": "a fox", "more": 1}\n\n')
    assert read_image_folder(tmp_path) == [(tmp_path / "deep" / "a.png", "a fox")]


def no_caption(folder):
    picture(folder / "a.png")


def caption_in_another_encoding(folder):
    picture(folder / "a.png").with_suffix(".txt").write_bytes(b"caf\xe9")


def table(line):
    def make(folder):
        picture(folder / "a.png")
        (folder / "metadata.jsonl").write_bytes(line)

    return make


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: folder.rmdir(), "does not exist"),
        (lambda folder: None, "holds no picture"),
        (no_caption, "1 pictures have no caption, the first is .*a.png: write it to a .txt"),
        (caption_in_another_encoding, "caption .*a.txt is no UTF-8 text"),
        (table(b'{"file_name": "a.png"}'), "every line must be JSON with file_name and text"),
        (table(b"a.png, a fox"), "every line must be JSON"),
        (table(b'["a.png", "a fox"]'), "every line must be JSON"),
        (table(b'{"file_name": "a.png", "text": "caf\xe9"}'), "every line must be JSON"),
        (table(b"\n"), "holds no picture"),
    ],
)
def test_a_bad_image_folder_is_told(tmp_path, make, told):
    folder = tmp_path / "images"
    folder.mkdir()
    make(folder)
    with pytest.raises(DataError, match=told):
        read_image_folder(folder)


def test_a_picture_is_scaled_and_cropped_about_its_centre(tmp_path):
    wide = Image.new("RGB", (80, 20), "red")
    wide.paste("blue", (30, 0, 50, 20))
    wide.save(tmp_path / "wide.png")
    x = load_picture(tmp_path / "wide.png", (10, 10))
    assert x.shape == (3, 10, 10) and x.dtype == torch.float32
    assert (x[2] - x[0] > 0.9)[:, 2:-2].all()  # the blue middle; its edges are filtered


def test_a_transparent_picture_is_put_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_picture(tmp_path / "clear.png", (8, 8)) == 1).all()


def broken_pictures():
    import io

    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "png")
    whole = buffer.getvalue()
    # A wrong first chunk makes Pillow raise SyntaxError or ValueError instead of OSError.
    return {
        "empty": b"",
        "text": b"no picture",
        "truncated": whole[: len(whole) // 2],
        "chunk": whole[:12] + b"\x00\x01\x02\x03" + whole[16:],
        "length": whole[:8] + b"\x00\x00\x00\x01" + whole[12:],
    }


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "chunk", "length"])
def test_a_broken_picture_is_named(tmp_path, kind):
    path = tmp_path / "a.png"
    path.write_bytes(broken_pictures()[kind])
    with pytest.raises(DataError, match=r"picture .*a.png cannot be read .*: replace or remove it"):
        load_picture(path, (8, 8))


def test_pictures_are_encoded_once(kit, host, tmp_path, monkeypatch):
    folder, cache = captioned(tmp_path / "images"), tmp_path / "cache"
    ((done, first),) = cache_images(host, folder, cache)
    assert done == 3 and first.prompts == ["picture 0", "picture 1", "picture 2"] and first.seeds is None
    assert first.latents.shape == (3, *host.latent_shape)
    expected = host.encode_images(load_picture(folder / "1.png", host.resolution)[None])
    assert torch.equal(first.latents[1:2], expected)
    with monkeypatch.context() as patch:
        patch.setattr(host, "encode_images", None)  # a second call would fail
        ((_, again),) = cache_images(host, folder, cache)
    assert torch.allclose(again.latents, first.latents, atol=2e-3)
    # A new caption is a new picture.
    (folder / "1.txt").write_text("another")
    ((_, changed),) = cache_images(host, folder, cache)
    assert changed.prompts[1] == "another"


def test_a_broken_picture_in_a_folder_stops_the_encoding(host, tmp_path):
    folder = captioned(tmp_path / "images")
    (folder / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        list(cache_images(host, folder, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_pair_is_what_the_teacher_makes_of_its_noise(kit, host, tmp_path):
    config = kit.config(pairs=7, pair_steps=3, seed=2)
    samples = kit.pairs(host, config, tmp_path, ["a", "b", "c"])
    assert samples.prompts == ["a", "b", "c", "a", "b", "c", "a"]
    assert samples.seeds.tolist() == [2_000_000 + k for k in range(7)]
    noise = samples.noise(torch.tensor([4]))
    assert torch.equal(noise, seeded_noise([2_000_004], host.latent_shape))
    model = Guided(host.denoiser, host.encode_text(["b"]), host.encode_text([""]), config.guidance)
    sigmas = trailing_sigmas(host.denoiser.schedule, 3)
    with torch.no_grad():
        latents = sample_euler(model, noise * sigmas[0], sigmas)
    assert torch.allclose(samples.latents[4:5], latents, rtol=2e-3, atol=2e-3)  # they are stored as float16
    assert torch.allclose(samples.cond.context[4:5], host.encode_text(["b"]).context, rtol=2e-3, atol=2e-3)


def test_pictures_have_no_noise(host):
    samples = Samples(torch.zeros(1, 4, 8, 8), host.encode_text(["a"]), ["a"])
    with pytest.raises(ValueError, match="only teacher pairs do"):
        samples.noise(torch.tensor([0]))


@pytest.fixture
def small_shards(monkeypatch):
    for module in (pairs, images):
        monkeypatch.setattr(module, "SHARD", 4)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


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
    assert len(many) == 10 and torch.equal(many.latents[:6], few.latents)
    assert len(load_pairs(tmp_path, 5)) == 5


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 0xFF
    path.write_bytes(raw)


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def strip(path):
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path)


@pytest.mark.parametrize(
    ("damage", "told"), [(flip, "wrong checksum"), (truncate, "is broken"), (strip, "wrong checksum")]
)
def test_a_corrupt_shard_is_told_and_made_again(kit, host, tmp_path, small_shards, caplog, damage, told):
    config = kit.config(pairs=10)
    whole = kit.pairs(host, config, tmp_path)
    damage(tmp_path / "pairs-0000004.safetensors")
    with pytest.raises(DataError, match=rf"pairs-0000004.*{told}.*only its samples are made anew"):
        load_pairs(tmp_path)
    with caplog.at_level(logging.WARNING):
        again = kit.pairs(host, config, tmp_path)
    assert "pairs-0000004" in caplog.text and "making it again" in caplog.text
    assert torch.equal(again.latents, whole.latents) and torch.equal(again.seeds, whole.seeds)


@pytest.mark.parametrize("changes", [{"guidance": 3.0}, {"pair_steps": 3}, {"seed": 1}, {"pair_sampler": "dpmpp_2m"}])
def test_pairs_made_with_other_settings_are_refused_and_kept(kit, host, tmp_path, changes):
    config = kit.config()
    kit.pairs(host, config, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(DataError, match="made with other settings or another model: use another folder"):
        kit.pairs(host, config.replace(**changes), tmp_path)
    assert contents(tmp_path) == before


def test_pairs_of_another_model_or_other_prompts_are_refused(kit, host, tmp_path):
    config = kit.config()
    kit.pairs(host, config, tmp_path)
    with pytest.raises(DataError, match="another model"):
        kit.pairs(kit.conv_host(seed=1), config, tmp_path)
    with pytest.raises(DataError, match="another model"):
        kit.pairs(host, config, tmp_path, ["other", "words"])


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


def test_a_shard_keeps_every_field_of_the_conditions(tmp_path):
    cond = Cond(torch.randn(2, 3, 4), torch.randn(2, 5), {"y": torch.tensor([[1, 2], [3, 4]])})
    samples = Samples(torch.randn(2, 4, 8, 8), cond, ["ä", "b"], torch.tensor([1, 2]))
    write_shard(tmp_path / "s.safetensors", samples, "key")
    again = read_shard(tmp_path / "s.safetensors", "key")
    assert torch.allclose(again.cond.pooled, cond.pooled, atol=2e-3)
    assert torch.equal(again.cond.extra["y"], cond.extra["y"]) and again.cond.extra["y"].dtype == torch.int64
    assert again.prompts == ["ä", "b"] and torch.equal(again.seeds, samples.seeds)


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
    assert not (tmp_path / "pairs").exists()


def test_fewer_pairs_are_those_that_are_there(kit, host, tmp_path):
    kit.pairs(host, kit.config(pairs=12), tmp_path)
    before = contents(tmp_path)
    assert [done for done, _ in make_pairs(host, kit.config(pairs=5), kit.WORDS, tmp_path)] == [5]
    assert contents(tmp_path) == before and len(load_pairs(tmp_path, 5)) == 5


def test_prompts_are_the_lines_of_a_text():
    assert prompt_lines(" a fox \r\n\n# not this\n\tan owl #2") == ["a fox", "an owl #2"]
    assert prompt_lines("\n  # nor this\n") == []


def test_whole_pictures_pass(tmp_path):
    assert check_pictures(read_image_folder(captioned(tmp_path / "images"))) is None


@pytest.mark.parametrize("kind", ["empty", "text", "chunk", "length"])
def test_a_broken_picture_among_others_is_named_without_decoding_them(tmp_path, monkeypatch, kind):
    found = read_image_folder(captioned(tmp_path / "images"))
    (tmp_path / "images" / "1.png").write_bytes(broken_pictures()[kind])
    monkeypatch.setattr(images, "load_picture", None)
    with pytest.raises(DataError, match=r"picture .*1\.png cannot be read .*: replace or remove it"):
        check_pictures(found)


def test_a_picture_that_a_table_names_must_be_there(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a fox"}')
    with pytest.raises(DataError, match=r"picture .*a\.png cannot be read"):
        check_pictures(read_image_folder(tmp_path))


def test_the_text_encoder_is_part_of_a_pair_s_key(kit, host, monkeypatch):
    before = pairs_key(host, kit.config(), kit.WORDS)
    assert pairs_key(host, kit.config(lr=1.0, pairs=99), kit.WORDS) == before  # what does not decide a pair
    monkeypatch.setattr(host, "text_hash", "another", raising=False)
    assert pairs_key(host, kit.config(), kit.WORDS) != before
