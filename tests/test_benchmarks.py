"""Benchmarks that need what is not here run on tiny networks, so that they run where it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytest.importorskip("diffusers", reason="needs diffusers: pip install 'turbodistill[demo]'")


@pytest.mark.slow
def test_the_gpu_s_table_is_made_part_by_part_and_goes_on(tmp_path):
    def run(part):
        command = [sys.executable, BENCHMARKS / "gpu.py", "--dry-run", "--part", part, "--out", tmp_path / "gpu.json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "gpu.json").read_text()), done.stdout

    found, told = run("sample")
    assert found["small 64 px, one step"]["pictures/s"] > 0 and "network ms" in told
    more, _ = run("sd15")
    updates = [figures["s/update"] for name, figures in more.items() if "batch" in name]
    assert len(updates) == 3 and all(value > 0 for value in updates)
    assert run("sample")[0] == more  # nothing is measured twice


@pytest.mark.slow
def test_a_real_checkpoint_s_student_is_judged_by_one_command(tmp_path):
    command = [sys.executable, BENCHMARKS / "real.py", "--dry-run", "--out", tmp_path / "real"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "real" / "real.json").read_text())
    teacher, again, _, student = found["arms"].values()
    assert teacher["KID x 1000"] is None and again["KID x 1000"]["low"] <= again["KID x 1000"]["high"]
    assert 0 < student["seconds"] < teacher["seconds"] and -100 <= student["CLIP score"] <= 100
    assert found["prompts"] == 12 and found["student"]["updates"] == 4 == found["settings"]["updates"]
    assert len(list((tmp_path / "real" / "student, 1 step").glob("*.webp"))) == 12


@pytest.mark.slow
def test_the_memory_of_many_pairs_is_measured():
    command = [sys.executable, BENCHMARKS / "data_memory.py", "--prompts", "70", "--pairs", "64", "--updates", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "batches drawn" in done.stdout and "GiB" in done.stdout
