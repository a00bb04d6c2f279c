"""The public API: importing it costs nothing, and the README's lines of Python run as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import turbodistill
from PIL import Image

ROOT = Path(__file__).parents[1]


def test_importing_costs_no_torch():
    code = "import sys, turbodistill; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "turbodistill" in loaded
    assert not {"torch", "numpy", "diffusers", "turbodistill.trainer.config"} & set(loaded)


def test_a_star_brings_what_is_public():
    names: dict = {}
    exec("from turbodistill import *", names)
    assert names["__version__"].count(".") == 2 and set(turbodistill.PUBLIC) <= set(names)


def test_a_device_that_is_not_there_is_told():
    with pytest.raises(ValueError, match=r"device 'bogus' cannot be used \(.*\): leave it out"):
        turbodistill.load_model(device="bogus")


@pytest.mark.parametrize("name", sorted(set(turbodistill.PUBLIC) - {"__version__"}))
def test_every_public_name_is_there_and_documented(name):
    found = getattr(turbodistill, name)
    assert found.__doc__ and found.__name__ in (name, turbodistill.PUBLIC[name][1])


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(AttributeError, match="turbodistill has no 'distil': its public names are Config"):
        _ = turbodistill.distil


@pytest.mark.slow
def test_the_readme_s_lines_distil_and_sample(tmp_path):
    code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert 8 <= len(code.strip().splitlines()) <= 12
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 20  # a line an update
    assert [Image.open(tmp_path / f"runs/readme/{k}.png").size for k in range(2)] == [(64, 64)] * 2
