"""Whatever is parsed ends in a value or in an error of ours, in words: never in another one, and never in a hang.

The budget is small here; `FUZZ=20000 pytest tests/test_fuzz.py` tries more.
"""

import json
import os
import random
import time

import pytest
import torch
from safetensors.torch import save
from turbodistill.core.card import KEY, CardError, StudentCard, read_card, read_student, titles
from turbodistill.core.families import by_file
from turbodistill.trainer.checks import check_name, check_size
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.data.files import DataError, read_tensors
from turbodistill.trainer.data.images import load_picture, read_image_folder
from turbodistill.trainer.data.prompts import expand, read_prompts
from turbodistill.trainer.data.samples import load_samples
from turbodistill.trainer.run.history import read_rows

TRIES = int(os.environ.get("FUZZ", "1500"))
CARD = StudentCard("lora", "toy", "0" * 16, "sd", "x0", "eps", (999, 499), 4.0, (64, 64), rank=4, alpha=4.0)
STUDENT = save({"lora_unet_a.lora_up.weight": torch.ones(4, 2), "b": torch.ones(3)}, CARD.to_metadata())
SHARD = save(
    {"latents": torch.zeros(2, 4, 2, 2).half(), "seeds": torch.tensor([1, 2])},
    {"key": "k", "prompts": '["a", "b"]', "checksum": "0"},
)
ODD = ["", "\0", "\u2028", "\ufeff", "\ud800", "NaN", "1e999", "-1", "9" * 400, "null", "true", "[" * 3000, "{}", ".."]
VALUES = [None, True, -1, 0, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "a" * 5000, "\0", [], {}, [[]]]


def bytes_of(draws, sample):
    """Something like `sample`: bytes changed, cut, doubled or put in between."""
    raw = bytearray(sample)
    for _ in range(draws.randint(1, 6)):
        at = draws.randint(0, len(raw))
        kind = draws.randrange(4)
        if kind == 0 and at < len(raw):
            raw[at] = draws.randrange(256)
        elif kind == 1:
            del raw[at : at + draws.choice((1, 8, 200))]
        elif kind == 2:
            raw[at:at] = draws.choice(ODD).encode("utf-8", "surrogatepass")
        else:
            raw[at:at] = raw[max(at - draws.choice((1, 8, 64)), 0) : at]
    return bytes(raw)


def values_of(draws, sample):
    """A record like `sample`: values of other kinds, keys that are gone or new."""
    made = dict(sample)
    for _ in range(draws.randint(1, 3)):
        name = draws.choice([*made, "nobody_knows"])
        if draws.random() < 0.2:
            made.pop(name, None)
        else:
            made[name] = draws.choice(VALUES)
    return made


def card_file(draws, path):
    values = values_of(draws, json.loads(CARD.to_metadata()[KEY]))
    path.write_bytes(save({"a": torch.ones(2)}, {KEY: json.dumps(values), "ss_output_name": draws.choice(ODD[5:])}))


def student(draws, folder):
    path = folder / "x.safetensors"
    if draws.random() < 0.5:
        card_file(draws, path)
    else:
        path.write_bytes(bytes_of(draws, STUDENT))
    titles(path)
    by_file(path, draws.choice(ODD))
    read_card(path).in_words()
    read_student(path)


def shard(draws, folder):
    path = folder / "pairs-0000000.safetensors"
    path.write_bytes(bytes_of(draws, SHARD))
    read_tensors(path)
    load_samples(folder, "pairs")


def table(draws, folder):
    rows = [json.dumps(values_of(draws, {"file_name": "a.png", "text": "a fox"})) for _ in range(3)]
    (folder / "metadata.jsonl").write_bytes(bytes_of(draws, "\n".join(rows).encode()))
    read_image_folder(folder)


def commas(draws, folder):
    (folder / "metadata.csv").write_bytes(bytes_of(draws, b'file_name,text\na.png,"a fox"\nb.png,an owl\n'))
    read_image_folder(folder)


def picture(draws, folder):
    for name, text in (("a.png", PNG), ("a.txt", b"a fox")):
        (folder / name).write_bytes(bytes_of(draws, text) if draws.random() < 0.7 else text)
    for path, _ in read_image_folder(folder):
        load_picture(path, (8, 8))


def prompts(draws, folder):
    (folder / "p.txt").write_bytes(bytes_of(draws, b"# words\na {red|blue {big|small}} fox, {photo|}\nan owl\n"))
    for line in read_prompts(folder / "p.txt"):
        expand(line, draws)


def settings(draws, folder):
    (folder / "s.toml").write_bytes(bytes_of(draws, Config().to_toml().encode()))
    Config.from_toml(folder / "s.toml")


def config(draws, _folder):
    Config.from_dict(values_of(draws, Config().to_dict()))


def history(draws, folder):
    (folder / "h.csv").write_bytes(bytes_of(draws, b"update,seconds,accuracy,regression\n1,0.1,0.5,1\n2,0.1,0.5,\n"))
    read_rows(folder / "h.csv", 10)


def names(draws, _folder):
    check_size(draws.choice([-1, 0, 63, 64, 10**9]), 64)
    check_name(bytes_of(draws, b"my-turbo").decode(errors="replace"))


def png():
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise((16, 16), 60).save(file, "png")
    return file.getvalue()


PNG = png()
PARSERS = (student, shard, table, commas, picture, prompts, settings, config, history, names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parse", PARSERS, ids=lambda f: f.__name__)
def test_anything_ends_in_a_value_or_in_our_own_words(parse, tmp_path):
    draws = random.Random(parse.__name__)
    refused, began = 0, time.monotonic()
    for k in range(TRIES // len(PARSERS)):
        for path in tmp_path.iterdir():
            path.unlink()
        try:
            parse(draws, tmp_path)
        except (CardError, ConfigError, DataError) as error:
            refused += 1
            assert 0 < len(str(error)) < 1500, f"input {k} of {parse.__name__}: {str(error)[:200]}"
        except Exception as error:
            pytest.fail(f"input {k} of {parse.__name__} ends in {type(error).__name__}: {str(error)[:300]}")
    assert (refused or parse is history) and time.monotonic() - began < 60
