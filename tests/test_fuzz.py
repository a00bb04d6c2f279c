"""Whatever is parsed ends in a value or in an error of ours, in words: never in another one, and never in a hang.

The budget is small here; `FUZZ=20000 pytest -k fuzz` tries more. What pages and nodes are sent is in their own rooms.
"""

import io
import json
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from turbodistill.core.card import KEY, CardError, StudentCard, read_card, read_student, titles
from turbodistill.core.families import by_file
from turbodistill.page import curves, runs
from turbodistill.page.request import Request
from turbodistill.trainer.checks import check_name
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.data.choices import expand
from turbodistill.trainer.data.files import DataError, checksum, read_tensors
from turbodistill.trainer.data.images import check_pictures, load_picture
from turbodistill.trainer.data.pictures import read_pictures
from turbodistill.trainer.data.prompts import read_prompts
from turbodistill.trainer.data.samples import load_samples
from turbodistill.trainer.loop.distill import Step
from turbodistill.trainer.loop.health import Health
from turbodistill.trainer.run.history import History, read_rows
from turbodistill.trainer.run.monitor import Monitor
from turbodistill.trainer.sizes import check_size

OURS = (CardError, ConfigError, DataError)
CARD = StudentCard("lora", "toy", "0" * 16, "sd", "x0", "eps", (999, 499), 4.0, (64, 64), rank=4, alpha=4.0)
STUDENT = save({"lora_unet_a.lora_up.weight": torch.ones(4, 2), "b": torch.ones(3)}, CARD.to_metadata())
SHARD = {"latents": torch.zeros(2, 4, 2, 2).half(), "seeds": torch.tensor([1, 2])}
TEXTS = {"context": torch.zeros(2, 3, 4).half(), "pooled": torch.zeros(2, 4).half()}


