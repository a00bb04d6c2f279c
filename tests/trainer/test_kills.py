"""Runs that are killed at random moments end as those that nobody disturbed: `benchmarks/kills.py`, briefly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import turbodistill

if not hasattr(os, "fork"):
    pytest.skip("needs fork, which this system has not", allow_module_level=True)

# In a process of its own, which forks: argv: conftest, kills, folder.
SCRIPT = """
import importlib.util, json, pathlib, sys

def module(path):
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    found = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found

toys, kills = module(sys.argv[1]), module(sys.argv[2])
small = {"updates": 8, "regression_updates": 2, "save_every": 2, "evaluate_every": 3}
recipes = {name: toys.config(**small | more) for name, more in kills.RECIPES.items()}
killed, equal = kills.compare(toys.conv_host(), toys.WORDS, recipes, 4, 1, pathlib.Path(sys.argv[3]))
print(json.dumps([killed, equal]))
"""


@pytest.mark.slow
def test_each_resume_ends_bit_equal(tmp_path):
    places = Path(__file__).with_name("conftest.py"), Path(turbodistill.__file__).parent / "benchmarks" / "kills.py"
    command = [sys.executable, "-c", SCRIPT, *map(str, places), str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert told.returncode == 0, told.stderr[-2000:]
    killed, equal = json.loads(told.stdout.strip().splitlines()[-1])
    assert sum(killed.values()) >= 4 and killed == equal, told.stdout
