"""Conditioning is stored once for all that share a prompt, and files stay mapped without standing in the way."""

import logging
import os
import zlib
from glob import glob
from pathlib import Path

import pytest
import torch
from turbodistill.core.denoiser import Cond
from turbodistill.trainer.data import conditioning
from turbodistill.trainer.data.conditioning import Conditioning, read_conditioning
from turbodistill.trainer.data.files import DataError, write_whole
from turbodistill.trainer.data.pairs import load_pairs
from turbodistill.trainer.data.stored import StoredLatents


class Encoder:
    """A text encoder whose conditioning has every field; it counts what it is asked for."""

    def __init__(self, large: float = 1.0):
        self.asked, self.large = [], large

    def encode_text(self, prompts):
        self.asked += prompts
        draws = [torch.Generator().manual_seed(zlib.crc32(p.encode())) for p in prompts]
        tokens = max(len(p.split()) for p in prompts) * 3
        context = torch.stack([torch.randn(3, 4, generator=d).repeat(tokens // 3, 1) for d in draws])
        pooled = torch.stack([torch.randn(5, generator=d) for d in draws])
        return Cond(context * self.large, pooled, {"y": torch.tensor([[zlib.crc32(p.encode())] for p in prompts])})


def test_conditioning_keeps_every_field_and_is_stored_once_for_all_that_share_it(tmp_path, monkeypatch):
    monkeypatch.setattr(conditioning, "SHARD", 2)
    encoder, prompts = Encoder(), ["ä", "b", "ä", "c", "b b", "d"]
    stored = Conditioning(encoder, prompts, tmp_path, "key").of(prompts)
    assert encoder.asked == ["ä", "b", "c", "b b", "d"]
    for rows in (torch.tensor([2, 5, 0, 4]), slice(1, 3), slice(None)):
        texts = [prompts[i] for i in torch.arange(6)[rows]]
        with torch.autocast("cpu", torch.bfloat16):  # as in a training on a CPU that is fast in it
            found = stored.rows(rows)
        expected = encoder.encode_text(texts)
        assert torch.allclose(found.context, expected.context, atol=2e-3) and found.context.dtype == torch.float32
        assert torch.allclose(found.pooled, expected.pooled, atol=2e-3)
        assert torch.equal(found.extra["y"], expected.extra["y"]) and found.extra["y"].dtype == torch.int64
    again = read_conditioning(tmp_path, "key", ["d", "ä"])
    assert torch.equal(again.rows(slice(2)).pooled, stored.rows(torch.tensor([5, 0])).pooled)


def test_of_conditioning_only_what_is_needed_is_encoded_and_more_is_added(tmp_path, monkeypatch):
    monkeypatch.setattr(conditioning, "SHARD", 4)
    encoder, prompts = Encoder(), list("abcdefgh")
    for count, asked in ((2, "ab"), (3, "c"), (2, ""), (7, "defg")):
        encoder.asked = []
        stored = Conditioning(encoder, prompts[:count], tmp_path, "key").of(prompts[:count])
        assert "".join(encoder.asked) == asked
    assert torch.allclose(stored.rows(slice(7)).pooled, encoder.encode_text(prompts[:7]).pooled, atol=2e-3)
    once = Conditioning(Encoder(), prompts[:7], tmp_path / "once", "key").of(prompts[:7])
    assert torch.equal(once.rows(slice(7)).context, stored.rows(slice(7)).context)


def test_conditioning_too_large_for_half_precision_keeps_its_own(tmp_path):
    stored = Conditioning(Encoder(1e6), ["a", "b"], tmp_path, "key").of(["b"])
    assert torch.equal(stored.rows(slice(1)).context, Encoder(1e6).encode_text(["b"]).context)


class Ragged:
    """A text encoder whose texts are filled up to the longest of those it is given."""

    def encode_text(self, prompts):
        parts = [
            Cond(torch.full((1, len(p), 2), float(len(p))), extra={"deep": torch.ones(1, 3, 2, 4)}) for p in prompts
        ]
        return Cond.cat([part.measured(["context"]) for part in parts])


def test_texts_of_different_lengths_keep_them(tmp_path, monkeypatch):
    monkeypatch.setattr(conditioning, "SHARD", 2)
    prompts = ["abc", "a", "abcde"]
    Conditioning(Ragged(), prompts, tmp_path, "key").of(prompts)
    found = read_conditioning(tmp_path, "key", prompts).rows(torch.tensor([2, 0]))
    assert found.lengths["context"].tolist() == [5, 3] and found.context[:, :, 0].tolist() == [[5] * 5, [3, 3, 3, 0, 0]]
    assert found.extra["deep"].dtype == torch.float32 and found.extra["deep"].shape == (2, 3, 2, 4)
    assert read_conditioning(tmp_path, "key", ["a"]).parts[0].extra["deep"].dtype == torch.float16


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_broken_conditioning_is_told_and_made_again(kit, host, tmp_path, caplog, damage):
    whole = kit.pairs(host, kit.config(), tmp_path).cond.rows(slice(12))
    getattr(kit, damage)(tmp_path / "prompts-0000000.safetensors")
    with pytest.raises(DataError, match=r"prompts-0000000.*every run makes such a file again"):
        load_pairs(tmp_path)
    with caplog.at_level(logging.WARNING):
        again = kit.pairs(host, kit.config(), tmp_path)
    assert "prompts-0000000" in caplog.text and torch.equal(again.cond.rows(slice(12)).context, whole.context)


def test_conditioning_that_is_gone_is_told_and_made_again(kit, host, tmp_path):
    whole = kit.pairs(host, kit.config(), tmp_path)
    (tmp_path / "prompts-0000000.safetensors").unlink()
    with pytest.raises(DataError, match="holds no conditioning of prompt 'fox': run again"):
        load_pairs(tmp_path)
    again = kit.pairs(host, kit.config(), tmp_path)
    assert torch.equal(again.cond.rows(slice(12)).context, whole.cond.rows(slice(12)).context)


def test_no_file_is_replaced_while_it_is_mapped(kit, host, tmp_path, monkeypatch):
    """Windows refuses it. Each file is broken once, made again, and completed where more is wanted."""
    replace, replaced = os.replace, []

    def refuses(source, target):
        used = [*Path("/proc/self/maps").read_text().splitlines(), *map(os.path.realpath, glob("/proc/self/fd/*"))]
        if any(line.endswith(str(target)) for line in used):
            raise PermissionError(13, "The process cannot access the file because it is being used")
        replaced.append(Path(target).name)
        replace(source, target)

    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc/self/maps, which this system lacks")
    monkeypatch.setattr(os, "replace", refuses)
    kit.pairs(host, kit.config(pairs=5), tmp_path)
    kit.pairs(host, kit.config(pairs=9), tmp_path)
    for kind in ("pairs", "prompts"):
        kit.flip(tmp_path / f"{kind}-0000000.safetensors")
    mapped = kit.pairs(host, kit.config(pairs=9), tmp_path)
    assert replaced == ["prompts-0000000.safetensors", "pairs-0000000.safetensors"] * 3
    with pytest.raises(OSError, match="being used"):  # which the check sees
        write_whole(tmp_path / "pairs-0000000.safetensors", b"")
    assert len(mapped) == 9


def test_stored_latents_come_as_float32_whatever_autocast_says():
    latents = torch.randn(4, 2, 3, 3).half()
    stored = StoredLatents([latents[:1], latents[1:]], torch.tensor([3, 0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stored[:], latents[[3, 0]].float())