@pytest.fixture(scope="module")
def endures(fuzz):
    """Every test's own share of the inputs."""
    return lambda parse, *given, share=1, **more: fuzz.endures(parse, share * fuzz.TRIES // 30, OURS, *given, **more)


def test_students(fuzz, endures, tmp_path):
    def student(draws):
        path = tmp_path / "x.safetensors"
        if draws.random() < 0.5:
            values = fuzz.values_of(draws, json.loads(CARD.to_metadata()[KEY]) | {"metrics": {"kid": 1.0}})
            about = {KEY: json.dumps(values), "ss_output_name": draws.choice(fuzz.ODD[5:])}
            path.write_bytes(save({"a": torch.ones(2)}, about))
        else:
            path.write_bytes(fuzz.bytes_of(draws, STUDENT))
        titles(path)
        by_file(path, draws.choice(fuzz.ODD))
        card = read_card(path)
        assert card.in_words() and json.dumps(asdict(card), allow_nan=False)
        read_student(path)

    assert endures(student, share=3)


def test_pairs(fuzz, endures, tmp_path):
    def shard(draws):
        made = {"pairs-0000000": SHARD, "prompts-0000000": TEXTS, "pairs-0000064": SHARD}
        for name, tensors in made.items():
            if draws.random() < 0.5:
                tensors = fuzz.tensors_of(draws, tensors)
            about = {"key": "k", "texts": '["a", "b"]', "prompts": '["a", "b"]'}
            if draws.random() < 0.5:
                about = {k: v for k, v in fuzz.values_of(draws, about).items() if isinstance(v, str)}
                about = {k: v.encode("utf-8", "replace").decode() for k, v in about.items()}
            raw = save(tensors, about | {"checksum": checksum(tensors)})
            (tmp_path / f"{name}.safetensors").write_bytes(fuzz.bytes_of(draws, raw) if draws.random() < 0.1 else raw)
        read_tensors(tmp_path / "pairs-0000000.safetensors")
        samples = load_samples(tmp_path, "pairs")
        rows = torch.arange(len(samples))
        assert samples.latents[rows].ndim == 4 and len(samples.cond.rows(rows).context) == len(rows)
        samples.noise(rows)

    assert endures(shard, fresh=tmp_path, share=2)


def test_tables_and_captions(fuzz, endures, tmp_path):
    def table(draws):
        rows = [json.dumps(fuzz.values_of(draws, {"file_name": "a.png", "text": "a fox"})) for _ in range(3)]
        (tmp_path / "metadata.jsonl").write_bytes(fuzz.bytes_of(draws, "\n".join(rows).encode()))
        read_pictures(tmp_path)

    def commas(draws):
        raw = b'file_name,text\na.png,"a fox"\nb.png,an owl\n'
        (tmp_path / "metadata.csv").write_bytes(fuzz.bytes_of(draws, raw))
        read_pictures(tmp_path)

    assert endures(table, fresh=tmp_path, share=2) and endures(commas, fresh=tmp_path, share=2)


def encoded(mode, kind, **more):
    file = io.BytesIO()
    Image.effect_noise((16, 12), 60).convert("L").convert(mode).save(file, kind, **more)
    return file.getvalue()


PICTURES = {
    "a.png": [encoded("RGB", "png"), encoded("P", "png", transparency=b"\0\x80"), encoded("LA", "png"),
              encoded("I", "png"), encoded("1", "png")],
    "a.jpg": [encoded("RGB", "jpeg"), encoded("CMYK", "jpeg"), encoded("L", "jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08")],
    "a.tiff": [encoded("F", "tiff"), encoded("LAB", "tiff"), encoded("I;16", "tiff"), encoded("RGBA", "tiff")],
    "a.gif": [encoded("P", "gif")],
    "a.bmp": [encoded("RGB", "bmp")],
    "a.webp": [encoded("RGB", "webp")],
}  # fmt: skip


def bomb(side):
    """A PNG whose header alone is large."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore")
def test_pictures(fuzz, endures, tmp_path):
    def picture(draws):
        name = draws.choice(list(PICTURES))
        raw = draws.choice(PICTURES[name])
        if draws.random() < 0.05:
            name, raw = "a.png", bomb(draws.choice((9000, 13000, 60000, 2**31 - 1)))
        elif draws.random() < 0.8:
            raw = fuzz.bytes_of(draws, raw)
        (tmp_path / name).write_bytes(raw)
        (tmp_path / "a.txt").write_bytes(fuzz.bytes_of(draws, b"a fox") if draws.random() < 0.3 else b"a fox")
        found = read_pictures(tmp_path)
        check_pictures(found.pictures)
        for each in found.pictures:
            assert load_picture(each, (8, 8)).shape == (3, 8, 8)

    assert endures(picture, fresh=tmp_path, share=4)


def test_prompts(fuzz, endures, tmp_path):
    def prompts(draws):
        path = tmp_path / "p.txt"
        path.write_bytes(fuzz.bytes_of(draws, b"# words\na {red|blue {big|small}} fox, {photo|}\nan owl\n"))
        for line in read_prompts(path):
            expand(line, draws)

    def wildcards(draws):
        folder = tmp_path / "wildcards"
        folder.mkdir()
        sample = b"2::red\n{1-2$$ and $$blue|{0.5::a|b}}\n__b*__\n\\{x\\}|y\n"
        (folder / "a.txt").write_bytes(fuzz.bytes_of(draws, sample) if draws.random() < 0.5 else sample)
        (folder / "b.txt").write_bytes(fuzz.bytes_of(draws, b"one\ntwo {__c/d__|three}\n"))
        values = fuzz.values_of(draws, {"c": {"d": ["e", "f {g|h}"], "e": ["__a__"]}, "i": ["j"]})
        (folder / "c.json").write_bytes(json.dumps(values).encode())
        (folder / "d.yaml").write_bytes(fuzz.bytes_of(draws, b"c:\n  d: [e, 2]\nk: &k\n- l\nm: {n: *k}\n"))
        (tmp_path / "p.txt").write_bytes(fuzz.bytes_of(draws, b"a __a__ {2$$__b__} {2$$, $$__c/d__|__k*__} \\__z__\n"))
        for line in read_prompts(tmp_path / "p.txt"):
            expand(line, draws)

    assert endures(prompts, share=2) and endures(wildcards, share=2, fresh=tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_prompts_of_pictures(fuzz, endures, tmp_path):
    node = {"class_type": "CLIPTextEncode", "inputs": {"text": "an owl", "clip": ["4", 1]}}
    sampler = {"class_type": "KSampler", "inputs": {"positive": ["6", 0], "negative": ["7", 0], "cfg": 7.0, "steps": 4}}
    links = [[1, 1, 0, 3, 1, "CONDITIONING"]]
    text = {"id": 1, "type": "CLIPTextEncode", "widgets_values": ["an elk"]}
    samples = {"id": 3, "type": "KSampler", "inputs": [{"name": "positive", "link": 1}]}
    page = {"nodes": [text, samples], "links": links}
    infotext = b"a fox <lora:x:1>\nNegative prompt: bad\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1"

    def picture(draws):
        graph = {"3": fuzz.values_of(draws, sampler), "6": fuzz.values_of(draws, node), "7": node}
        about = PngInfo()
        if draws.random() < 0.5:
            about.add_itxt("parameters", fuzz.bytes_of(draws, infotext).decode("utf-8", "replace"))
        about.add_text("prompt", json.dumps(graph if draws.random() < 0.8 else fuzz.values_of(draws, graph)))
        about.add_text("workflow", json.dumps(fuzz.values_of(draws, page)))
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=about)
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + infotext.decode().encode("utf-16-be")
        Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg", exif=fuzz.bytes_of(draws, exif.tobytes()))
        for name in ("a.png", "b.jpg"):
            raw = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(fuzz.bytes_of(draws, raw) if draws.random() < 0.3 else raw)
        for line in read_prompts(tmp_path):
            expand(line, draws)

    endures(picture, share=3, fresh=tmp_path)


def test_settings(fuzz, endures, tmp_path):
    def toml(draws):
        (tmp_path / "s.toml").write_bytes(fuzz.bytes_of(draws, Config().to_toml().encode()))
        Config.from_toml(tmp_path / "s.toml")

    def config(draws):
        Config.from_dict(fuzz.values_of(draws, Config().to_dict()))

    def names(draws):
        check_size(draws.choice([-1, 0, 63, 64, 10**9]), 64)
        check_name(fuzz.bytes_of(draws, b"my-turbo").decode(errors="replace"))

    assert endures(toml, share=2) and endures(config, share=2) and endures(names)


def test_histories(fuzz, endures, tmp_path):
    """A run that goes on draws what is there, and writes on."""
    sample = (
        b"update,seconds,accuracy,logit_gap,saturation,sharpness,diversity,regression\n"
        b"1,0.1,0.5,0.1,1,1,1,1\n2,0.1,0.5,0.1,1,1,1,\n"
    )

    def history(draws):
        path = tmp_path / "history.csv"
        path.write_bytes(fuzz.bytes_of(draws, sample))
        monitor = Monitor("distill", "x", Config(), lambda latents: [])
        monitor.recall(read_rows(path, 10))
        shown = monitor.snapshot()
        json.dumps(shown, allow_nan=False)
        curves.charts(shown)
        runs._last_update(path)
        health = Health(0.5, 0.1, 1.0, 1.0, 1.0)
        History(path, 10).add(Step(11, {"regression": 1.0}, health, 0.1, 0.1), health)
        assert read_rows(path, 11)[-1]["update"] == "11"

    endures(history, share=2)


def test_records_of_runs(fuzz, endures, tmp_path):
    record = asdict(runs.Record(Request(prompts="a fox", settings={"rank": 4}), "toy.safetensors", "k"))

    def listed(draws):
        folder = tmp_path / "my-turbo"
        folder.mkdir(exist_ok=True)
        raw = json.dumps(fuzz.values_of(draws, record)).encode()
        (folder / "run.json").write_bytes(fuzz.bytes_of(draws, raw) if draws.random() < 0.3 else raw)
        (folder / "history.csv").write_bytes(fuzz.bytes_of(draws, b"update\n1\n2\n"))
        found = runs.listed(tmp_path)
        json.dumps([run.to_dict() for run in found], allow_nan=False)
        assert all(run.in_words() for run in found)
        for run in found:
            runs.student_path(tmp_path, "my-turbo", run.record)
        runs.check_settings(folder, Config())
        runs.asked(tmp_path, "my-turbo")

    assert endures(listed, share=2)


def test_a_picture_of_many_pixels_takes_a_bounded_memory(fuzz, tmp_path):
    """Ten kilobytes of file, a quarter of a gigabyte of pixels."""
    Image.new("1", (9000, 9000), 1).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("white")
    with fuzz.bounded(700 << 20):
        (found,) = read_pictures(tmp_path).pictures
        assert (load_picture(found, (8, 8)) == 1).all()
