"""`turbodistill distill --vram`: the plan is printed, what is set by hand stays, and what cannot be ends so."""

import pytest
from turbodistill.app import cli

SMALL = ["--pairs", "8", "--pair-steps", "1", "--updates", "2", "--preview-every", "0", "--evaluate-every", "0"]
pytest.importorskip("diffusers", reason="needs diffusers: pip install 'turbodistill[demo]'")


def run(*arguments):
    return cli.main(["distill", *SMALL, *arguments])


def test_a_plan_is_printed_and_nothing_is_made(capsys, tmp_path):
    out = tmp_path / "run"
    assert run("--vram", "2", "--estimate", "--batch-size", "2", "--out", str(out)) == 0
    told = capsys.readouterr().out
    assert "2.0 GB less 0.5 GB for CUDA's context" in told and "together, which fits" in told
    assert "set by hand, and kept: batch_size" in told
    assert "8 teacher pairs take about" in told and "; the training takes about" in told and "on disk" in told
    assert not out.exists()


def test_a_toml_s_settings_are_set_by_hand_too(capsys, tmp_path):
    settings = tmp_path / "a.toml"
    settings.write_text("gradient_checkpointing = false\nbatch_size = 64\n")
    assert run("--vram", "2", "--estimate", "--config", str(settings), "--rank", "512") in (0, 1)
    assert "set by hand, and kept: batch_size, gradient_checkpointing" in capsys.readouterr().out


def test_a_card_is_of_1000_gb_at_most_and_one_that_is_too_small_is_told(capsys):
    assert run("--vram", "1001") == 1
    assert "vram is 1001.0: the most is 1000" in capsys.readouterr().err
    assert run("--vram", "0.9", "--estimate") == 1
    assert "No settings make it fit" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--vram", "much")


def test_several_processes_are_planned_for_in_one(capsys, monkeypatch):
    monkeypatch.setattr("turbodistill.app.processes.launched", lambda: 2)
    assert run("--vram", "12") == 1
    assert "vram plans for one process" in capsys.readouterr().err
