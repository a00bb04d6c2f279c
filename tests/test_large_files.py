"""A large file that is refused is refused by its header: in moments, and without its weights in memory."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from turbodistill.core.card import StudentCard

GIGABYTES = 2
CARD = StudentCard("lora", "base", "0" * 16, "stable-diffusion-v1", "eps", "eps", (999,), 4.0, (64, 64), rank=4)
NAMES = {
    "lora": [f"lora_unet_middle_block_{i}.lora_{part}.weight" for i in range(8) for part in ("up", "down")],
    "full": [f"model.diffusion_model.middle_block.{i}.weight" for i in range(16)],
}
CASES = [
    ("model", None, "full", "is of a kind that is not known"),
    ("card", None, "lora", "holds no student card"),
    ("student", None, "lora", "holds no student card"),
    ("student", CARD, "lora", "made for a model that predicts eps, the loaded one predicts v"),
    ("student", replace(CARD, base_prediction="v"), "lora", "does not fit this model: LoRA: 0 of"),
    ("student", replace(CARD, kind="full", base_prediction="v", rank=0), "full", "does not fit this model: student"),
]
# Prints of each case the megabytes that it took more than was in use before, its seconds, and its words.
CODE = """
import json, resource, sys, time
from turbodistill.core.card import read_card
from turbodistill.core.student import load_student
from turbodistill.trainer.pipeline.load import load_model

def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

embedded = load_model(None, "cpu").denoiser
openers = {"model": load_model, "card": read_card, "student": lambda path: load_student(path, embedded)}
for what, path in json.loads(sys.argv[1]):
    before, began = most(), time.monotonic()
    try:
        openers[what](path)
    except ValueError as error:
        print(json.dumps([most() - before, time.monotonic() - began, str(error)]))
"""


@pytest.fixture
def large(tmp_path):
    """A name, a card or None, and a kind -> a file of GIGABYTES with such tensors, which takes no room on the disk."""

    def write(name, card, kind):
        names, metadata = NAMES[kind], card.to_metadata() if card else {}
        length = GIGABYTES * 2**30 // len(names)
        table = {
            name: {"dtype": "F16", "shape": [length // 2048, 1024], "data_offsets": [i * length, (i + 1) * length]}
            for i, name in enumerate(names)
        }
        head = json.dumps({"__metadata__": metadata, **table}).encode()
        head += b" " * (-len(head) % 8)
        path = tmp_path / f"{name}.safetensors"
        with path.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + GIGABYTES * 2**30)
        return path

    return write


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in kilobytes on Linux alone")
def test_what_is_refused_is_not_read(large):
    paths = [(what, str(large(str(i), card, kind))) for i, (what, card, kind, _) in enumerate(CASES)]
    ran = subprocess.run([sys.executable, "-c", CODE, json.dumps(paths)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(answers) == len(CASES)
    for (megabytes, seconds, told), (*_, words) in zip(answers, CASES, strict=True):
        assert words in told and megabytes < 150 and seconds < 10, (megabytes, seconds, told)
